"""An accelerator written in Python, through torch's key for other people's backends: it computes on the CPU.

Its tensors say that they are on `sim:0`. An operation that meets tensors of the CPU is refused as CUDA refuses it, and
what makes the host wait is noted in `WAITS` (see fake_cuda.py). Other than fake tensors these have values, and the
autograd engine knows their device, so that a whole training runs on them. There is no lower precision: autocast is off,
as it is on every accelerator but CUDA.

`register()` changes the process for good, and must come before its first backward pass: the engine counts the devices
only then. So what uses it runs in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from fake_cuda import operator_name, place, wait_of
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "sim"
COPIES = {"copy_", "_to_copy"}
WAITS: list[str] = []


class SimTensor(Tensor):
    """A tensor on `sim:0`; `data_` is where its values are, with the same strides."""

    data_: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> SimTensor:
        layout = dict(strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype)
        with torch.inference_mode(False):  # there, too, a view of a tensor made before must share its version
            tensor = Tensor._make_wrapper_subclass(cls, data.size(), **layout, device=torch.device(NAME, 0))
        tensor.data_ = data
        return tensor

    def __repr__(self) -> str:
        return f"SimTensor({self.data_})"

    def tolist(self) -> Any:
        """As CUDA's: a copy to the CPU. torch's own refuses subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # there operators made of others arrive whole
            parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator on the tensors behind those of the device; its results are on the device, or where it was asked."""
    name = operator_name(func)
    leaves = pytree.tree_leaves((args, kwargs))
    ours = {id(value.data_): value for value in leaves if isinstance(value, SimTensor)}
    others = [value for value in leaves if isinstance(value, Tensor) and not isinstance(value, SimTensor)]
    if ours and name not in COPIES:
        scalars = torch.Tag.pointwise in func.tags  # may be of the CPU, as for CUDA
        if any(value.dim() or not scalars for value in others):
            raise RuntimeError(f"{func}: expected all tensors on one device, found {NAME}:0 and cpu")
    if reason := wait_of(func, args, kwargs):
        WAITS.append(f"{reason} in {place()}")
    target = torch.device(kwargs.get("device") or (NAME if ours else "cpu"))
    inner = func(*pytree.tree_map(_inside, args), **pytree.tree_map(_inside, kwargs))

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in ours:  # an operator in place gives back its argument
            return _unchanged(ours[id(value)])
        return SimTensor(value) if target.type == NAME else value

    return args[0] if name == "copy_" else pytree.tree_map(outside, inner)


def _inside(value: Any) -> Any:
    """What the CPU gets for an argument."""
    if isinstance(value, SimTensor):
        return value.data_
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _unchanged(tensor: SimTensor) -> SimTensor:
    """A tensor that an operator changed in place: torch must still know its shape."""
    assert tensor.shape == tensor.data_.shape, "an operator gave a tensor of the device another shape in place"
    return tensor


class _Backend:
    """What torch asks `torch.sim`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing is random on the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


def register() -> list[torch.library.Library]:
    """Make the device known to torch; what is returned must be kept as long as it is used."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")

    def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        # `torch.tensor(..., device=)` copies below the level at which SimTensor is asked
        return _run(torch.ops.aten.copy_.default, (target, source, non_blocking), {})

    some.impl("copy_", copy_, "PrivateUse1")
    # torch makes these as an empty tensor that grows, and ours have fixed shapes
    for overload in ("arange", "arange.start", "arange.start_step"):
        operator = getattr(torch.ops.aten.arange, overload.partition(".")[2] or "default")
        some.impl(overload, lambda *args, func=operator, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    torch.accelerator.synchronize = lambda device=None: WAITS.append(f"synchronize {device} in {place()}")
    return [everything, some]
