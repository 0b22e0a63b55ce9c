"""Checkpoints run by PyTorch on a CPU: the 1x1 convolutions that oneDNN's matrix kernels run, and bf16."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.backends import load
from models.backends.pytorch import Pointwise, speed_up_
from tests.test_val import micro_checkpoint
from utils.config import UserError

needs_kernels = pytest.mark.skipif(not Pointwise.here(), reason="another processor, or a torch without oneDNN")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro") / "micro.pt", ("cat", "dog"))


def pair(channels: int, out: int = 24, stride: int = 1) -> tuple[nn.Conv2d, nn.Conv2d]:
    """torch's convolution and ours with the same weights."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, out, 1, stride)
    ours = copy.deepcopy(plain)
    speed_up_(nn.Sequential(ours))
    assert type(ours) is Pointwise
    return plain, ours


def images(*shape: int, nhwc: bool = True) -> Tensor:
    x = torch.rand(*shape)
    return x.to(memory_format=torch.channels_last) if nhwc else x


@needs_kernels
@pytest.mark.parametrize(("channels", "exact"), [(16, True), (128, True), (512, False)])
@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_matrix_kernel_computes_what_torch_computes(channels: int, exact: bool, nhwc: bool, stride: int) -> None:
    plain, ours = pair(channels, stride=stride)
    for shape in ((1, channels, 20, 30), (3, channels, 7, 5)):  # the layout is made at the first, and serves the second
        x = images(*shape, nhwc=nhwc)
        with torch.inference_mode():
            assert torch.allclose(plain(x), ours(x), rtol=1e-5, atol=1e-6 if exact else 1e-5)


@needs_kernels
def test_a_result_does_not_depend_on_the_images_before() -> None:
    x, other = images(1, 256, 20, 30), images(2, 256, 40, 12)
    (_, ours), (_, second) = pair(256), pair(256)
    with torch.inference_mode():
        first = ours(x)
        second(other)
        assert torch.equal(first, second(x))
        assert torch.equal(first, ours(torch.cat((x, x)))[:1])


@needs_kernels
def test_changed_weights_are_seen() -> None:
    plain, ours = pair(16)
    x = images(1, 16, 8, 8)
    with torch.no_grad():
        ours(x)
        for layer in (plain, ours):
            layer.weight.mul_(2)
        assert torch.allclose(plain(x), ours(x), atol=1e-6)
        for layer in (plain, ours):
            layer.half().float()
        assert torch.allclose(plain(x), ours(x), atol=1e-6)
        ours.weight = nn.Parameter(torch.zeros_like(ours.weight))
        assert torch.equal(ours(x), ours.bias.view(1, -1, 1, 1).expand(1, 24, 8, 8))


@needs_kernels
def test_gradients_traces_and_other_types_take_torchs_own_way() -> None:
    plain, ours = pair(16)
    x = images(1, 16, 8, 8)
    with torch.inference_mode():
        ours(x)
    ours(x).sum().backward()
    plain(x).sum().backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)
    with torch.no_grad():
        traced = torch.jit.trace(ours, x)
        assert "mkldnn" not in str(traced.inlined_graph)
        assert ours.double()(x.double()).dtype == torch.float64
        assert ours.float()(x[:0]).shape == (0, 24, 8, 8)


@needs_kernels
def test_copies_and_files_hold_torchs_own_convolution() -> None:
    plain, ours = pair(16)
    with torch.inference_mode():
        ours(images(1, 16, 8, 8))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(other) is nn.Conv2d
        assert torch.equal(other.weight, plain.weight) and torch.equal(other.bias, plain.bias)
    assert list(ours.state_dict()) == list(plain.state_dict())


@needs_kernels
def test_a_loaded_checkpoint_finds_the_same_with_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = load(checkpoint)
    monkeypatch.setattr(Pointwise, "here", staticmethod(lambda: False))
    slow = load(checkpoint)
    assert sum(isinstance(layer, Pointwise) for layer in fast.modules()) > 20
    assert not any(isinstance(layer, Pointwise) for layer in slow.modules())
    x = images(1, 3, 96, 128)
    with torch.inference_mode():
        difference = (fast(x).predictions - slow(x).predictions).abs()
    assert difference[..., :4].max() < 0.005  # pixels
    assert difference[..., 4:].max() < 1e-5


@needs_kernels
def test_a_network_that_is_not_folded_is_left_as_it_is(checkpoint: Path) -> None:
    assert not any(isinstance(layer, Pointwise) for layer in load(checkpoint, fuse=False).modules())


def test_in_bf16_boxes_and_scores_stay_fp32(checkpoint: Path) -> None:
    half, full = load(checkpoint, half=True), load(checkpoint)
    head: Any = half.networks[0].head
    assert half.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert torch.equal(head.anchors, full.networks[0].head.anchors)
    x = images(2, 3, 96, 128)
    with torch.inference_mode():
        found, wanted = half(x.bfloat16()).predictions, full(x).predictions
    assert found.dtype is torch.float32
    fractions = found[..., :2] * 256
    assert not torch.equal(fractions, fractions.round()), "bf16 has no such positions"
    assert (found - wanted)[..., 4:].abs().max() < 0.05


def test_bf16_is_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "best.torchscript").touch()
    with pytest.raises(UserError, match=r"--half on a CPU is for \.pt checkpoints"):
        load(tmp_path / "best.torchscript", half=True)
