"""Every gate of the layer table, one's own included, keeps what `Gate` promises; each computes its paper's formula."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import attention
from models.common import Gate
from models.graph import layer_classes
from models.yolo import DetectionModel
from utils.config import UserError

GATES = {name: kind for name, kind in layer_classes().items() if issubclass(kind, Gate)}
PUBLISHED = ("SE", "ECA", "CBAM", "CoordAtt", "SCSE", "SimAM", "GlobalContext", "EMA", "GAM")  # one's own need no paper
NEUTRAL = [name for name, kind in GATES.items() if kind.neutral is not None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
CHANNELS = 64


def make(name: str, **options: Any) -> Gate:
    torch.manual_seed(0)
    return GATES[name](CHANNELS, CHANNELS, **options)


def stir(gate: nn.Module) -> Any:
    """Weights and statistics as after some training: none is at a special value."""
    for parameter in gate.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    for layer in gate.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return gate.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what every gate promises -----------------------------------------------------------------------------------------


def test_the_layer_table_holds_every_gate_but_not_their_base() -> None:
    assert set(PUBLISHED) <= set(GATES) and "Gate" not in GATES


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_gate_cites_its_paper(name: str) -> None:
    assert re.search(r"Paper: [^,]+.*?, (19|20)\d\d,\s+https://(arxiv|doi|proceedings)\S+", GATES[name].__doc__, re.S)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_takes_its_gain_last(name: str) -> None:
    parameters = list(inspect.signature(GATES[name]).parameters.values())
    assert [p.name for p in parameters[:2]] == ["c1", "c2"] and parameters[-1].name == "gain"
    assert parameters[-1].default == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape_hw", [(8, 8), (5, 7), (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_a_gate_keeps_shape_and_type(name: str, shape_hw: tuple[int, int], dtype: torch.dtype) -> None:
    gate, x = stir(make(name)), noise(1, CHANNELS, *shape_hw).to(dtype)
    with torch.no_grad():
        expected, y = gate(x.float()), gate.to(dtype)(x)
        scale = gate.scale(x)
    assert y.shape == x.shape and y.dtype == scale.dtype == dtype
    assert torch.broadcast_shapes(scale.shape, x.shape) == x.shape
    tolerance = {torch.float32: 0.0, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", GATES)
def test_training_takes_any_map_but_a_single_value_where_the_docstring_says_so(name: str) -> None:
    gate = make(name).train()
    for shape in ((1, CHANNELS, 5, 7), (1, CHANNELS, 1, 9), (2, CHANNELS, 1, 1)):
        x = noise(*shape).requires_grad_()
        y = gate(x)
        y.square().sum().backward()
        assert y.shape == shape and bool(x.grad.isfinite().all())
    try:
        assert bool(gate(noise(1, CHANNELS, 1, 1)).isfinite().all())
    except ValueError as error:
        assert "more than 1 value per channel" in str(error)
        assert "more than one 1x1 map" in GATES[name].__doc__


@pytest.mark.parametrize("name", NEUTRAL)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(2, 3), st.integers(1, 6), st.integers(1, 6)),
    magnitude=st.sampled_from([0.0, 1e-4, 1.0, 100.0]),
    shift=st.sampled_from([0.0, -3.0, 50.0]),
)
@settings(max_examples=8, deadline=None)
def test_a_neutral_gate_is_exactly_its_constant(
    name: str, seed: int, shape: tuple[int, int, int], magnitude: float, shift: float
) -> None:
    b, h, w = shape
    x = noise(b, CHANNELS, h, w, seed=seed) * magnitude + shift
    neutral = GATES[name].neutral
    for gain in (1.0, 1 / neutral):
        gate = stir(make(name, gain=gain))
        gate.neutralise_()
        for dtype in DTYPES:
            y = x.to(dtype)
            for training in (False, True):
                cast = copy.deepcopy(gate).to(dtype).train(training)
                assert torch.equal(cast.scale(y).expand_as(y), torch.full_like(y, neutral))
                assert torch.equal(cast(y), y * (neutral * gain))


@pytest.mark.parametrize("name", NEUTRAL)
def test_two_steps_from_neutral_reach_every_weight(name: str) -> None:
    gate, x, wanted = make(name), noise(4, CHANNELS, 6, 5), noise(4, CHANNELS, 6, 5, seed=2)
    gate.neutralise_()
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        (gate(x) * wanted).sum().backward()
        reached |= {key for key, p in gate.named_parameters() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    assert reached == {key for key, _ in gate.named_parameters()}
    assert not torch.equal(gate(x), x * gate.neutral)


@pytest.mark.parametrize("name", sorted(set(GATES) - set(NEUTRAL)))
def test_a_gate_that_cannot_be_neutral_says_so(name: str) -> None:
    assert "cannot be neutral" in GATES[name].__doc__
    with pytest.raises(Exception, match=f"{name} cannot be made neutral"):
        make(name).neutralise_()


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_gate_is_neutral_and_keeps_the_maps_type_in_mixed_precision(name: str) -> None:
    gate, x = stir(make(name)), noise(2, CHANNELS, 5, 7).bfloat16()
    gate.neutralise_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.scale(x).expand_as(x).float(), torch.full(x.shape, gate.neutral))
        assert gate(x).dtype == torch.bfloat16 and torch.equal(gate(x), x * gate.neutral)


@pytest.mark.parametrize("name", [name for name, kind in GATES.items() if kind.top is not None])
@given(seed=st.integers(0, 1000), magnitude=st.sampled_from([0.0, 1.0, 1e4]))
@settings(max_examples=5, deadline=None)
def test_a_scale_stays_between_zero_and_its_top(name: str, seed: int, magnitude: float) -> None:
    gate = stir(make(name))
    scale = gate.scale(noise(2, CHANNELS, 5, 7, seed=seed) * magnitude)
    assert bool((scale >= 0).all()) and bool((scale <= gate.top).all())


@pytest.mark.parametrize("name", GATES)
def test_gain_multiplies(name: str) -> None:
    gate, x = stir(make(name)), noise(2, CHANNELS, 5, 7)
    doubled = copy.deepcopy(gate)
    doubled.gain = 2.0
    torch.testing.assert_close(doubled(x), gate(x) * 2)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_refuses_other_channels(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} keeps its channels"):
        GATES[name](CHANNELS, 2 * CHANNELS)


@pytest.mark.parametrize("name", GATES)
def test_memory_layout_changes_no_number(name: str) -> None:
    gate, x = stir(make(name)), noise(2, CHANNELS, 5, 7)
    y = gate(x)
    last = gate.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_can_be_scripted_and_exported(name: str) -> None:
    gate, x = stir(make(name)), noise(2, CHANNELS, 5, 7)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit's deprecation
        expected = gate(x)
        torch.testing.assert_close(torch.jit.script(gate)(x), expected, atol=1e-6, rtol=1e-5)
        sides = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        program = torch.export.export(gate, (x,), dynamic_shapes=(sides,)).module()
        torch.testing.assert_close(program(x), expected, atol=1e-6, rtol=1e-5)
        other = noise(2, CHANNELS, 9, 4)
        torch.testing.assert_close(program(other), gate(other), atol=1e-6, rtol=1e-5)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operators without a deterministic version raise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GATES)
def test_the_same_input_gives_the_same_bits(name: str, device: str, deterministic: None) -> None:
    gate, x = make(name).to(device), noise(2, CHANNELS, 9, 7).to(device)

    def run() -> list[Tensor]:
        image = x.clone().requires_grad_()
        y = gate(image)
        return [y, *torch.autograd.grad(y.square().sum(), [image, *gate.parameters()], allow_unused=True)]

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))


# --- in a network -----------------------------------------------------------------------------------------------------


def network(*rows: list[Any]) -> DetectionModel:
    """Two convolutions, the rows, Detect; 256 channels times the width are 64."""
    torch.manual_seed(0)
    backbone = [[-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [256, 3, 2]], *rows]
    head = [[[-1], 1, "Detect", ["nc", "anchors"]]]
    sizes = {"nc": 2, "depth_multiple": 0.33, "width_multiple": 0.25, "anchors": [[10, 13, 16, 30]]}
    return DetectionModel({**sizes, "backbone": backbone, "head": head})


def assert_neutral_in_a_network(row: list[Any]) -> None:
    """With the same other weights, the network detects to the bit what it does without the row."""
    plain, gated = network(), network(row)
    gated.model[2].neutralise_()
    for own, layer in zip([gated.model[0], gated.model[1], gated.model[3]], plain.model):
        own.load_state_dict(layer.state_dict())
    images = noise(1, 3, 64, 96)
    assert torch.equal(gated.eval()(images)[0], plain.eval()(images)[0])


@pytest.mark.parametrize("name", GATES)
def test_a_yaml_row_builds_a_gate_that_trains(name: str) -> None:
    model = network([-1, 1, name, [256]])
    gate = model.model[2]
    assert type(gate) is GATES[name]
    before = copy.deepcopy(list(gate.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(level.square().mean() for level in model(noise(2, 3, 64, 64))).backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) and not torch.equal(p, b) for p, b in zip(gate.parameters(), before))


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_gate_with_its_gain_leaves_detections_as_they_were(name: str) -> None:
    options = [p.default for p in list(inspect.signature(GATES[name]).parameters.values())[2:-1]]
    assert_neutral_in_a_network([-1, 1, name, [256, *options, 1 / GATES[name].neutral]])


OWN_GATE = '''
class Spot(Gate):
    """A gate per position, from a convolution of the channels' mean."""

    def __init__(self, c1: int, c2: int, k: int = 3, gain: float = 1.0) -> None:
        super().__init__(c1, c2, gain)
        self.conv = nn.Conv2d(1, 1, k, padding=k // 2)

    def scale(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) in 0..1."""
        return torch.sigmoid(self.conv(x.mean(1, keepdim=True)))

    def neutralise_(self) -> None:
        zero_(self.conv)
'''


@pytest.fixture
def own_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Gate]]:
    """`OWN_GATE` as if it stood in models/attention.py."""
    written = dict(vars(attention))
    exec(OWN_GATE, written)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "Spot", written["Spot"], raising=False)
        layer_classes.cache_clear()
        yield written["Spot"]
    layer_classes.cache_clear()


def test_a_gate_of_ones_own_is_fifteen_lines_and_a_row(own_gate: type[Gate]) -> None:
    assert len(OWN_GATE.strip().splitlines()) <= 15
    gate = network([-1, 1, "Spot", [256, 5, 2.0]]).model[2]
    assert type(gate) is own_gate and gate.conv.kernel_size == (5, 5) and gate.gain == 2.0
    assert_neutral_in_a_network([-1, 1, "Spot", [256, 5, 2.0]])
    with pytest.raises(
        UserError, match=r"layer 2 Spot declares 128 channels .* but receives 64. Write \[256, 5, 2.0\]"
    ):
        network([-1, 1, "Spot", [512, 5, 2.0]])
