"""Gates inside blocks: how a row of a YAML says so, and putting them there.

The row's module is the block's name and the gate's, in one word: `[-1, 3, C3SE, [256]]` is a C3 with SE in it, and so
are C3CBAM, BottleneckECA, C3TRMine for every block that has room (`Gated`) and every gate, pasted classes included.
Arguments are the block's. A mapping may end them: the gate's arguments by name, and `inside`, the place:

    [-1, 3, C3SE, [256, False, {r: 8, gain: 2.0, inside: C3}]]

`inside: Bottleneck` is each residual branch, before the addition (SE paper, https://arxiv.org/abs/1709.01507, figure
3); `inside: C3` the block's first path, before `cv3` joins it with the second. Left out, it is the first of the two
that the block has. There is no class per block and gate: the block is built as without a gate, and the gate put in it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from models import pasted
from models.common import Gate, Gated
from models.grammar import LAYER_ERRORS, first_line
from utils.config import UserError, closest

Classes = Mapping[str, type[nn.Module]]
PLACES = ("Bottleneck", "C3")
WORD = "inside"  # of the place in a row's mapping
PROBE_SIZE = 16  # of the map on which a pasted class is tried


@dataclass(frozen=True)
class Inner:
    """The gate inside a row's block: its class, its place, its arguments as the row states them, and its channels."""

    gate: str
    place: str
    options: dict[str, Any]
    channels: int = 0

    def stated(self, usual: str) -> dict[str, Any]:
        """The mapping that says this in a row of a block whose first place is `usual`; empty where none is needed."""
        return {**self.options, **({} if self.place == usual else {WORD: self.place})}


def text(mapping: Mapping[str, Any]) -> str:
    """A row's mapping as YAML, in the style of the files: `{r: 8, gain: 2.0}`."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in mapping.items())}}}"


def places(block: type[nn.Module] | None) -> tuple[str, ...]:
    """The words for the places inside a block where a gate can be; none for other layers."""
    return block.gate_places if isinstance(block, type) and issubclass(block, Gated) else ()


def split(module: Any, classes: Classes) -> tuple[str, str] | None:
    """The block and the gate that a module's name consists of, of the classes given; None for any other name.

    >>> split("C3SE", graph.layer_classes())
    ('C3', 'SE')
    """
    if not isinstance(module, str) or module in classes:
        return None
    blocks = sorted((name for name, c in classes.items() if places(c) and module.startswith(name)), key=len)
    found = ((name, module[len(name) :]) for name in reversed(blocks))
    return next(((block, gate) for block, gate in found if gate in classes and _is_gate(classes[gate])), None)


def names(classes: Classes) -> list[str]:
    """Every block and gate in one word."""
    gates = [name for name, c in classes.items() if _is_gate(c)]
    return [block + gate for block, c in classes.items() if places(c) for gate in gates]


def _is_gate(layer: type[nn.Module]) -> bool:
    if pasted.is_pasted(layer):
        return pasted.leading(layer) is not None
    return issubclass(layer, Gate)


# ----------------------------------------------------------------------------------------------------------------- rows


def stated(gate: str, block: type[nn.Module], args: list[Any], where: str) -> tuple[list[Any], Inner]:
    """A row's arguments without the mapping that ends them, and the gate that it describes.

    Raises:
        UserError: the place is none of the block's.
    """
    early = next((arg for arg in args[:-1] if isinstance(arg, Mapping)), None)
    if early is not None:
        raise UserError(f"{where}: {early!r} stands before the end of its arguments. Write it last.")
    mapping = dict(args[-1]) if args and isinstance(args[-1], Mapping) else {}
    place = mapping.pop(WORD, places(block)[0])
    check_place(block, place, where)
    return args[:-1] if args and isinstance(args[-1], Mapping) else args, Inner(gate, place, mapping)


def check_place(block: type[nn.Module], place: Any, where: str) -> None:
    """UserError where a block has no such place inside."""
    if place not in places(block):
        fix = " or ".join(places(block))
        why = f": {block.__name__} has no residual branch of maps" if place == PLACES[0] else ""
        raise UserError(f"{where}: '{place}' is no place inside {block.__name__}{why}. Write {fix}.")


def checked(inner: Inner, layer: type[nn.Module], make: Callable[[], nn.Module], where: str) -> Inner:
    """The gate with the channels of its place in the block that `make` builds, which is tried without memory.

    Raises:
        UserError: the block cannot be built or has no such place, or the gate's arguments do not fit.
    """
    known = {p.name: p.default for p in parameters_of(layer)}
    for name in (*inner.options, *(name for name, default in known.items() if default is inspect.Parameter.empty)):
        if name not in known:
            words = [*known, WORD]
            raise UserError(f"{where}: its gate takes {', '.join(words)}, found {name!r}.{closest(name, words)}")
        if name not in inner.options:
            raise UserError(f"{where}: its gate needs '{name}'. End the row's arguments with {{{name}: ...}}.")
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                rooms = rooms_in(make(), inner.place)
        except LAYER_ERRORS as error:
            raise UserError(f"{where}: cannot be built from its arguments: {first_line(error)}.") from None
        if not rooms:
            raise UserError(f"{where}: there is no {inner.place} with room for a gate in it.")
        inner = replace(inner, channels=rooms[0].gate_channels)
        if issubclass(layer, Gate):
            check_arguments(inner.options, inner.channels, where)
        if pasted.is_pasted(layer):
            _try_pasted(inner, layer, where)
            return inner
        try:
            with torch.device("meta"):
                build(inner, layer)
        except LAYER_ERRORS as error:
            raise UserError(f"{where}: inside are {inner.channels} channels: {first_line(error)}.") from None
    return inner


def check_arguments(options: Mapping[str, Any], channels: int, where: str) -> None:
    """UserError where a gate's reduction leaves none of its channels, or its gain is no positive number."""
    reduction, gain = options.get("r", 1), options.get("gain", 1.0)
    if isinstance(reduction, bool) or not isinstance(reduction, int) or not 1 <= reduction <= channels:
        raise UserError(
            f"{where}: a reduction of {reduction!r} leaves none of its {channels} channels. "
            f"Write a whole number from 1 to {channels}."
        )
    if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 < gain < math.inf:
        raise UserError(f"{where}: its gain must be a positive number, found {gain!r}.")


def _try_pasted(inner: Inner, layer: type[nn.Module], where: str) -> None:
    """Run a pasted class on a small map of the place's channels, which it must keep."""
    shape = (1, inner.channels, PROBE_SIZE, PROBE_SIZE)
    made = pasted.output_shape(layer, _arguments(inner, layer), shape, where)
    if made is not None and tuple(made) != shape:
        raise UserError(
            f"{where}: {layer.__name__} makes {made[1]} channels, {made[2]} x {made[3]}, of {inner.channels},"
            f" {PROBE_SIZE} x {PROBE_SIZE}: inside a block a gate must keep its map's shape."
        )


# ------------------------------------------------------------------------------------------------------------- building


def parameters_of(layer: type[nn.Module]) -> list[inspect.Parameter]:
    """The parameters of a gate's class that a row may give: those after the channels."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p for p in inspect.signature(layer).parameters.values() if p.kind in kinds]
    return found[len(_leading(layer)) :]


def _leading(layer: type[nn.Module]) -> tuple[str, ...]:
    return (pasted.leading(layer) or ()) if pasted.is_pasted(layer) else ("c1", "c2")


def _arguments(inner: Inner, layer: type[nn.Module]) -> list[Any]:
    """What the constructor gets, by position: the channels, and the rest up to the last one that the row states."""
    parameters = parameters_of(layer)
    last = max((i for i, p in enumerate(parameters) if p.name in inner.options), default=-1)
    channels = [1 if name == "n" else inner.channels for name in _leading(layer)]
    return [*channels, *(inner.options.get(p.name, p.default) for p in parameters[: last + 1])]


def build(inner: Inner, layer: type[nn.Module]) -> nn.Module:
    """One gate."""
    args = _arguments(inner, layer)
    if not pasted.is_pasted(layer):
        return layer(*args)
    gate = pasted.build(layer, *args)
    gate.register_forward_pre_hook(pasted.contiguous)
    return gate


def rooms_in(layer: nn.Module, place: str) -> list[Gated]:
    """The parts of a layer whose own gate is at this place, in the order in which they run."""
    return [part for part in layer.modules() if isinstance(part, Gated) and part.gate_places[-1] == place]


def put_inside_(layer: nn.Module, inner: Inner, gate: type[nn.Module]) -> None:
    """Put a new gate into each room of a built layer, in place."""
    for room in rooms_in(layer, inner.place):
        room.gate = build(inner, gate)


def gates_inside(layer: nn.Module) -> list[nn.Module]:
    """The gates that stand inside a layer's blocks, in the order in which they run."""
    return [part.gate for part in layer.modules() if isinstance(part, Gated) and part.gate is not None]
