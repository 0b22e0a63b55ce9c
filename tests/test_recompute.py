"""Batch norm and SiLU in one step: torch's own numbers forward, the same gradient within rounding, less memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import recompute
from models.common import Conv
from models.recompute import may_recompute, norm_silu
from models.yolo import DetectionModel

ROOT = Path(__file__).resolve().parents[1]
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-7}


def _norm(channels: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)
    nn.init.uniform_(bn.weight, -1, 2)
    nn.init.normal_(bn.bias)
    return bn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(8, 16, 40, 40), (3, 24, 33, 7)])
def test_one_step_gives_what_two_give(
    dtype: torch.dtype, memory_format: torch.memory_format, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    two = _norm(shape[1])
    one = copy.deepcopy(two)
    values = (torch.randn(shape) * 2 + 0.5).to(dtype).to(memory_format=memory_format)
    upstream = torch.randn(shape).to(dtype).to(memory_format=memory_format)
    x, z = values.clone().requires_grad_(), values.clone().requires_grad_()

    expected, found = nn.functional.silu(two(x)), norm_silu(z, one)
    expected.backward(upstream)
    found.backward(upstream)

    assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
    for mine, theirs in ((z.grad, x.grad), (one.weight.grad, two.weight.grad), (one.bias.grad, two.bias.grad)):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=4 * UNIT[dtype], atol=4 * UNIT[dtype] * float(theirs.abs().max()))


def test_its_gradient_is_the_derivative() -> None:
    torch.manual_seed(0)
    bn = _norm(3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: norm_silu(value, bn), (x,))


def test_a_channel_without_any_variance_has_a_finite_gradient() -> None:
    bn = _norm(4)
    x = torch.full((2, 4, 8, 8), 3.0, requires_grad=True)
    norm_silu(x, bn).square().sum().backward()
    assert (
        x.grad is not None
        and x.grad.isfinite().all()
        and bn.weight.grad is not None
        and bn.weight.grad.isfinite().all()
    )


def _kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass beside the weights, each storage once."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        levels = model(images)
    del levels
    return sum(size for place, size in storages.items() if place not in weights)


def test_a_network_keeps_much_less_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = DetectionModel(ROOT / "models/yolov5n.yaml", verbose=False).train().to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 128, 128).to(memory_format=torch.channels_last)
    start = copy.deepcopy(model.state_dict())
    results = {}
    for least in (1, 1 << 40):
        monkeypatch.setattr(recompute, "MIN_ELEMENTS", least)
        model.load_state_dict(start)
        model.zero_grad()
        levels = model(images)
        sum(level.square().mean() for level in levels).backward()  # type: ignore[union-attr]
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[least] = levels, gradient, _kept(model, images)
    (small, gradient, kept), (levels, expected, all_kept) = results.values()
    assert all(torch.equal(a, b) for a, b in zip(small, levels, strict=True))
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    assert kept < 0.7 * all_kept


def test_layers_that_do_not_train_with_these_two_are_left_alone() -> None:
    x = torch.zeros(1, 16, 256, 256)
    conv = Conv(3, 16).train()
    assert may_recompute(x, conv.bn, conv.act)  # type: ignore[arg-type]
    assert not may_recompute(x[:, :, :8], conv.bn, conv.act)  # type: ignore[arg-type]  # small
    assert not may_recompute(x, conv.bn, nn.ReLU())  # type: ignore[arg-type]
    assert not may_recompute(x.to("meta"), conv.bn, conv.act)  # type: ignore[arg-type]
    assert not may_recompute(x, nn.SyncBatchNorm(16), conv.act)
    with torch.no_grad():
        assert not may_recompute(x, conv.bn, conv.act)  # type: ignore[arg-type]
    handle = conv.act.register_forward_hook(lambda *_: None)
    assert not may_recompute(x, conv.bn, conv.act)  # type: ignore[arg-type]
    handle.remove()
    assert not may_recompute(x, conv.eval().bn, conv.act)  # type: ignore[arg-type]


def test_hooks_on_the_activation_still_see_a_large_map() -> None:
    conv, seen = Conv(3, 16).train(), []
    conv.act.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    conv(torch.rand(1, 3, 256, 256))
    assert seen == [(1, 16, 256, 256)]
