"""A model YAML with attention gates put in, as rows or inside blocks: later numbers move along, all other text stays.

A place is a module's name (`SPPF`), with a count from 1 where it is there more than once (`C3:2`), or a row's number.
`every:` before a name means all rows that have it, those of one part of the network with `every:backbone:C3` or
`every:neck:C3` (the neck is all of `head` but its last row), and `every:neck` each row of that part. All places are
meant in the file as it is. Gates at one place are chained in the order given.

Inside blocks (models/inside.py) `every:` may be left out. The name says where in them, and rows that have no such place
are passed over:

- `inside:C3`: every C3-like block, on its first path, before `cv3` joins it with the second; `inside:C3:2` one of them;
- `inside:Bottleneck`: every residual branch, in C3-like blocks and in bare rows, before the addition;
- `inside:6`, `inside:backbone`: numbers and parts name no place: it is what C3SE means, each residual branch. `/C3` or
  `/Bottleneck` behind any place says it: `inside:6/C3`, `inside:C3:2/Bottleneck`.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from models import graph as graphs
from models import inside
from models.grammar import literal
from models.graph import (
    HEADS,
    SEVERAL,
    Graph,
    Row,
    free_parameters,
    gates,
    layer_classes,
    listed,
    scaled_channels,
    wiring,
)
from models.inside import Inner
from utils.config import UserError, closest, display_path
from utils.files import write_texts
from utils.runtime import LOGGER

WORDS = {"r": "reduction", "k": "kernel"}  # for the constructor's names, in a new row's comment
OWN_INDEX = re.compile(r"[ \t\],]*?([ \t]*)#[ \t]*(\d+)(?!\w|\.\d)")  # a comment that begins with a number
LINE_REST = re.compile(r"[ \t]*(,?)(?:[ \t]*#[^\r\n]*)?[ \t]*(?=[\r\n]|\Z)")
LEADING_COMMENTS = re.compile(r"\ufeff?(?:[ \t]*\r?\n)*(?:#[^\r\n]*\r?\n)*")
KINDS = ("after", "before", "at", "inside")
EVERY, PARTS = "every", ("backbone", "neck")
Value: TypeAlias = int | float | bool | None
Edit: TypeAlias = tuple[int, int, str]  # start and end in a text, and what to write there instead


@dataclass(frozen=True)
class Insertion:
    """A gate, its arguments after the channels, and its place in the file as it was."""

    module: str
    args: tuple[Value, ...]
    kind: str  # after, before, at or inside
    place: str  # C3:2, SPPF, Detect/3, every:neck:C3 or a row's number

    def __str__(self) -> str:
        return f"{':'.join(map(str, (self.module, *self.args)))}@{self.kind}:{self.place}"

    @property
    def words(self) -> str:
        """`SE after SPPF`, `SE before row 6`."""
        return f"{self.module} {self.kind} {'row ' if self.place[:1].isdigit() else ''}{self.place}"


def parse(spec: str) -> Insertion:
    """The insertion that `SE@after:SPPF`, `SE:16@before:C3:2` or `SE@inside:Bottleneck` stands for."""
    gate, at, where = spec.partition("@")
    module, *args = gate.split(":")
    kind, colon, place = where.partition(":")
    if not (at and colon and module and place and kind in KINDS):
        raise UserError(f"'{spec}': expected MODULE[:ARG...]@{'|'.join(KINDS)}:PLACE, such as SE:16@after:SPPF.")
    return Insertion(module, tuple(_value(arg) for arg in args), kind, place)


def _value(text: str) -> Value:
    value = literal(text, {})
    if value is None or (isinstance(value, (int, float)) and math.isfinite(value)):
        return value
    raise UserError(f"'{text}' cannot be a gate's argument: expected a number, None, True or False.")


# -------------------------------------------------------------------------------------------------------------- places


def places(graph: Graph) -> list[str]:
    """Each row's place: the module's name, counted from 1 where it is there more than once."""
    modules = [row.module for row in graph.rows]
    counts = [modules[: i + 1].count(module) for i, module in enumerate(modules)]
    return [m if modules.count(m) == 1 else f"{m}:{count}" for m, count in zip(modules, counts)]


def table(graph: Graph) -> list[str]:
    """Lines that show every row's number, place, module, channels, stride, readers, its inputs if numbered, and what is
    inside it; then how several places are named at once."""
    layout = "{:>3}  {:16}  {:13}  {:>8}  {:>6}  {:14}  {}"
    lines = [layout.format("row", "place", "module", "channels", "stride", "read by", "inputs, or places inside")]
    for row, place in zip(graph.rows, places(graph)):
        stride, readers = "-" if row.stride is None else f"{row.stride:g}", ", ".join(map(str, row.consumers)) or "-"
        inputs = [f"/{i} is {source}" for i, source in enumerate(row.sources, 1)] if row.module in SEVERAL else []
        shown = ", ".join(inputs or [f"/{word}" for word in _places_inside(row)])
        lines.append(layout.format(row.index, place, row.name, row.channels, stride, readers, shown))
    return [*(line.rstrip() for line in lines), "", *_groups(graph)]


def _groups(graph: Graph) -> list[str]:
    """Lines that show the names of several places at once."""
    count = Counter(row.module for row in graph.rows if row.module not in HEADS)
    name = max(count, key=lambda module: (bool(inside.places(layer_classes().get(module))), count[module]))
    lines = [f"several rows: after:every:{name}, before:every:{name}; of a part: after:every:neck:{name}"]
    for word in reversed(inside.PLACES):
        found = ", ".join(str(row.index) for row in graph.rows if word in _places_inside(row))
        what = "the first path, before cv3" if word == "C3" else "each residual branch, before the addition"
        lines += [f"inside:{word} ({what}): rows {found}"] if found else []
    return lines


def _places_inside(row: Row) -> tuple[str, ...]:
    return inside.places(layer_classes().get(row.module))


def _find(graph: Graph, insertion: Insertion) -> list[tuple[Row, int | None]]:
    """The rows of a place, and the number from 0 of their input where the place names one."""
    name, slash, number = insertion.place.partition("/")
    first, _, words = name.partition(":")
    rows = _find_rows(graph, words) if first == EVERY else [_find_row(graph, name)]
    for row in rows if slash else []:
        if insertion.kind != "before" or row.module not in SEVERAL:
            raise UserError(f"{row.where}: leave out '/{number}': it is for 'before' a row that reads a list.")
        if not number.isdecimal() or not 1 <= int(number) <= len(row.sources):
            raise UserError(f"{row.where}: its inputs are /1 to /{len(row.sources)}, found '/{number}'.")
    return [(row, int(number) - 1 if slash else None) for row in rows]


def _find_inside(graph: Graph, insertion: Insertion) -> list[tuple[Row, str]]:
    """The rows of a place inside blocks, and the word for the place in each."""
    name, slash, word = insertion.place.removeprefix(f"{EVERY}:").partition("/")
    if slash and word not in inside.PLACES:
        raise UserError(f"{insertion}: inside a block are /{' and /'.join(inside.PLACES)}, found '/{word}'.")
    part, _, module = name.partition(":") if name.partition(":")[0] in PARTS else ("", "", name)
    group = module in layer_classes() or not module  # of several rows; else one row: C3:2, or its number
    named = layer_classes().get(module.partition(":")[0])
    if not word and named is not None:
        word = inside.PLACES[-1] if inside.PLACES[-1] in inside.places(named) else inside.PLACES[0]
    rooms = [f"{row.index} {row.module}" for row in graph.rows if _places_inside(row)]
    fix = f"Rows that have room: {', '.join(rooms) or 'none'}; see --list-places."
    if not group:
        if part:
            raise UserError(f"{insertion}: after '{part}:' comes a module's name alone, such as {part}:C3.")
        row = _find_row(graph, module)
        if not _places_inside(row):
            raise UserError(f"{row.where}: there is no room for a gate inside. {fix}")
        word = word or _places_inside(row)[0]
        inside.check_place(layer_classes()[row.module], word, row.where)
        return [(row, word)]
    rows = [row for row in _rows_of(graph, part) if _places_inside(row) and (not word or word in _places_inside(row))]
    if module not in inside.PLACES and module:
        rows = [row for row in rows if row.module == module]
    if not rows:
        raise UserError(f"{graph.file}: '{insertion.place}' is no place inside a row. {fix}")
    return [(row, word or _places_inside(row)[0]) for row in rows]


def _rows_of(graph: Graph, part: str) -> list[Row]:
    """The rows of a part of the network, or all; never the head itself."""
    end = len(graph.yaml.get("backbone") or [])
    rows = [row for row in graph.rows if row.module not in HEADS]
    return [row for row in rows if not part or (row.index < end) == (part == PARTS[0])]


def _find_rows(graph: Graph, words: str) -> list[Row]:
    """The rows that `C3`, `neck:C3` or `neck` stand for after `every:`."""
    part, _, module = words.partition(":") if words.partition(":")[0] in PARTS else ("", "", words)
    rows = [row for row in _rows_of(graph, part) if row.module == module or (part and not module)]
    if not rows:
        known = list(dict.fromkeys(row.module for row in _rows_of(graph, part)))
        fix = f"{closest(module, known)} Rows there are: {', '.join(known)}."
        raise UserError(f"{graph.file}: 'every:{words}' is no row.{fix}")
    return rows


def _find_row(graph: Graph, name: str) -> Row:
    names, single = places(graph), name.removesuffix(":1")
    if name in names or single in names:
        return graph.rows[names.index(name if name in names else single)]
    if name.isdecimal() and int(name) < len(names):
        return graph.rows[int(name)]
    module, total = name.partition(":")[0], Counter(row.module for row in graph.rows)
    if module in total:
        choices = ", ".join(f"{names[row.index]} (row {row.index})" for row in graph.rows if row.module == module)
        every = f", or every:{module} for all of them" if total[module] > 1 else ""
        raise UserError(f"{graph.file}: '{name}' is not one row. Choose from {choices}{every}.")
    if module in PARTS:
        raise UserError(f"{graph.file}: '{name}' is many rows. Write every:{name}, or every:{module}:C3, say.")
    if inside.PLACES[0] == module and any(module in _places_inside(row) for row in graph.rows):
        first = next(row.index for row in graph.rows if module in _places_inside(row))
        fix = f"For a gate in each write inside:{module}, in those of one row inside:{first}/{module}."
        raise UserError(f"{graph.file}: '{name}' is a part of other rows. {fix}")
    part_only = module in layer_classes() or re.match(r"(?!nn\.)\w+\.", module)
    problem = "is at most a part of other rows, whose inside is not a place" if part_only else "is not a row"
    known = ", ".join(name if count == 1 else f"{name}:1..{count}" for name, count in total.items())
    fix = f"{closest(module, total)} Places: {known}, or a row from 0 to {len(names) - 1}."
    raise UserError(f"{graph.file}: '{name}' {problem}.{fix}")


# -------------------------------------------------------------------------------------------------------------- network


@dataclass(eq=False)
class _Item:
    """A row of the network to be. It knows its sources by identity: their numbers follow from the final order."""

    sources: list[_Item]  # none where it reads the image
    raw: list[int]  # how the sources were written
    row: Row  # itself; of a gate, the old row that it stands next to in the text
    gate: Insertion | None = None
    before: bool = False  # on which side of `row` the gate stands


class _Network:
    """The rows of a graph, among which gates are put."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.items: list[_Item] = []
        for row in graph.rows:
            sources = [self.items[source] for source in row.sources if source >= 0]
            self.items.append(_Item(sources, list(listed(row.raw_from)), row))
        self.old = tuple(self.items)
        self.ends = dict(enumerate(self.items))  # row -> the last gate put after it, or itself
        self.inner: dict[int, Inner] = {}  # row -> the gate put inside it

    def insert_(self, insertion: Insertion) -> None:
        if insertion.module not in gates():
            problem = f"'{insertion.module}' is not a layer.{closest(insertion.module, gates())} Gates"
            if insertion.module in (*layer_classes(), *HEADS):
                problem = f"{insertion.module} may change the channels, so it cannot be inserted; gates"
            raise UserError(f"{problem} are: {', '.join(gates())}.")
        if insertion.kind == "at":
            self._at_(insertion)
        elif insertion.kind == "inside":
            for row, place in _find_inside(self.graph, insertion):
                self._inside_(insertion, row, place)
        elif insertion.kind == "after":
            for row, _ in _find(self.graph, insertion):
                self._after_(insertion, row)
        else:
            for row, number in _find(self.graph, insertion):
                self._before_(insertion, row, number)

    def _inside_(self, insertion: Insertion, row: Row, place: str) -> None:
        there = row.inner or self.inner.get(row.index)
        if there:
            raise UserError(f"{row.where}: has {there.gate} inside already, and one gate fits. Choose another row.")
        known = [parameter.name for parameter in inside.parameters_of(layer_classes()[insertion.module])]
        if len(insertion.args) > len(known):
            raise UserError(f"{insertion}: too many arguments; {insertion.module} takes {', '.join(known)}.")
        self.inner[row.index] = Inner(insertion.module, place, dict(zip(known, insertion.args)))

    def _before_(self, insertion: Insertion, row: Row, number: int | None) -> None:
        if row.index == 0:
            raise UserError(f"{row.where}: reads the image, which a gate cannot weigh. Write after 0 for its output.")
        item = self.old[row.index]
        for i in range(len(item.sources)) if number is None else [number]:
            self._between_(insertion, item, [i], row, before=True)
        if row.module not in SEVERAL:
            item.raw = [-1]

    def _after_(self, insertion: Insertion, row: Row) -> None:
        if not row.consumers:
            raise UserError(f"{row.where}: nobody reads it, so nobody would read the gate. Write before {row.index}.")
        end = self.ends[row.index]
        gate = self.ends[row.index] = _Item([end], [-1], row, insertion)
        for item in self.items:
            item.sources = [gate if source is end else source for source in item.sources]
        self.items.insert(self.items.index(end) + 1, gate)

    def _at_(self, insertion: Insertion) -> None:
        n, last = insertion.place, len(self.graph.rows) - 1
        if not n.isdecimal() or not 1 <= int(n) <= last:
            raise UserError(f"{self.graph.file}: 'at' takes a row from 1 to {last}, found '{n}'.")
        item = self.old[int(n)]
        inputs = [i for i, number in enumerate(listed(item.row.raw_from)) if number == -1]
        if not inputs:
            fix = f"Nobody would read the gate: write after {int(n) - 1}, or before {n}."
            raise UserError(f"{item.row.where}: does not read the row above by -1. {fix}")
        above = self.items[self.items.index(item) - 1]
        self._between_(insertion, item, inputs, above.row, before=above.before)

    def _between_(self, insertion: Insertion, item: _Item, inputs: Sequence[int], row: Row, *, before: bool) -> None:
        """Put a gate directly above an item, next to `row` in the text, to be read as its `inputs`."""
        source = item.sources[inputs[0]]
        gate = _Item([source], [-1], row, insertion, before)
        item.sources = [gate if i in inputs and s is source else s for i, s in enumerate(item.sources)]
        self.items.insert(self.items.index(item), gate)

    def numbers(self, item: _Item) -> list[int]:
        """What to write as the item's `from`: -1 becomes absolute only where the source moved away."""
        index, numbers = self.items.index(item), []
        for raw, source in zip(item.raw, item.sources):
            above = self.items.index(source)
            numbers.append(above - index if raw < -1 or raw == above - index else above)
        return numbers

    def new_row(self, gate: _Item) -> tuple[str, str]:
        """`[-1, 1, SE, [1024, 16]]` and its comment, `# 10: channels, reduction`."""
        assert gate.gate is not None
        module, args = gate.gate.module, gate.gate.args
        values = ", ".join(map(str, (self._declared(gate), *args)))
        names = [parameter.name for parameter in free_parameters(module)]
        named = ", ".join(["channels", *(WORDS.get(name, name) for name in names[: len(args)])])
        return f"[{self.numbers(gate)[0]}, 1, {module}, [{values}]]", f"# {self.items.index(gate)}: {named}"

    def _declared(self, gate: _Item) -> int:
        """The channels to write: what becomes the source's channels when multiplied by the width."""
        source = gate
        while source.gate:
            source = source.sources[0]
        row, width, multiple = source.row, self.graph.width, int(self.graph.yaml.get("channel_multiple", 8))
        choices = [round(row.channels / width), math.floor(row.channels / width)]
        if {"conv", "preserve"} & set(wiring(row.module)) and row.args:
            choices.insert(0, row.args[0])
        for choice in choices:
            if scaled_channels(choice, width, multiple) == row.channels:
                return int(choice)
        fix = f"No number times the width {width:.2f} is that, rounded up to a multiple of {multiple}."
        raise UserError(f"{row.where}: has {row.channels} channels. {fix} Choose another place.")


# ----------------------------------------------------------------------------------------------------------------- text


def _apply(text: str, edits: Sequence[Edit]) -> str:
    """The text after the edits; two at one spot are written in their order."""
    parts, done, newline = [], 0, "\r\n" if "\r\n" in text else "\n"
    for start, end, new in sorted(edits, key=lambda edit: edit[0]):
        parts += [text[done:start], new.replace("\n", newline)]
        done = end
    return "".join([*parts, text[done:]])


def _top_level(text: str) -> dict[str, Any]:
    """The nodes of a file's keys, with their places in the text."""
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    return {key.value: node for key, node in root.value}


@dataclass(frozen=True)
class _Span:
    """Where a row stands in the text."""

    start: int
    end: int
    numbers: list[tuple[int, int]]  # of its `from`
    lead: str  # what a new row on the next line starts with
    comma: str  # what separates the section's rows: none between `- row` lines
    alone: bool  # no other row is on its lines
    module: tuple[int, int]  # of its module
    args: yaml.SequenceNode


def _spans(text: str, graph: Graph) -> list[_Span]:
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
        raise UserError(f"{graph.file}: uses YAML aliases (*name), which an edit of the text breaks. Write them out.")
    sections = _top_level(text)
    nodes = [(row, s.flow_style) for name in ("backbone", "head") if (s := sections.get(name)) for row in s.value]
    next_lines = [node.start_mark.line for node, _ in nodes[1:]] + [-1]
    spans = []
    for row, (node, bracketed), next_line in zip(graph.rows, nodes, next_lines):
        start, end, first = node.start_mark, node.end_mark, node.value[0]
        lead = text[start.index - start.column : start.index]
        begins = re.fullmatch(r"[ \t]*\[?[ \t]*" if bracketed else r"[ \t]*-[ \t]+", lead) is not None
        if not node.flow_style or not (begins or bracketed):
            raise UserError(f"{row.where}: cannot be edited. Write it on a line, `- [from, number, module, [args]]`.")
        froms = first.value if isinstance(first, yaml.SequenceNode) else [first]
        numbers = [(f.start_mark.index, f.end_mark.index) for f in froms]
        lead, comma = (" " * len(lead), ",") if bracketed else (lead, "")
        alone, module = begins and next_line != end.line, (node.value[2].start_mark.index, node.value[2].end_mark.index)
        spans.append(_Span(start.index, end.index, numbers, lead, comma, alone, module, node.value[3]))
    return spans


def _edits(text: str, network: _Network) -> list[Edit]:
    """What to change for the network's gates: their rows, the numbers that point at moved rows, index comments."""
    rows, spans, edits = network.graph.rows, _spans(text, network.graph), list[Edit]()
    matches = [OWN_INDEX.match(text, span.end) for span in spans]
    comments = {row.index: m for row, m in zip(rows, matches) if m and int(m[2]) == row.index}
    # before a new row's comment; None where the file does not number its rows
    gap = next((match[1] or " " for match in comments.values()), None)
    for item, row, span in zip(network.old, rows, spans):
        changes = zip(span.numbers, listed(row.raw_from), network.numbers(item))
        edits += [(*place, str(new)) for place, old, new in changes if old != new]
        if row.index in comments:
            edits.append((*comments[row.index].span(2), str(network.items.index(item))))
        if inner := network.inner.get(row.index):
            edits += [(*span.module, row.module + inner.gate), *_mapping_edit(span.args, inner, row)]
        for before in (True, False):
            gates = [gate for gate in network.items if gate.gate and gate.row is row and gate.before == before]
            new_rows = [(new, "" if gap is None else gap + note) for new, note in map(network.new_row, gates)]
            edits += _new_rows(text, span, new_rows, before=before) if gates else []
    return edits


def _mapping_edit(args: yaml.SequenceNode, inner: Inner, row: Row) -> list[Edit]:
    """What to change in a row's arguments, so that their mapping describes the gate inside."""
    mapping = inner.stated(_places_inside(row)[0])
    if not mapping or not args.value:
        return []
    last = args.value[-1]
    if isinstance(last, yaml.MappingNode):
        return [(last.start_mark.index, last.end_mark.index, inside.text(mapping))]
    return [(last.end_mark.index, last.end_mark.index, f", {inside.text(mapping)}")]


def _new_rows(text: str, span: _Span, rows: Sequence[tuple[str, str]], *, before: bool) -> list[Edit]:
    """Rows next to the one at `span`: on lines of their own, with comments, if that one is; otherwise on its line."""
    rest = LINE_REST.match(text, span.end)
    if before and span.alone:
        lines = [f"{row}{span.comma}{comment}\n{span.lead}" for row, comment in rows]
        return [(span.start, span.start, "".join(lines))]
    if before:
        return [(span.start, span.start, "".join(f"{row}, " for row, _ in rows))]
    if not span.alone or rest is None:
        return [(span.end, span.end, "".join(f", {row}" for row, _ in rows))]
    commas = [span.comma] * (len(rows) - 1) + [rest[1]]  # the last has one if the row above had
    lines = [f"\n{span.lead}{row}{comma}{comment}" for (row, comment), comma in zip(rows, commas)]
    return [(span.end, span.end, "" if rest[1] else span.comma), (rest.end(), rest.end(), "".join(lines))]


def _header(cfg: str | Path, insertions: Sequence[Insertion]) -> str:
    """Comment lines that say what was done and which command does it."""
    first, command = insertions[0], ["python", "models/insert.py", "--cfg", str(cfg)]
    if all((each.module, each.args) == (first.module, first.args) for each in insertions):
        command += ["--module", first.module, *(["--args", *map(str, first.args)] if first.args else [])]
        command += [word for each in insertions for word in (f"--{each.kind}", each.place)]
    else:
        command += [word for each in insertions for word in ("--insert", str(each))]
    line = f"with {', '.join(each.words for each in insertions)}; made by: {shlex.join(command)}"
    wrap = dict(initial_indent="# ", subsequent_indent="#   ", break_long_words=False, break_on_hyphens=False)
    return "".join(f"{part}\n" for part in textwrap.wrap(line, 120, **wrap))  # type: ignore[arg-type]


def insert(cfg: str | Path, insertions: Sequence[Insertion]) -> str:
    """The text of a model YAML (a path, a bare name, or the name of another size of it) with gates put in.

    After a row, all that read it read the gate. Before a row, only this row reads it; one with several inputs gets a
    gate on each, or on the one that the place names. At a row, the gate takes the row's number and is read as its -1.
    Inside a block, the row stays one: C3 becomes C3SE.

    Raises:
        UserError: no such place, not a gate, a gate nobody would read, or a file whose text cannot be edited.
    """
    if not isinstance(cfg, (str, Path)):
        raise UserError("a gate is inserted into a YAML file: give its path or name, not a mapping.")
    if not insertions:
        raise UserError("nothing to insert: give a gate and a place, such as SE:16@after:SPPF.")
    network = _Network(graph := graphs.read(cfg))
    for warning in graph.warnings:
        LOGGER.warning(warning)
    for insertion in insertions:
        network.insert_(insertion)
    text = _text(graph)
    top = next(LEADING_COMMENTS.finditer(text)).end()
    new = _apply(text, [(top, top, _header(cfg, insertions)), *_edits(text, network)])
    _check(new, network)
    return new


def _text(graph: Graph) -> str:
    """The file's text; for another size of it, with that size's multiples."""
    text = Path(graph.file).read_bytes().decode("utf-8")
    if Path(graph.file).name == graph.name:
        return text
    nodes = _top_level(text)
    multiples = {"depth_multiple": str(graph.yaml["depth_multiple"]), "width_multiple": f"{graph.width:.2f}"}
    for key in multiples.keys() - nodes.keys():
        raise UserError(f"{graph.file}: has no '{key}' to change for {graph.name}. Add `{key}: 1.0`.")
    return _apply(text, [(nodes[k].start_mark.index, nodes[k].end_mark.index, v) for k, v in multiples.items()])


def _check(text: str, network: _Network) -> None:
    """Read the new text: the old rows are as they were, every row reads what it should, and gates keep the shape.

    Raises:
        UserError: the gate's arguments do not fit, or with them a pasted class changes the channels or the size.
    """
    try:
        new = graphs.read(yaml.safe_load(text))
    except UserError as error:  # about the gate's arguments, which only a reading can judge
        raise UserError(str(error).replace("checkpoint yaml", f"{network.graph.file} with its gates", 1)) from None
    for row, item in zip(new.rows, network.items, strict=True):
        assert [s for s in row.sources if s >= 0] == [network.items.index(s) for s in item.sources]
        if item.gate is not None:
            before = new.rows[row.sources[0]]
            if (row.channels, row.stride) != (before.channels, before.stride):
                raise UserError(
                    f"{network.graph.file}: {item.gate}: it makes {row.channels} channels at stride {row.stride} of"
                    f" {before.channels} at stride {before.stride}, so it cannot be inserted. Write its row by hand."
                )
        else:
            kept = ("module", "args", "repeats", "inputs", "channels", "stride")
            assert all(getattr(row, name) == getattr(item.row, name) for name in kept), row.where
            put = network.inner.get(item.row.index, item.row.inner)
            assert (put and replace(put, channels=0)) == (row.inner and replace(row.inner, channels=0)), row.where


def write(cfg: str | Path, insertions: Sequence[Insertion], file: str | Path) -> Path:
    """Write what `insert` makes; an old file stays whole until the new one is complete."""
    file = Path(file)
    write_texts({file: insert(cfg, insertions)})
    return file


def write_arguments(file: Path, graph: Graph) -> None:
    """Write the arguments of a graph's rows into the YAML it was read from, where they differ; all other text stays.

    A network that was started from a checkpoint may have gains that its YAML did not state.
    """
    text, written = file.read_bytes().decode("utf-8"), graphs.read(file)
    sections = _top_level(text)
    nodes = [row for name in ("backbone", "head") if (section := sections.get(name)) for row in section.value]
    edits: list[Edit] = []
    for old, new, node in zip(written.rows, graph.rows, nodes, strict=True):
        if old.args != new.args and new.module in gates():
            place = node.value[3]
            edits.append((place.start_mark.index, place.end_mark.index, f"[{', '.join(map(str, new.args))}]"))
        if new.inner and old.inner != new.inner:
            edits += _mapping_edit(node.value[3], new.inner, new)
    write_texts({file: _apply(text, edits)})


def run(options: Namespace) -> None:
    """Show the places, or insert; the new YAML goes to `--out` or is printed."""
    if options.list_places:
        return print("\n".join(table(graphs.read(options.cfg))))
    if bool(options.module) != bool(options.places):
        raise UserError("--module goes with --after, --before, --at or --inside. See the places with --list-places.")
    gate = ":".join([options.module or "", *options.args])
    specs = [f"{gate}@{place}" for place in options.places or []]
    insertions = [parse(spec) for spec in specs + (options.insert or [])]
    if options.out is None:
        return print(insert(options.cfg, insertions), end="")
    out = Path(options.out)
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: expected a file ending in .yaml.")
    if out.exists() and not options.exist_ok:
        raise UserError(f"--out {display_path(out)}: is there already. Choose another name, or add --exist-ok.")
    write(options.cfg, insertions, out)
    LOGGER.info(f"wrote {display_path(out)}: {options.cfg} with {', '.join(each.words for each in insertions)}")
