"""Let inserted gates start neutral, and take the constant a neutral gate multiplies by out of the layers behind it.

SE with `l2 = 0` multiplies by exactly 0.5, everywhere. Halving commutes with concatenation, upsampling and pooling, so
it can be followed to the convolutions that read the result, whose weights for those channels are then doubled. Scaling
by powers of two does not round: the network's output stays what it was, bit for bit, until training moves the gate.

All of this is by rows: one that is a gate, or that has gates inside its blocks (models/inside.py), which start alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models import inside
from models.common import Concat, Contract, Expand, Gate
from models.grammar import LAYER_ERRORS
from models.graph import (
    HEADS,
    Row,
    free_parameters,
    inner_options,
    is_pasted,
    keeps_map,
    layer_classes,
    options_of,
)
from models.pasted import explain, is_gate
from models.yolo import DetectionModel

GATE_STARTS = ("absorbed", "gain", "random")
# What these do to a map times a constant is the constant times what they do to the map.
COMMUTING = (nn.Identity, nn.Upsample, nn.MaxPool2d, nn.AvgPool2d, nn.ZeroPad2d)
Edits = list[tuple[nn.Module, Tensor]]


@torch.no_grad()
def start_gate_(model: DetectionModel, index: int, start: str) -> str:
    """Set how the gate in row `index` of a network begins, in place; returns what was done, in words.

    Args:
        model: a network whose other weights are in place.
        index: a row that is a gate, or has gates inside.
        start: 'absorbed' makes it neutral and divides its constant out of the layers that read it; 'gain' makes it
            neutral and multiplies by the constant's inverse in the gate itself; 'random' leaves the gate as built.

    Returns:
        A sentence that begins with 'neutral' where the network now computes what it would without the gate, and with
        'not neutral' where that cannot be had, with the reason; the gate is then as it was built.
    """
    if start == "random":
        return "starts as built, not neutral"
    gates, row = _chain(model, index), model.graph.rows[index]
    name, channels = (row.inner.gate, row.inner.channels) if row.inner else (row.module, row.channels)
    if not gates:
        return "not neutral: starts as built, without 'scale' and 'neutralise_'"
    try:
        known = [neutral_of(gate, channels) for gate in gates]
    except LAYER_ERRORS as error:
        return f"not neutral: its neutralise_ fails: {explain(error)}"
    constants = [constant for constant in known if constant is not None]
    if len(constants) < len(gates):
        if is_pasted(name):
            return "not neutral: after its neutralise_, what forward gives is not one constant times its input"
        return f"not neutral: no weights make {name} a constant"
    if start == "gain":
        if not takes_gain(model, index):
            return f"not neutral: {name} takes no gain in its YAML row; use --gate absorbed"
        for gate in gates:
            gate.neutralise_()
        gain = set_gain_(model, index, 1 / constants[0])
        return f"neutral by its gain of {gain:g}"
    found = [c * gate.gain if isinstance(gate, Gate) else c for c, gate in zip(constants, gates)]
    constant = found[0] if row.inner else math.prod(found)  # gates inside stand side by side, those of a row in a chain
    edits, obstacle = (absorbing_inside if row.inner else absorbing)(model, index, constant)
    if obstacle and constant != 1:
        return f"not neutral: {obstacle} cannot absorb the constant {constant:g}; use --gate gain"
    for gate in gates:
        gate.neutralise_()
    if constant == 1:
        return "neutral by itself"
    for layer, scale in edits:
        _divide_(layer, scale)
    edited = {id(layer) for layer, _ in edits}
    rows = [row for row in model.graph.rows if any(id(part) in edited for part in model.model[row.index].modules())]
    return f"neutral: its constant {constant:g} is absorbed by {', '.join(f'{row.index} {row.name}' for row in rows)}"


def gates_in(layer: nn.Module) -> list[Any]:
    """The gates inside a layer: `Gate`s, and pasted modules that have `scale` and `neutralise_`."""
    return [part for part in layer.modules() if is_gate(part)]


def _chain(model: DetectionModel, index: int) -> list[Any]:
    """The gates that a row is, or that are inside it, where all can be read as gates; else none."""
    layer: Any = model.model[index]
    if model.graph.rows[index].inner:
        parts = inside.gates_inside(layer)
    else:
        parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
    return parts if all(is_gate(part) for part in parts) else []


@torch.no_grad()
def neutral_of(gate: Any, channels: int) -> float | None:
    """The constant that a gate has everywhere once neutral, before its gain; None where no weights make it one.

    For a pasted class it is measured: a copy is made neutral and given maps of this many channels, unlike each other.
    """
    if isinstance(gate, Gate):
        return gate.neutral
    tried = copy.deepcopy(gate).eval()
    tried.neutralise_()
    like = next(iter(tried.parameters()), torch.empty(0))
    noise = torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    x = ((0.5 + noise) * torch.tensor([-3.0, 0.1, 1, 10]).view(4, 1, 1, 1)).to(like)
    ratio = tried.forward(x) / x  # without the hooks of whoever watches the gate
    constant = float(ratio.median())
    return constant if constant and torch.allclose(ratio, torch.full_like(ratio, constant), atol=1e-6) else None


def takes_gain(model: DetectionModel, index: int) -> bool:
    """Whether the YAML of row `index` may state a gain."""
    gates = _chain(model, index)
    return bool(gates) and all(isinstance(gate, Gate) for gate in gates) and "gain" in _arguments(model, index)


def built_elsewhere(model: DetectionModel, index: int) -> bool:
    """Whether row `index` is a pasted class that keeps its map's channels and size, or has such a class inside, but
    cannot be read as a gate."""
    row = model.graph.rows[index]
    kept = row.inner is not None or keeps_map(model.graph, row)
    name = row.inner.gate if row.inner else row.module
    return kept and is_pasted(name) and not gates_in(model.model[index])


# ---------------------------------------------------------------------------------------------------------- absorption


def absorbing(model: DetectionModel, index: int, constant: float) -> tuple[Edits, str]:
    """The layers that must be divided, and by what per input channel, when row `index` gives `constant` times its map.

    Returns:
        Pairs of a convolution and (c,) factors, and ''; or no pairs and the row that stands in the way, with why.
    """
    rows = model.graph.rows
    scales: dict[int, Tensor] = {index: torch.full((rows[index].channels,), constant)}
    edits: Edits = []
    for row in rows[index + 1 :]:
        if not any(source in scales for source in row.sources):
            continue
        layer = model.model[row.index]
        parts = [scales.get(source, torch.ones(c)) for source, c in zip(row.sources, row.inputs)]
        readers = _head_readers(layer, parts) if row.module in HEADS else _readers(layer, parts[0])
        passed = _passed(layer, parts)
        if passed is not None:
            scales[row.index] = passed
        elif readers is not None:
            edits += [(reader, scale) for reader, scale in readers if bool((scale != 1).any())]
        else:
            return [], f"{row.index} {row.module} ({_obstacle(layer)})"
    return edits, ""


def absorbing_inside(model: DetectionModel, index: int, constant: float) -> tuple[Edits, str]:
    """As `absorbing`, when the gates inside row `index` give `constant` times their maps.

    What reads such a map is the next bottleneck, then the block's `cv3`, or the network behind a row of bottlenecks.
    Where a bottleneck adds another map to it there is nothing to divide: the gate scales one part of the sum alone.
    """
    row, layer = model.graph.rows[index], model.model[index]
    assert row.inner is not None
    blocks: list[Any] = list(layer) if isinstance(layer, nn.Sequential) else [layer]
    in_branches, joined = row.inner.place == inside.PLACES[0], hasattr(blocks[0], "cv3")
    branches: list[Any] = list(inside.rooms_in(layer, row.inner.place)) if in_branches else []
    if any(getattr(branch, "add", True) for branch in branches):
        return [], f"{index} {row.name} (its bottlenecks add another map to what the gate gives)"
    readers = branches[1:] if not joined else []
    for block in blocks if joined else []:
        readers += [*(inside.rooms_in(block, row.inner.place)[1:] if in_branches else []), block.cv3]
    edits: Edits = []
    for reader in readers:
        convolution = getattr(reader.cv1 if reader in branches else reader, "conv", reader)  # BottleneckCSP's is bare
        rest = convolution.in_channels - row.inner.channels  # of the block's other path, for `cv3`
        edits.append((convolution, torch.cat((torch.full((row.inner.channels,), constant), torch.ones(rest)))))
    behind, obstacle = ([], "") if joined else absorbing(model, index, constant)
    return edits + behind, obstacle


@torch.no_grad()
def absorb_gain_(model: DetectionModel, index: int) -> str:
    """Give the gate in row `index` a gain of 1 and multiply the layers that read it instead, in place.

    The network computes the same, bit for bit. Returns '', or what stands in the way; the network is then unchanged.
    """
    gates = gates_in(model.model[index])
    if all(gate.gain == 1 for gate in gates):
        return ""
    gain = gates[-1].gain
    if len(gates) > 1:
        return "a gate reads what another one's gain multiplies"
    if math.frexp(gain)[0] != 0.5:
        return f"its gain of {gain:g} is no power of two, so that taking it into other weights would round them"
    edits, obstacle = absorbing(model, index, 1 / gain)
    if obstacle:
        return f"{obstacle} cannot absorb it"
    for layer, scale in edits:
        _divide_(layer, scale)
    set_gain_(model, index, 1.0)
    return ""


def _passed(layer: nn.Module, parts: list[Tensor]) -> Tensor | None:
    """The factors (c,) of a layer's output channels, where the layer lets constants through."""
    if isinstance(layer, nn.Sequential):
        for part in layer:
            passed = _passed(part, parts)
            if passed is None:
                return None
            parts = [passed]
        return parts[0]
    if isinstance(layer, Concat):
        if layer.d == 1:
            return torch.cat(parts)
        return parts[0] if all(torch.equal(part, parts[0]) for part in parts) else None
    if isinstance(layer, (Contract, Expand)):
        uniform = bool((parts[0] == parts[0][0]).all())
        factor = layer.gain**2
        count = len(parts[0]) // factor if isinstance(layer, Expand) else len(parts[0]) * factor
        return parts[0][:1].repeat(count) if uniform else None
    return parts[0] if isinstance(layer, COMMUTING) else None


def _readers(layer: nn.Module, scale: Tensor) -> Edits | None:
    """The convolutions that read a layer's input, with their factors; None where the input also goes elsewhere."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return [(layer, scale.repeat(layer.in_channels // len(scale)))]  # Focus reads every channel four times
    if isinstance(layer, nn.Sequential):
        return _readers(layer[0], scale) if len(layer) else None
    if not isinstance(layer, nn.ModuleList):
        parts = [getattr(layer, name) for name in getattr(layer, "reads", ())]
    else:
        parts = list(layer)
    if getattr(layer, "add", False) or not parts:
        return None
    found: Edits = []
    for part in parts:
        readers = _readers(part, scale)
        if readers is None:
            return None
        found += readers
    return found


def _head_readers(head: Any, parts: list[Tensor]) -> Edits:
    """Each level has a convolution of its own; mask prototypes come from the first level."""
    readers: Edits = list(zip(head.m, parts))
    return readers + (_readers(head.proto, parts[0]) or [] if hasattr(head, "proto") else [])


def _obstacle(layer: nn.Module) -> str:
    if isinstance(layer, nn.Sequential) and len(layer):
        layer = layer[0]
    if isinstance(layer, Gate):
        return "what a gate does depends on the size of its input"
    if getattr(layer, "add", False) or (getattr(layer, "reads", ()) and _readers(layer, torch.ones(1)) is None):
        return "it adds its input to what it makes of it"
    return "its first operation on the input is not a convolution"


def _divide_(layer: Any, scale: Tensor) -> None:
    """Let a convolution give what it gave before its input channels were multiplied by `scale` (c,), in place."""
    scale, weight = scale.to(layer.weight), layer.weight
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out / groups, h, w)
        weight.div_(scale.view(-1, 1, 1, 1))
    else:  # (out, in / groups, h, w): each group of outputs reads its own slice of the inputs
        grouped = weight.unflatten(0, (layer.groups, -1)) / scale.view(layer.groups, 1, -1, 1, 1)
        weight.copy_(grouped.flatten(0, 1))


# ---------------------------------------------------------------------------------------------------------------- gain


def set_gain_(model: DetectionModel, index: int, gain: float) -> float:
    """Give the gates of row `index` a gain, in place: in the layer, in the network's YAML and in its graph.

    Whatever is built from the YAML has the gain, too. The row's gate must take one. Returns the gain.
    """
    row, arguments = model.graph.rows[index], _arguments(model, index)
    position = list(arguments).index("gain") + 1

    def with_gain(args: list[Any]) -> list[Any]:
        filled = [*args, *list(arguments.values())[len(args) - 1 :]]
        return [*filled[:position], gain, *filled[position + 1 :]]

    for gate in gates_in(model.model[index]):
        gate.gain = gain
    if row.inner:
        changed = replace(row, inner=replace(row.inner, options={**row.inner.options, "gain": gain}))
    else:
        changed = replace(row, args=with_gain(row.args))
    yaml = copy.deepcopy(model.yaml)
    raws = [raw for section in ("backbone", "head") for raw in yaml.get(section) or []]
    raws[index][3] = with_mapping(raws[index][3], changed) if row.inner else with_gain(raws[index][3])
    rows = list(model.graph.rows)
    rows[index] = changed
    model.graph = replace(model.graph, yaml=yaml, rows=tuple(rows))
    model.yaml = copy.deepcopy(yaml)
    return gain


def with_mapping(args: list[Any], row: Row) -> list[Any]:
    """The arguments of a row as written, ended by the mapping that describes the gate inside it."""
    assert row.inner is not None
    mapping = row.inner.stated(inside.places(layer_classes()[row.module])[0])
    return [*(arg for arg in args if not isinstance(arg, Mapping)), *([mapping] if mapping else [])]


def open_gain(model: DetectionModel, index: int) -> bool:
    """Whether row `index` has gates whose gain its YAML does not state."""
    row = model.graph.rows[index]
    if not takes_gain(model, index):
        return False
    if row.inner:
        return "gain" not in row.inner.options
    return len(row.args) <= list(_arguments(model, index)).index("gain") + 1


def gain_of(row: Row) -> float:
    """The gain of a row's gate."""
    return float((inner_options(row) if row.inner else options_of(row))["gain"])


def _arguments(model: DetectionModel, index: int) -> dict[str, Any]:
    """The arguments that a row's YAML may give to its gate, with their defaults."""
    row = model.graph.rows[index]
    known = inside.parameters_of(layer_classes()[row.inner.gate]) if row.inner else free_parameters(row.module)
    return {parameter.name: parameter.default for parameter in known}
