"""Layers: shapes, state-dict names, what they compute, folding of batch norms, and squeeze-and-excitation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.common import (
    C3,
    C3SPP,
    C3TR,
    SE,
    SPP,
    SPPF,
    Bottleneck,
    BottleneckCSP,
    C3Ghost,
    C3x,
    Classify,
    Concat,
    Contract,
    Conv,
    CrossConv,
    DWConv,
    DWConvTranspose2d,
    Expand,
    Focus,
    GhostBottleneck,
    GhostConv,
    MixConv2d,
    Proto,
    TransformerBlock,
    set_activation,
)

BUILDERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "Conv": (lambda: Conv(8, 16, 3, 2), (16, 8, 8)),
    "Conv with padding": (lambda: Conv(8, 16, 6, 2, 2), (16, 8, 8)),
    "Conv dilated": (lambda: Conv(8, 16, 3, 1, None, 1, 2), (16, 16, 16)),
    "DWConv": (lambda: DWConv(8, 16, 3, 1), (16, 16, 16)),
    "DWConvTranspose2d": (lambda: DWConvTranspose2d(8, 8, 4, 2, 1), (8, 32, 32)),
    "Bottleneck": (lambda: Bottleneck(8, 8), (8, 16, 16)),
    "CrossConv": (lambda: CrossConv(8, 8, 3, 1, shortcut=True), (8, 16, 16)),
    "C3": (lambda: C3(8, 16, 2), (16, 16, 16)),
    "C3x": (lambda: C3x(8, 16, 2), (16, 16, 16)),
    "C3TR": (lambda: C3TR(8, 16, 2), (16, 16, 16)),
    "C3SPP": (lambda: C3SPP(8, 16, (3, 5)), (16, 16, 16)),
    "C3Ghost": (lambda: C3Ghost(8, 16, 2), (16, 16, 16)),
    "BottleneckCSP": (lambda: BottleneckCSP(8, 16, 2), (16, 16, 16)),
    "SPP": (lambda: SPP(8, 16), (16, 16, 16)),
    "SPPF": (lambda: SPPF(8, 16), (16, 16, 16)),
    "Focus": (lambda: Focus(8, 16, 3), (16, 8, 8)),
    "GhostConv": (lambda: GhostConv(8, 16, 3, 2), (16, 8, 8)),
    "GhostBottleneck": (lambda: GhostBottleneck(8, 16, 3, 2), (16, 8, 8)),
    "TransformerBlock": (lambda: TransformerBlock(8, 16, 4, 2), (16, 16, 16)),
    "MixConv2d": (lambda: MixConv2d(8, 16, (1, 3, 5)), (16, 16, 16)),
    "SE": (lambda: SE(8, 8, 4), (8, 16, 16)),
    "Contract": (lambda: Contract(2), (32, 8, 8)),
    "Expand": (lambda: Expand(2), (2, 32, 32)),
    "Proto": (lambda: Proto(8, 16, 4), (4, 32, 32)),
}


def settle(module: nn.Module) -> nn.Module:
    """Batch norms as after some training, so that folding them has something to fold."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module.eval()


def fuse(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, Conv):
            layer.fuse_()
    return module


@pytest.mark.parametrize("name", BUILDERS)
def test_a_layer_keeps_its_numbers_when_fused_and_in_any_memory_layout(name: str) -> None:
    torch.manual_seed(0)
    build, shape = BUILDERS[name]
    layer, x = settle(build()), torch.randn(2, 8, 16, 16)
    with torch.no_grad():
        expected = layer(x)
        assert tuple(expected.shape) == (2, *shape)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(fuse(copy.deepcopy(layer))(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_layer_moves_to_another_type_and_back(name: str) -> None:
    build, shape = BUILDERS[name]
    layer = build().eval().to(torch.bfloat16)
    with torch.no_grad():
        y = layer(torch.randn(1, 8, 16, 16).to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and tuple(y.shape) == (1, *shape)


def keys(module: nn.Module) -> list[str]:
    """Parameter names, without the bookkeeping of batch norm."""
    return [name for name, _ in module.named_parameters()]


def test_names_and_order_of_a_block_are_the_file_format() -> None:
    assert list(Conv(3, 8).state_dict()) == [
        "conv.weight",
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    ]
    blocks = [key.removesuffix(".conv.weight") for key in C3(8, 8, 2).state_dict() if key.endswith(".conv.weight")]
    assert blocks == ["cv1", "cv2", "cv3", "m.0.cv1", "m.0.cv2", "m.1.cv1", "m.1.cv2"]
    assert list(fuse(Conv(3, 8)).state_dict()) == ["conv.weight", "conv.bias"]
    assert keys(SE(32, 32)) == ["l1.weight", "l2.weight"]
    assert [key for key in keys(TransformerBlock(8, 16, 4, 1)) if not key.startswith("conv.")] == [
        "linear.weight",
        "linear.bias",
        *(f"tr.0.{part}.weight" for part in "qkv"),
        *("tr.0.ma.in_proj_weight", "tr.0.ma.in_proj_bias", "tr.0.ma.out_proj.weight", "tr.0.ma.out_proj.bias"),
        *("tr.0.fc1.weight", "tr.0.fc2.weight"),
    ]
    assert {key.split(".")[0] for key in keys(BottleneckCSP(8, 8))} == {"cv1", "cv2", "cv3", "cv4", "bn", "m"}
    assert {key.split(".")[0] for key in keys(GhostBottleneck(8, 8, 3, 2))} == {"conv", "shortcut"}
    assert {key.split(".")[0] for key in keys(Classify(8, 4))} == {"conv", "linear"}
    assert {key.split(".")[0] for key in keys(MixConv2d(8, 8))} == {"m", "bn"}


def test_folding_scales_rows_in_half_precision_too() -> None:
    torch.manual_seed(0)
    layer = settle(Conv(4, 6, 3, g=2))
    conv, bn = layer.conv.weight.double(), layer.bn
    gain = (bn.weight / (bn.running_var + bn.eps).sqrt()).double()
    weight = torch.einsum("o,oihw->oihw", gain, conv)
    bias = bn.bias.double() - gain * bn.running_mean.double()
    half = fuse(copy.deepcopy(layer).half())
    fuse(layer)
    torch.testing.assert_close(layer.conv.weight.double(), weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.conv.bias.double(), bias, atol=1e-6, rtol=1e-5)
    assert half.conv.weight.dtype == half.conv.bias.dtype == torch.float16
    torch.testing.assert_close(half.conv.weight.double(), weight, atol=2e-3, rtol=2e-3)
    again = layer.conv.weight.clone()
    layer.fuse_()
    assert torch.equal(layer.conv.weight, again)


def test_bottleneck_adds_only_where_it_can() -> None:
    assert Bottleneck(8, 8).add and not Bottleneck(8, 16).add and not Bottleneck(8, 8, False).add


def test_depthwise_convolutions_have_as_many_groups_as_divide_both() -> None:
    assert DWConv(8, 12).conv.groups == 4
    assert DWConvTranspose2d(8, 12, 2, 2).groups == 4


def test_focus_orders_its_corners_as_trained_weights_expect() -> None:
    layer = Focus(1, 4, 1)
    layer.conv = nn.Identity()
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2)  # row 0: 0 1, row 1: 2 3
    assert layer(x).flatten().tolist() == [0, 2, 1, 3]


def test_sppf_is_spp_with_growing_kernels() -> None:
    torch.manual_seed(0)
    fast, slow = settle(SPPF(8, 16, 5)), settle(SPP(8, 16, (5, 9, 13)))
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(1, 8, 20, 20)
    torch.testing.assert_close(fast(x), slow(x))


def test_contract_and_expand_order_their_channels_row_column_channel() -> None:
    x = torch.randn(1, 3, 4, 6)
    y = Contract(2)(x)
    for row in range(2):
        for column in range(2):
            for c in range(3):
                assert torch.equal(y[0, (row * 2 + column) * 3 + c], x[0, c, row::2, column::2])
    assert torch.equal(Expand(2)(y), x)


def test_mixed_convolutions_share_out_all_channels() -> None:
    assert [conv.out_channels for conv in MixConv2d(8, 8, (1, 3, 5)).m] == [3, 2, 3]
    assert [conv.out_channels for conv in MixConv2d(8, 64, (1, 3, 5)).m] == [22, 21, 21]
    parts = [conv.out_channels for conv in MixConv2d(8, 40, (1, 3), equal_ch=False).m]
    assert parts == [36, 4]  # 1/1 and 1/9 of the weights' budget


def test_concat_joins_channels() -> None:
    a, b = torch.zeros(1, 2, 3, 3), torch.ones(1, 3, 3, 3)
    assert Concat()([a, b]).shape == (1, 5, 3, 3) and Concat(2)([a, a]).shape == (1, 2, 6, 3)


def test_classify_takes_one_map_or_several() -> None:
    head = Classify(8, 5).eval()
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(head([x[:, :3], x[:, 3:]]), head(x))
    assert head(x).shape == (2, 5)


def test_set_activation_reaches_every_default_and_nothing_else() -> None:
    layer = nn.Sequential(C3(8, 8), Conv(8, 8, act=False), Conv(8, 8, act=nn.ReLU()))
    leaky = nn.LeakyReLU(0.1)
    set_activation(layer, leaky)
    used = [m.act for m in layer.modules() if isinstance(m, Conv)]
    assert all(act is leaky for act in used[:-2])
    assert isinstance(used[-2], nn.Identity) and isinstance(used[-1], nn.ReLU)
    assert isinstance(Conv(8, 8).act, nn.SiLU)


# --- squeeze-and-excitation -------------------------------------------------------------------------------------------


def se_by_hand(layer: SE, x: Tensor) -> Tensor:
    out = torch.empty_like(x, dtype=torch.float64)
    l1, l2 = layer.l1.weight.double(), layer.l2.weight.double()
    for b in range(len(x)):
        squeeze = torch.stack([channel.sum() / channel.numel() for channel in x[b].double()])
        hidden = torch.clamp(l1 @ squeeze, min=0)
        gate = 1 / (1 + torch.exp(-(l2 @ hidden)))
        for c in range(x.shape[1]):
            out[b, c] = x[b, c].double() * gate[c]
    return out


def test_se_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    layer, x = SE(32, 32, 4), torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(layer(x).double(), se_by_hand(layer, x), atol=1e-5, rtol=1e-5)
    assert layer.l1.weight.shape == (8, 32) and layer.l2.weight.shape == (32, 8)


def test_se_reduces_by_sixteen_unless_told() -> None:
    assert SE(64, 64).l1.out_features == 4 and SE(64, 64, 2).l1.out_features == 32


@given(seed=st.integers(0, 1000), c=st.sampled_from([16, 24, 48]), h=st.integers(1, 6), w=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_se_gate_ignores_where_pixels_sit(seed: int, c: int, h: int, w: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, x = SE(c, c, 8), torch.randn(2, c, h, w, generator=generator)
    order = torch.randperm(h * w, generator=generator)
    moved = x.flatten(2)[..., order].view_as(x)
    gate = layer.scale(x)
    assert gate.shape == (2, c, 1, 1) and bool(((gate > 0) & (gate < 1)).all())
    torch.testing.assert_close(layer.scale(moved), gate, atol=1e-5, rtol=1e-5)
    assert layer(x).shape == x.shape


def test_se_refuses_channels_it_cannot_gate() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        SE(32, 64)
    for reduction in (33, 0):
        with pytest.raises(ValueError, match="squeeze to none"):
            SE(32, 32, reduction)
