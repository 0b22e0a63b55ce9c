"""A model YAML as data: rows with file and line, resolved sources, consumers, channels and strides; nothing is built.

`read` is the one place where a network's description is interpreted. Names come from the table of layer classes and
arguments from a small grammar; no text of a YAML, or of a checkpoint, is ever run.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from models import inside, pasted
from models.common import Gate, Gated, ScaledLayer
from models.grammar import LAYER_ERRORS, literal
from models.inside import Inner
from utils.config import UserError, YamlFile, closest, display_path, find_file, read_yaml

SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}  # depth, width
HEADS = ("Detect", "Segment")
SEVERAL = ("Concat", "Classify", *HEADS)  # layers that read a list
# far above any network: a checkpoint's YAML is not trusted with our time and memory
MAX_CHANNELS, MAX_REPEATS, MAX_LAYERS, MAX_STRIDE = 1 << 16, 1000, 1000, 512
MAX_ANCHORS, MAX_ANCHOR = 100, 1e6  # per level; pixels
# torch's files of layers that no row can use; some make as many parts as a number says
NOT_OF_MAPS = ("rnn", "transformer", "container")
LAZY = "Lazy"  # torch's layers of unknown size begin so


@dataclass(frozen=True)
class Row:
    """One row `[from, number, module, args]`, interpreted."""

    index: int
    line: int  # 1-based; 0 where the network comes from a dict
    file: str
    raw_from: int | list[int]  # as written
    sources: tuple[int, ...]  # absolute layers; -1 is the image
    repeats: int  # after the depth
    module: str
    args: list[Any]  # literals; names and arithmetic resolved, channels not yet scaled; without a gate's mapping
    inputs: tuple[int, ...]  # channels of each source
    channels: int  # of the output; for a head, predictions per cell
    stride: float | None  # input pixels per cell of the output; None where it cannot be known
    consumers: tuple[int, ...] = ()
    inner: Inner | None = None  # the gate inside: of a row C3SE, whose module is C3

    @property
    def name(self) -> str:
        """The module as the YAML has it: `C3SE` where SE is inside."""
        return self.module + (self.inner.gate if self.inner else "")

    @property
    def where(self) -> str:
        """`file:line: layer 10 SE`, the start of every message about this row."""
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: layer {self.index} {self.name}"


@dataclass(frozen=True)
class Graph:
    """A whole network's description. `yaml` is plain data from which `read` makes an equal graph."""

    file: str
    name: str | None  # base name of the YAML, of the asked size; None for a dict
    yaml: dict[str, Any]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def ch(self) -> int:
        """Channels of the image."""
        return int(self.yaml["ch"])

    @property
    def width(self) -> float:
        return float(self.yaml.get("width_multiple", 1.0))

    @property
    def head(self) -> Row:
        """The last row."""
        return self.rows[-1]

    @property
    def save(self) -> list[int]:
        """Sorted layers whose output a later, not the next, row may read; once for every reading."""
        found = []
        for row in self.rows:
            found += [source for f, source in zip(listed(row.raw_from), row.sources) if f != -1]
        return sorted(found)


@cache
def layer_classes() -> dict[str, type[nn.Module]]:
    """Every layer a row may name, except the heads: those of the layer files by class name, torch's as `nn.X`.

    A pasted class comes before one of ours of the same name, in whichever file each of them is.
    """
    found = [
        (name, c)
        for file in pasted.FILES
        for name, c in vars(file).items()
        if _is_layer(c) and c.__module__.split(".")[0] != "torch" and c not in (ScaledLayer, Gate, Gated)
    ]
    ours = dict(sorted(found, key=lambda item: pasted.is_pasted(item[1])))  # of two, the later one stays
    torchs = {f"nn.{name}": c for name, c in vars(nn).items() if _is_layer(c) and not name.startswith(LAZY)}
    return {**ours, **{name: c for name, c in torchs.items() if c.__module__.split(".")[-1] not in NOT_OF_MAPS}}


def _is_layer(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, nn.Module)


def wiring(module: str) -> tuple[str, ...]:
    """What the class of this name declares about its row (models/common.py); transposed convolution counts as ours.

    A pasted class is wired as `conv`, and `repeat` where it takes an n. () where its constructor does not tell.
    """
    if is_pasted(module):
        first = pasted.leading(layer_classes()[module])
        return () if first is None else ("conv", "repeat") if "n" in first else ("conv",)
    return ("conv",) if module == "nn.ConvTranspose2d" else getattr(layer_classes().get(module), "wiring", ())


def is_pasted(module: str) -> bool:
    """Whether the class of this name is one from elsewhere (models/pasted.py)."""
    return module in layer_classes() and pasted.is_pasted(layer_classes()[module])


def leading(module: str) -> tuple[str, ...]:
    """What the builder gives the class of this name before its row's arguments: of c1, c2 and n."""
    if is_pasted(module):
        return pasted.leading(layer_classes()[module]) or ()
    kind = wiring(module)
    return () if not kind else ("c1", "c2", "n") if "repeat" in kind else ("c1", "c2")


def filled(row: Row) -> list[int]:
    """The values of `leading` for a row."""
    values = {"c1": row.inputs[0], "c2": row.channels, "n": row.repeats}
    return [values[name] for name in leading(row.module)]


def free_parameters(module: str) -> list[inspect.Parameter]:
    """The parameters of a class that its row's arguments (after the channels, where it has them) are given to."""
    return list(inspect.signature(layer_classes()[module]).parameters.values())[len(leading(module)) :]


def gates() -> list[str]:
    """Names of the layers that keep what they are given in channels and size, and so can be inserted anywhere."""
    ours = [name for name in layer_classes() if wiring(name) == ("preserve",)]
    others = [name for name, c in layer_classes().items() if is_pasted(name) and pasted.keeps_shape(c)]
    return sorted([*ours, *others])


def keeps_map(graph: Graph, row: Row) -> bool:
    """Whether what a row gives has the channels and the stride of the one layer that it reads."""
    source = graph.rows[row.sources[0]] if row.sources[0] >= 0 else None
    return source is not None and (row.channels, row.stride) == (source.channels, source.stride)


def is_known(module: Any) -> bool:
    """Whether a row may name this module, which may be a block and a gate in one word."""
    return module in HEADS or module in layer_classes() or inside.split(module, layer_classes()) is not None


def same_gate(one: Row, other: Row) -> bool:
    """Whether two rows of one module have the same gate at the same place inside, or both have none."""
    kinds = [(row.inner.gate, row.inner.place) if row.inner else None for row in (one, other)]
    return kinds[0] == kinds[1]


def inner_options(row: Row) -> dict[str, Any]:
    """The arguments of the gate inside a row by name, defaults and place included; empty where there is none."""
    if row.inner is None:
        return {}
    defaults = {p.name: p.default for p in inside.parameters_of(layer_classes()[row.inner.gate])}
    return {**defaults, **row.inner.options, inside.WORD: row.inner.place}


def listed(raw_from: Any) -> list[Any]:
    """A row's `from` as a list."""
    return raw_from if isinstance(raw_from, list) else [raw_from]


def scaled_channels(channels: float, width: float, multiple: int = 8) -> int:
    """Channels times width, rounded up to a multiple."""
    return math.ceil(channels * width / multiple) * multiple


# ---------------------------------------------------------------------------------------------------------------- read


def read(
    cfg: str | Path | Mapping[str, Any], *, ch: int = 3, nc: int | None = None, anchors: float | None = None
) -> Graph:
    """The graph of a model YAML (a path, a bare name, or the name of another size of it) or of an equal dict.

    `ch` holds unless the YAML says `ch`; `nc` and `anchors` (so many per level) replace the YAML's. A dict is left
    as it was. What is unusual but possible becomes a line of `Graph.warnings`.

    Raises:
        UserError: whatever is wrong with the network, naming the file's line.
    """
    file, name = _open(cfg)
    data = file.data
    data["ch"] = data.get("ch", ch)
    if nc is not None:
        data["nc"] = nc
    if anchors:
        data["anchors"] = round(anchors)
    reader = _Reader(file, "checkpoint yaml" if name is None else display_path(file.path))
    return reader.graph(name)


def _open(cfg: str | Path | Mapping[str, Any]) -> tuple[YamlFile, str | None]:
    """The YAML with its lines, safe to change, and its base name; another size is derived from the `s` file."""
    if isinstance(cfg, Mapping):
        return YamlFile(Path("checkpoint yaml"), copy.deepcopy(dict(cfg))), None
    suffixes = (".yaml", ".yml")
    try:
        path = find_file(cfg, ("models",), suffixes)
    except UserError as missing:
        match = re.fullmatch(r"(yolov5)([nsmlx])((?![a-z]).*)", Path(cfg).name)
        if match is None:
            raise
        try:
            path = find_file(Path(cfg).with_name(f"yolov5s{match[3]}"), ("models",), suffixes)
        except UserError:
            raise missing from None
        file = read_yaml(path)
        file.data["depth_multiple"], file.data["width_multiple"] = SIZES[match[2]]
        return file, Path(cfg).name
    return read_yaml(path), path.name


@dataclass
class _Reader:
    """Interprets the rows of one YAML from top to bottom."""

    file: YamlFile
    shown: str
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def graph(self, name: str | None) -> Graph:
        data = self.file.data
        self.depth = self._number("depth_multiple")
        self.width = self._number("width_multiple")
        self.multiple = math.ceil(self._number("channel_multiple", 8))
        if not _is_count(data["ch"]) or not 1 <= data["ch"] <= MAX_CHANNELS:
            raise UserError(f"{self._place('ch')}: 'ch' must be the number of image channels, found {data['ch']!r}.")
        self.names = self._names()
        sections = {section: data.get(section, []) for section in ("backbone", "head")}
        for section, rows in sections.items():
            if not isinstance(rows, list):
                raise UserError(f"{self._place(section)}: '{section}' must be a list of rows.")
        if not any(sections.values()):
            raise UserError(f"{self._place()}: no network: 'backbone' and 'head' hold no rows.")
        for section, rows in sections.items():
            for k, raw in enumerate(rows):
                self.rows.append(self._row(raw, self.file.lines.get((section, k), 0)))
                if sum(row.repeats for row in self.rows) > MAX_LAYERS:
                    raise UserError(f"{self.rows[-1].where}: the rows so far are more than {MAX_LAYERS} layers.")
        readers: list[list[int]] = [[] for _ in self.rows]
        for row in self.rows:
            for source in row.sources:
                if source >= 0:
                    readers[source].append(row.index)
        done = tuple(replace(row, consumers=tuple(r)) for row, r in zip(self.rows, readers))
        return Graph(self.shown, name, data, done, tuple(self.warnings))

    def _place(self, *keys: str) -> str:
        line = self.file.lines.get(keys) if keys else None
        return f"{self.shown}:{line}" if line else self.shown

    def _number(self, key: str, default: float = 1.0) -> float:
        value = self.file.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 64:
            raise UserError(f"{self._place(key)}: '{key}' must be a positive number, found {value!r}.")
        return value

    def _names(self) -> dict[str, Any]:
        """What a row's arguments may name."""
        nc, anchors = self.file.data.get("nc", 80), self.file.data.get("anchors")
        if isinstance(nc, bool) or not isinstance(nc, int) or not 1 <= nc <= MAX_CHANNELS:
            raise UserError(f"{self._place('nc')}: 'nc' must be the number of classes, found {nc!r}.")
        self.file.data["nc"] = nc
        names: dict[str, Any] = {"nc": nc}
        if anchors is not None:
            na = self._anchors_per_level(anchors)
            names.update(anchors=anchors, na=na, no=na * (nc + 5))
        return names

    def _anchors_per_level(self, anchors: Any) -> int:
        if _is_count(anchors) and anchors <= MAX_ANCHORS:
            return int(anchors)
        good = isinstance(anchors, list) and anchors and all(isinstance(level, list) for level in anchors)
        if good:
            numbers = [value for level in anchors for value in _flat(level)]
            lengths = {len(_flat(level)) for level in anchors}
            good = all(isinstance(v, (int, float)) and 0 <= v <= MAX_ANCHOR for v in numbers) and lengths != {0}
            good = good and len(lengths) == 1
            if good and not min(lengths) % 2 and min(lengths) <= 2 * MAX_ANCHORS:
                return min(lengths) // 2
        raise UserError(
            f"{self._place('anchors')}: 'anchors' must hold one list of width, height pairs per level, all equally "
            "long, or the number of anchors per level."
        )

    def _row(self, raw: Any, line: int) -> Row:
        index = len(self.rows)
        place = f"{self.shown}:{line}" if line else self.shown
        if not isinstance(raw, list) or len(raw) != 4 or not isinstance(raw[3], list):
            raise UserError(f"{place}: layer {index} must be [from, number, module, [args]], found {raw!r}.")
        raw_from, number, module, args = raw
        if not isinstance(module, str) or not is_known(module):
            choices = [*layer_classes(), *HEADS, *inside.names(layer_classes())]
            guess = closest(module, choices) or " A class of your own goes to the end of models/common.py."
            raise UserError(f"{place}: layer {index} names an unknown module {module!r}.{guess}")
        where = f"{place}: layer {index} {module}"
        if not _is_count(number) or not number <= MAX_REPEATS:
            raise UserError(f"{where}: its number must be a whole number from 1, found {number!r}.")
        repeats = max(round(number * self.depth), 1) if number > 1 else number
        sources = self._sources(raw_from, where, index)
        inputs = tuple(self.rows[s].channels if s >= 0 else self.file.data["ch"] for s in sources)
        args, inner, block = literal(args, self.names, where), None, module
        if found := inside.split(module, layer_classes()):
            block, gate = found
            args, inner = inside.stated(gate, layer_classes()[block], args, where)
        elif inside.places(layer_classes().get(module)) and any(isinstance(arg, Mapping) for arg in args):
            raise UserError(f"{where}: {args[-1]!r} is for a gate inside. Name it with the block, such as {module}SE.")
        row = Row(index, line, self.shown, raw_from, sources, repeats, block, args, inputs, 0, None, inner=inner)
        if len(sources) > 1 and module not in SEVERAL:
            raise UserError(f"{where}: reads {len(sources)} layers, but takes one. Join them with a Concat row first.")
        self._warn(row)
        if module in HEADS:
            if repeats > 1:
                raise UserError(f"{where}: a head stands once: write 1 for its number, found {number!r}.")
            return self._head(row)
        if is_pasted(module):
            return self._pasted(row)
        try:
            row = replace(row, channels=self._channels(row))
            if not 1 <= row.channels <= MAX_CHANNELS:
                raise ValueError(f"{row.channels} channels come out, expected 1 to {MAX_CHANNELS}")
            row = replace(row, stride=self._stride(row))
        except LAYER_ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where}: its arguments {row.args!r} do not fit: {error}.") from None
        return self._inner(row) if row.inner else row

    def _inner(self, row: Row) -> Row:
        """The row with the channels of the gate inside, which is tried with one block of the row."""
        assert row.inner is not None
        one = replace(row, repeats=1)
        block, gate = (layer_classes()[name] for name in (row.module, row.inner.gate))
        return replace(
            row, inner=inside.checked(row.inner, gate, lambda: block(*filled(one), *one.args[1:]), row.where)
        )

    def _sources(self, raw_from: Any, where: str, index: int) -> tuple[int, ...]:
        sources = []
        for f in listed(raw_from):
            if isinstance(f, bool) or not isinstance(f, int):
                raise UserError(f"{where}: 'from' must be a layer number or a list of them, found {raw_from!r}.")
            source = f if f >= 0 else index + f
            if index == 0 and f != -1:
                raise UserError(f"{where}: the first layer reads the image: write -1, not {f}.")
            if index > 0 and not 0 <= source < index:
                fix = f"Only layers 0 to {index - 1} come before it."
                raise UserError(f"{where}: reads layer {f}, which is not above it. {fix}")
            sources.append(source)
        if not sources:
            raise UserError(f"{where}: 'from' is empty. Write -1 for the row above.")
        return tuple(sources)

    def _warn(self, row: Row) -> None:
        """A head that was not renumbered after an insertion reads Concats; no official network does."""
        for source in listed(row.raw_from):
            if source >= 0 and self.rows[source].module == "Concat":
                fix = f": did you mean {source + 1}?" if source + 1 < row.index else "."
                self.warnings.append(
                    f"{row.where} reads layer {source}, a Concat. A row inserted above shifts later numbers by one{fix}"
                )

    def _head(self, row: Row) -> Row:
        """The row with its anchors as one list per level; args are then [nc, anchors] or [nc, anchors, nm, npr]."""
        args, levels = list(row.args), len(row.sources)
        if len(args) != (2 if row.module == "Detect" else 4) or not _is_count(args[0]):
            want = "[nc, anchors]" if row.module == "Detect" else "[nc, anchors, 32, 256]"
            raise UserError(f"{row.where}: its arguments must be {want}, found {row.args!r}.")
        if args[1] == "anchors":
            raise UserError(f"{row.where}: the YAML has no 'anchors'. Add a list per level, or a number per level.")
        na = self._anchors_per_level(args[1])
        if _is_count(args[1]):  # placeholders, to be replaced by autoanchor
            args[1] = [list(range(2 * na)) for _ in range(levels)]
        if len(args[1]) != levels:
            raise UserError(f"{row.where}: reads {levels} layers, but 'anchors' has {len(args[1])} levels.")
        args[1] = [_flat(level) for level in args[1]]
        masks = 0
        if row.module == "Segment":
            if not _is_count(args[2]) or not _is_count(args[3]):
                raise UserError(f"{row.where}: masks and prototype channels must be numbers, found {args[2:]!r}.")
            masks, args[3] = args[2], scaled_channels(args[3], self.width, self.multiple)
        return replace(row, args=args, channels=na * (args[0] + 5 + masks))

    def _pasted(self, row: Row) -> Row:
        """The row of a pasted class, with its channels as declared, and its stride from running it on a small map.

        Raises:
            UserError: its constructor does not tell what it takes, it cannot be built or run, or what comes out has
                other channels than the row declares.
        """
        layer, received = layer_classes()[row.module], row.inputs[0]
        found = pasted.signature(layer)
        if pasted.leading(layer) is None:
            raise UserError(
                f"{row.where}: {found} does not tell which parameter is its channels. Name the first ones"
                f" {layer.__name__}(c1, c2, ...), channels in and out, or {layer.__name__}(channels, ...)."
            )
        declared = self._scaled(row, ("conv",)) if row.args or "c2" in leading(row.module) else received
        row = replace(row, channels=declared)
        options_of(row)  # not more than it takes
        above = self.rows[row.sources[0]].stride if row.sources[0] >= 0 else 1.0
        if any(getattr(file, row.module, layer) is not layer for file in pasted.FILES):
            self.warnings.append(f"{row.where}: is {layer.__module__}.{layer.__name__}; ours of this name is not used.")
        size = 16 if above is None else max(1, min(64, round(256 / above)))
        shape = pasted.output_shape(layer, [*filled(row), *row.args[1:]], (1, received, size, size), row.where)
        if shape is None:
            return row
        if shape[1] != declared:
            fits = round(shape[1] / self.width)
            rest = "".join(f", {value}" for value in row.args[1:])
            usable = scaled_channels(fits, self.width, self.multiple) == shape[1]
            how = f"{row.args[0]} x width {self.width:.2f}" if row.args else "as many as it receives"
            fix = f"Write [{fits}{rest}]: the first number is its channels, and the arguments of {found} follow."
            raise UserError(
                f"{row.where} declares {declared} channels ({how}) but gives {shape[1]}."
                f" {fix if usable else 'Move the row.'}"
            )
        factors = {size / edge if size % edge == 0 or edge % size == 0 else None for edge in shape[2:]}
        factor = factors.pop() if len(factors) == 1 else None
        if above is None or factor is None:
            return row
        return replace(row, stride=self._bounded(row, above * factor ** min(row.repeats, MAX_STRIDE.bit_length())))

    def _channels(self, row: Row) -> int:
        """Channels of the output."""
        kind, first = wiring(row.module), row.inputs[0]
        if "conv" in kind or "preserve" in kind:
            return self._declared_channels(row, kind)
        options = options_of(row)
        if row.module == "Concat":
            return sum(row.inputs) if options["dimension"] == 1 else first
        if row.module in ("Contract", "Expand"):
            gain = options["gain"] ** 2
            if row.module == "Expand" and first % gain:
                raise UserError(f"{row.where}: {first} channels cannot be divided by {gain}.")
            return first * gain if row.module == "Contract" else first // gain
        for name in ("c1", "in_channels", "num_features"):
            if name in options and row.module != "nn.BatchNorm2d" and options[name] != sum(row.inputs):
                raise UserError(f"{row.where}: takes {options[name]} channels but receives {sum(row.inputs)}.")
        return int(options.get("c2", options.get("out_channels", first)))

    def _scaled(self, row: Row, kind: tuple[str, ...]) -> int:
        """The row's first argument times the width, but for the channels of raw predictions."""
        if not row.args or not _is_count(row.args[0]):
            raise UserError(f"{row.where}: its first argument must be its channels, found {row.args!r}.")
        declared = row.args[0]
        scaled = scaled_channels(declared, self.width, self.multiple)
        if "conv" in kind and declared == self.names.get("no"):
            scaled = declared  # the files' way to end in raw predictions
            if self.width != 1:
                self.warnings.append(f"{row.where}: its {declared} channels equal na * (nc + 5) and are not scaled.")
        if not 1 <= scaled <= MAX_CHANNELS:
            raise UserError(f"{row.where}: {scaled} channels are more than {MAX_CHANNELS}.")
        return scaled

    def _declared_channels(self, row: Row, kind: tuple[str, ...]) -> int:
        scaled = self._scaled(row, kind)
        if "preserve" not in kind:
            return scaled
        declared, received = row.args[0], row.inputs[0]
        if scaled != received:
            fits = round(received / self.width)
            rest = "".join(f", {value}" for value in row.args[1:])
            fix = f"Write [{fits}{rest}], or move the row."
            if scaled_channels(fits, self.width, self.multiple) != received:
                fix = "Move the row."
            how = f"({declared} x width {self.width:.2f})"
            raise UserError(f"{row.where} declares {scaled} channels {how} but receives {received}. {fix}")
        inside.check_arguments(options_of(row), received, row.where)
        return received

    def _stride(self, row: Row) -> float | None:
        """Input pixels per output cell.

        Raises:
            UserError: a Concat of maps of different sizes.
        """
        strides = [self.rows[s].stride if s >= 0 else 1.0 for s in row.sources]
        if row.module == "Concat" and None not in strides and len(set(strides)) > 1:
            parts = ", ".join(f"layer {s} has stride {stride:g}" for s, stride in zip(row.sources, strides))
            raise UserError(f"{row.where}: joins maps of different sizes: {parts}. Read layers of one stride.")
        options = options_of(row)
        factor = _downscale(row.module, options)
        if strides[0] is None or factor is None:
            return None
        return self._bounded(row, strides[0] * factor)

    def _bounded(self, row: Row, stride: float) -> float:
        if not 1 / MAX_STRIDE <= stride <= MAX_STRIDE:
            raise UserError(f"{row.where}: would have stride {stride:g}, expected at most {MAX_STRIDE}.")
        return stride


def options_of(row: Row) -> dict[str, Any]:
    """The row's arguments by their names in the layer's constructor, defaults included, without those that the builder
    fills in (channels, and the number of a `repeat` layer).

    Raises:
        UserError: more arguments than the layer takes.
    """
    parameters = free_parameters(row.module)
    values = row.args[1:] if wiring(row.module) else row.args
    if len(values) > len(parameters) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names = ", ".join(p.name for p in parameters) or "nothing more"
        raise UserError(f"{row.where}: too many arguments {row.args!r}; it takes {names}.")
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **{p.name: value for p, value in zip(parameters, values)}}


def _downscale(module: str, options: Mapping[str, Any]) -> float | None:
    """How many times smaller the output is than the input; None where that depends on more than the arguments."""
    if module == "nn.Upsample" or "upscale_factor" in options:
        scale = options.get("scale_factor") or options.get("upscale_factor")
        return 1 / scale if isinstance(scale, (int, float)) else None
    if "output_size" in options or "downscale_factor" in options:
        return None
    if module in ("Contract", "Expand"):
        return float(options["gain"]) if module == "Contract" else 1 / options["gain"]
    stride = options.get("s", options.get("stride", 1))
    if stride is None:  # torch's pools default to their kernel
        stride = options.get("kernel_size")
    if isinstance(stride, list):
        stride = stride[0] if len(set(stride)) == 1 else None
    if isinstance(stride, bool) or not isinstance(stride, (int, float)) or stride <= 0:
        return None
    if "Transpose" in module:
        return 1 / stride
    return stride * (2.0 if module == "Focus" else 1.0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _flat(level: list[Any]) -> list[Any]:
    """`[[10, 13], [16, 30]]` as `[10, 13, 16, 30]`."""
    return [v for item in level for v in (item if isinstance(item, list) else [item])]
