"""Batch norm and SiLU in one step, for training: the map between them is made again in the backward pass, not kept.

A layer then keeps two maps, the convolution's output and its own, instead of three: a third of a network's activations.
The forward pass is torch's own, to the last bit. The map that is made again differs from the first by rounding (one
unit in the last place of float32), and so does the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_ELEMENTS = 1 << 20  # below, a map takes 4 MB at most, and making it again costs more than it saves


def may_recompute(x: Tensor, bn: nn.Module, act: nn.Module) -> bool:
    """Whether `norm_silu(x, bn)` can stand for `act(bn(x))`: a large map on a CPU, in a layer that trains.

    Modules with hooks are left alone, since `norm_silu` calls neither of them; so are other devices, where it was never
    measured.
    """
    return (
        x.device.type == "cpu"
        and x.numel() >= MIN_ELEMENTS
        and torch.is_grad_enabled()
        and type(bn) is nn.BatchNorm2d
        and type(act) is nn.SiLU
        and bn.training
        and bn.momentum is not None
        and bn.running_mean is not None
        and bn.weight is not None
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and not _hooked(bn)
        and not _hooked(act)
    )


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def norm_silu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """`silu(bn(x))` of a batch norm in training mode, (B, C, H, W); its running statistics move as usual."""
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    return _NormSiLU.apply(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.momentum, bn.eps)


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        var = (rstd.double().pow(-2) - ctx.eps).to(rstd.dtype)
        y = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, ctx.eps)[0]
        torch.ops.aten.silu_backward.grad_input(grad, y, grad_input=y)
        mask = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_batch_norm_backward(y, x, weight, None, None, mean, rstd, True, ctx.eps, mask)
        return (*grads, None, None, None, None)
