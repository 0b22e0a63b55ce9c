"""Each gate beside its paper's formula, written out by hand in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.attention import CBAM, ECA, EMA, GAM, SCSE, CoordAtt, GlobalContext, SimAM
from tests.test_attention import CHANNELS, GATES, make, noise, stir

Array = np.ndarray


def sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def softmax(v: Array) -> Array:
    return np.exp(v) / np.exp(v).sum()


def numbers(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def convolved(layer: nn.Conv2d, x: Array) -> Array:
    """Output (o, h, w) of a same-padded convolution of (c, h, w), one position at a time."""
    weight, k = numbers(layer.weight), layer.kernel_size[0]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((len(weight), *x.shape[1:]))
    for i, j in np.ndindex(*x.shape[1:]):
        out[:, i, j] = (weight * padded[None, :, i : i + k, j : j + k]).sum((1, 2, 3))
    return out if layer.bias is None else out + numbers(layer.bias)[:, None, None]


def batch_normed(bn: nn.BatchNorm2d, x: Array) -> Array:
    mean, var, weight, bias = (numbers(t)[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return (x - mean) / np.sqrt(var + bn.eps) * weight + bias


def eca_by_hand(gate: ECA, x: Array) -> Array:
    kernel = numbers(gate.conv.weight)[0, 0]
    means, out = x.mean((1, 2)), x.copy()
    for i in range(len(x)):
        neighbours = [i + offset - len(kernel) // 2 for offset in range(len(kernel))]
        out[i] *= sigmoid(sum(k * means[j] for k, j in zip(kernel, neighbours) if 0 <= j < len(x)))
    return out


def cbam_by_hand(gate: CBAM, x: Array) -> Array:
    w0, w1 = numbers(gate.l1.weight), numbers(gate.l2.weight)
    branches = [w1 @ np.maximum(w0 @ pooled, 0) for pooled in (x.mean((1, 2)), x.max((1, 2)))]
    y = x * sigmoid(branches[0] + branches[1])[:, None, None]
    return y * sigmoid(convolved(gate.conv, np.stack((y.mean(0), y.max(0)))))


def coordatt_by_hand(gate: CoordAtt, x: Array) -> Array:
    """Row and column descriptors one by one."""

    def strip(pooled: Array, last: nn.Conv2d) -> Array:
        y = batch_normed(gate.conv.bn, convolved(gate.conv.conv, pooled[:, :, None]))
        return sigmoid(convolved(last, y * np.clip(y + 3, 0, 6) / 6))[:, :, 0]

    rows, columns = strip(x.mean(2), gate.rows), strip(x.mean(1), gate.columns)
    out = np.empty_like(x)
    for c, i, j in np.ndindex(*x.shape):
        out[c, i, j] = x[c, i, j] * rows[c, i] * columns[c, j]
    return out


def scse_by_hand(gate: SCSE, x: Array) -> Array:
    channel = sigmoid(numbers(gate.l2.weight) @ np.maximum(numbers(gate.l1.weight) @ x.mean((1, 2)), 0))
    by_channel = np.stack([g * plane for g, plane in zip(channel, x)])
    weight = numbers(gate.conv.weight)[0, :, 0, 0]
    by_position = np.empty_like(x)
    for i, j in np.ndindex(*x.shape[1:]):
        by_position[:, i, j] = x[:, i, j] * sigmoid(weight @ x[:, i, j])
    return by_channel + by_position


def simam_by_hand(gate: SimAM, x: Array) -> Array:
    """Equation 5 as it stands, the energy of which the gate is the inverse's sigmoid."""
    out = np.empty_like(x)
    for c, i, j in np.ndindex(*x.shape):
        t, mean, variance = x[c, i, j], x[c].mean(), x[c].var(ddof=1)
        energy = 4 * (variance + gate.e_lambda) / ((t - mean) ** 2 + 2 * variance + 2 * gate.e_lambda)
        out[c, i, j] = t * sigmoid(1 / energy)
    return out


def globalcontext_by_hand(gate: GlobalContext, x: Array) -> Array:
    positions = [x[:, i, j] for i, j in np.ndindex(*x.shape[1:])]
    key = numbers(gate.key.weight)[0, :, 0, 0]
    shares = softmax(np.array([key @ position for position in positions]))
    hidden = numbers(gate.l1.weight) @ sum(share * position for share, position in zip(shares, positions))
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + gate.norm.eps)
    hidden = np.maximum(hidden * numbers(gate.norm.weight) + numbers(gate.norm.bias), 0)
    return x + (numbers(gate.l2.weight) @ hidden)[:, None, None]


def ema_by_hand(gate: EMA, x: Array) -> Array:
    parts = []
    for part in np.split(x, gate.groups):
        rows = sigmoid(convolved(gate.conv1, part.mean(2)[:, :, None]))
        columns = sigmoid(convolved(gate.conv1, part.mean(1)[:, None, :]))
        y = part * rows * columns
        y = (y - y.mean((1, 2), keepdims=True)) / np.sqrt(y.var((1, 2), keepdims=True) + gate.norm.eps)
        y = y * numbers(gate.norm.weight)[:, None, None] + numbers(gate.norm.bias)[:, None, None]
        z = convolved(gate.conv3, part)
        y_share, z_share = softmax(y.mean((1, 2))), softmax(z.mean((1, 2)))
        logits = np.zeros(part.shape[1:])
        for c in range(len(part)):
            logits += y_share[c] * z[c] + z_share[c] * y[c]
        parts.append(part * sigmoid(logits))
    return np.concatenate(parts)


def gam_by_hand(gate: GAM, x: Array) -> Array:
    y = np.empty_like(x)
    for i, j in np.ndindex(*x.shape[1:]):
        hidden = np.maximum(numbers(gate.l1.weight) @ x[:, i, j] + numbers(gate.l1.bias), 0)
        y[:, i, j] = x[:, i, j] * sigmoid(numbers(gate.l2.weight) @ hidden + numbers(gate.l2.bias))
    hidden = np.maximum(batch_normed(gate.cv1.bn, convolved(gate.cv1.conv, y)), 0)
    return y * sigmoid(batch_normed(gate.cv2.bn, convolved(gate.cv2.conv, hidden)))


BY_HAND: dict[str, tuple[int, list[Any], Callable[[Any, Array], Array]]] = {  # channels, further arguments, formula
    "ECA": (16, [5], eca_by_hand),
    "CBAM": (16, [4, 3], cbam_by_hand),
    "CoordAtt": (24, [2], coordatt_by_hand),
    "SCSE": (16, [2], scse_by_hand),
    "SimAM": (8, [0.01], simam_by_hand),
    "GlobalContext": (16, [2], globalcontext_by_hand),
    "EMA": (24, [4], ema_by_hand),
    "GAM": (16, [4], gam_by_hand),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_gate_is_its_papers_formula(name: str) -> None:
    torch.manual_seed(0)
    c, options, by_hand = BY_HAND[name]
    gate, x = stir(GATES[name](c, c, *options)), noise(2, c, 5, 7)
    expected = torch.from_numpy(np.stack([by_hand(gate, numbers(image)) for image in x]))
    torch.testing.assert_close(gate(x).double(), expected, atol=1e-5, rtol=1e-5)


@given(c=st.integers(1, 4096))
@settings(deadline=None)
def test_eca_takes_the_odd_kernel_nearest_to_the_papers_number(c: int) -> None:
    wanted = (np.log2(c) + 1) / 2
    nearest = min(range(1, 15, 2), key=lambda k: (abs(k - wanted), -k))
    assert ECA(c, c).conv.kernel_size == (nearest,)


def test_sizes_follow_from_the_channels() -> None:
    assert [CoordAtt(c, c).conv.conv.out_channels for c in (64, 512)] == [8, 16]
    assert [GlobalContext(c, c).l1.out_features for c in (16, 64, 256)] == [4, 4, 16]
    assert [EMA(c, c).groups for c in (64, 12, 20, 7, 11)] == [8, 6, 5, 7, 1]
    assert [CBAM(64, 64).l1.out_features, SCSE(64, 64).l1.out_features, GAM(64, 64).l1.out_features] == [4, 32, 16]


def test_ema_of_one_group_takes_one_value_in_training() -> None:
    assert bool(EMA(11, 11).train()(noise(1, 11, 1, 1)).isfinite().all())


def test_global_context_describes_what_it_adds() -> None:
    gate, x = stir(make("GlobalContext")), noise(2, CHANNELS, 5, 7)
    added = (gate(x) - x)[:, :, :1, :1]
    rms = torch.stack([image.norm() / image.numel() ** 0.5 for image in x])
    torch.testing.assert_close(gate.scale(x), 1 + added / rms[:, None, None, None], atol=1e-5, rtol=1e-5)


def test_gam_is_neutral_after_its_batch_norms_are_folded() -> None:
    gate, x = stir(make("GAM")), noise(1, CHANNELS, 5, 7)
    expected = gate(x)
    gate.cv1.fuse_()
    gate.cv2.fuse_()
    torch.testing.assert_close(gate(x), expected, atol=1e-5, rtol=1e-5)
    gate.neutralise_()
    assert torch.equal(gate(x), x * 0.25)


def test_arguments_that_cannot_work_are_refused() -> None:
    for build in (lambda: ECA(16, 16, 4), lambda: CBAM(16, 16, 4, 6), lambda: ECA(16, 16, 0)):
        with pytest.raises(ValueError, match="use an odd number"):
            build()
    with pytest.raises(ValueError, match="has no groups"):
        EMA(16, 16, 0)
    with pytest.raises(ValueError, match="would divide by zero"):
        SimAM(16, 16, 0.0)
    with pytest.raises(ValueError, match="use a whole number from 1"):
        CoordAtt(16, 16, 0)
    for kind in (CBAM, SCSE, GlobalContext, GAM):
        with pytest.raises(ValueError, match="squeeze to none"):
            kind(16, 16, 17)
