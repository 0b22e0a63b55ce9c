"""Checkpoints run by PyTorch: one, or several as an ensemble."""

from __future__ import annotations

import copyreg
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.backends.base import Backend
from models.base import Output
from models.yolo import DetectionModel
from utils.config import UserError


class Pointwise(nn.Conv2d):
    """A 1x1 convolution that a CPU runs with oneDNN's matrix kernels, whose layout of the weights is made once.

    torch's own call takes about twice as long for them (yolov5n as a whole took 16 to 29 % less CPU time
    on one core). There, sums over more than 128 channels came out in another order: boxes moved by at most 0.001
    pixels, scores by 1e-6. The layout is kept beside the parameters and made anew when these change, but a change in
    place through `.data`, which torch does not count, is not seen. With gradients, in other types than fp32, off the
    CPU and in a trace torch's own call is used.
    """

    _laid_out: tuple[Any, Tensor] | None = None  # which weights, and these as oneDNN reads them

    @staticmethod
    def here() -> bool:
        """Whether this torch has oneDNN's kernels, and the processor is one on which they were measured."""
        known = platform.machine().lower() in ("x86_64", "amd64")
        return known and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        recorded = torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling()
        if recorded or not self._takes(x, weight):
            return super().forward(x)
        now = (weight.data_ptr(), weight._version, x.shape[1])
        if self._laid_out is None or self._laid_out[0] != now:
            dense = weight.detach().contiguous().to_mkldnn()
            geometry = (self.padding, self.stride, self.dilation, self.groups)
            self._laid_out = now, torch.ops.aten.mkldnn_reorder_conv2d_weight(dense, *geometry)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._laid_out[1], self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    @staticmethod
    def _takes(x: Tensor, weight: Tensor) -> bool:
        """Plain fp32 on a CPU; changes of weights made in inference mode are not counted, so those are left alone."""
        plain = type(x) is Tensor and x.device.type == weight.device.type == "cpu" and x.numel() > 0
        return plain and x.dtype is weight.dtype is torch.float32 and not weight.is_inference()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._laid_out = None
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies, and what is saved, are torch's own convolution."""
        state = {name: value for name, value in self.__dict__.items() if name != "_laid_out"}
        return copyreg._reconstructor, (nn.Conv2d, object, None), state  # type: ignore[attr-defined]


def speed_up_(network: nn.Module) -> None:
    """Let the 1x1 convolutions of a network that only infers be `Pointwise`, in place, where these work."""
    if Pointwise.here():
        for layer in network.modules():
            alone = type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.padding == (0, 0)
            if alone and layer.groups == 1:
                layer.__class__ = Pointwise


def to_bf16_(network: DetectionModel) -> None:
    """Let a network for a CPU compute in bf16, in place, except for its head.

    bf16 has 8 significant bits, so above 512 pixels its numbers are 4 apart: the head and its decoding stay in fp32.
    """
    for layer in network.model[:-1]:
        layer.bfloat16()
    network.head.register_forward_pre_hook(_in_fp32)


def _in_fp32(head: nn.Module, maps: tuple[list[Tensor]]) -> tuple[list[Tensor]]:
    return ([level.float() for level in maps[0]],)


class PyTorch(Backend):
    """One network of ours, or several as an ensemble, whose candidate boxes are put together before NMS.

    Raises:
        UserError: networks that predict different classes or numbers of mask coefficients.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        first: Any = networks[0]
        self.names, self.num_masks = dict(first.names), int(first.num_masks)
        self.task = "segment" if self.num_masks else "detect"
        self.stride = max(32, *(int(network.stride.max()) for network in networks))  # type: ignore[operator, union-attr]
        for number, network in enumerate(networks[1:], 2):
            other: Any = network
            if (len(other.names), other.num_masks) != (len(self.names), self.num_masks):
                raise UserError(
                    f"--weights: file {number} predicts {len(other.names)} classes and {other.num_masks} mask "
                    f"coefficients per box, file 1 {len(self.names)} and {self.num_masks}. An ensemble needs equal "
                    "ones: leave one of the files out."
                )
            if dict(other.names) != self.names:
                raise UserError(
                    f"--weights: the classes of file {number} differ from those of file 1. An ensemble needs the same "
                    "classes: leave one of the files out."
                )

    @property
    def model(self) -> nn.Module:
        """The first network."""
        return self.networks[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the parameters are now: unlike an exported network this one can be moved."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the parameters now."""
        return next(self.parameters()).dtype

    def forward(self, images: Tensor, augment: bool = False, visualize: Any = None) -> Any:
        """See `Backend`; `visualize` as in `BaseModel.run_layers`."""
        options = {"augment": augment, "visualize": visualize}
        outputs = [network(images, **options) for network in self.networks]
        return outputs[0] if len(outputs) == 1 else Output(torch.cat([output.predictions for output in outputs], 1))
