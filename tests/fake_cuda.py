"""A CUDA device on any machine, made of torch's fake tensors: they have a device and a shape, and no data.

Inside `fake_cuda()` an operation over two devices raises, and so does one whose result's shape depends on values. What
makes the host wait for the device, or copies memory to it that is not pinned, is noted in `waits`. Tensors on the CPU
stay real, as they are beside a real GPU.

What this cannot show: a backward pass (the autograd engine asks the driver for streams; tests/on_accelerator.py has
one), values, `Module.half()` of a network already moved (fake parameters cannot be replaced), kernels, memory, speed.
torch asks for a driver before it allows autocast and the gradient scaler; that one question is answered with yes here.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

REPOSITORY = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
# Operators whose result's shape or Python value the host must know before it goes on.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def operator_name(func: Any) -> str:
    """`add` for every overload of `aten::add`."""
    return str(func.overloadpacket._qualified_op_name).removeprefix("aten::")


def wait_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why the host waits for the device in this operator, or None where it does not."""
    name = operator_name(func)
    if name in {"_to_copy", "copy_"}:
        source = args[name == "copy_"].device
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source)
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        if (source.type == "cpu") == (target.type == "cpu"):
            return None
        return "copy to the CPU" if target.type == "cpu" else None if non_blocking else "blocking copy to the device"
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return None
    if name in INDEXING:
        index = [value for value in args[1] if value is not None]
        masks = any(value.dtype in (torch.bool, torch.uint8) for value in index)
        return "mask as index" if masks else "index from the CPU" if index[0].device.type == "cpu" else None
    return name if name in READS else None


def place() -> str:
    """The innermost line of the program itself on the stack, as `file:function`."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(REPOSITORY) and file.parent.name != "tests" and "site-packages" not in file.parts:
            return f"{file.relative_to(REPOSITORY).as_posix()}:{frame.name}"
    return "test"


class FakeCuda(TorchDispatchMode):
    """Notes waits, and keeps the CPU's own work real."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def wait(self, reason: str) -> None:
        """Note a wait and where it is."""
        self.waits.append(f"{reason} in {place()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace == "aten":  # operators made of others arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if reason := wait_of(func, args, kwargs):
            self.wait(reason)
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(value, torch.device) and value.type != "cpu" for value in leaves)
        if not on_device and not any(isinstance(value, FakeTensor) for value in leaves):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if operator_name(func) == "_fused_sgd_":  # in place, and the only optimizer kernel without a fake one
            devices = {value.device for value in leaves if isinstance(value, Tensor)}
            assert devices == {CUDA}, f"the fused optimizer got tensors on {devices}"
            return None
        return func(*args, **kwargs)


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a tensor; torch's own asks for the storage, which fake tensors do not have."""
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """The device inside the block, by its name `cuda`; what is yielded has the waits so far."""
    mode = FakeCuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(torch.Tensor, "__deepcopy__", _copied)
        for module in (torch.accelerator, torch.cuda):
            patch.setattr(module, "synchronize", lambda device=None: mode.wait(f"synchronize {device}"))
        with FakeTensorMode(allow_non_fake_inputs=True), mode:
            yield mode
