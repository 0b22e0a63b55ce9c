"""A model YAML with an attention gate inserted as a row: every later number moves along, all other text stays.

A place is a module's name (`SPPF`), with a count from 1 where it is there more than once (`C3:2`), or a row's number.
All places are meant in the file as it is. Gates at one place are chained in the order given.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from models import graph as graphs
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
from utils.config import UserError, closest, display_path
from utils.files import write_texts
from utils.runtime import LOGGER

WORDS = {"r": "reduction", "k": "kernel"}  # for the constructor's names, in a new row's comment
OWN_INDEX = re.compile(r"[ \t\],]*?([ \t]*)#[ \t]*(\d+)(?!\w|\.\d)")  # a comment that begins with a number
LINE_REST = re.compile(r"[ \t]*(,?)(?:[ \t]*#[^\r\n]*)?[ \t]*(?=[\r\n]|\Z)")
LEADING_COMMENTS = re.compile(r"\ufeff?(?:[ \t]*\r?\n)*(?:#[^\r\n]*\r?\n)*")
Value: TypeAlias = int | float | bool | None
Edit: TypeAlias = tuple[int, int, str]  # start and end in a text, and what to write there instead


@dataclass(frozen=True)
class Insertion:
    """A gate, its arguments after the channels, and its place in the file as it was."""

    module: str
    args: tuple[Value, ...]
    kind: str  # after, before or at
    place: str  # C3:2, SPPF, Detect/3 or a row's number

    def __str__(self) -> str:
        return f"{':'.join(map(str, (self.module, *self.args)))}@{self.kind}:{self.place}"

    @property
    def words(self) -> str:
        """`SE after SPPF`, `SE before row 6`."""
        return f"{self.module} {self.kind} {'row ' if self.place[:1].isdigit() else ''}{self.place}"


def parse(spec: str) -> Insertion:
    """The insertion that `SE@after:SPPF` or `SE:16@before:C3:2` stands for."""
    gate, at, where = spec.partition("@")
    module, *args = gate.split(":")
    kind, colon, place = where.partition(":")
    if not (at and colon and module and place and kind in ("after", "before", "at")):
        raise UserError(f"'{spec}': expected MODULE[:ARG...]@after|before|at:PLACE, such as SE:16@after:SPPF.")
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
    """Lines that show every row's number, place, module, channels, stride, readers, and its inputs if numbered."""
    layout = "{:>3}  {:16}  {:13}  {:>8}  {:>6}  {:14}  {}"
    lines = [layout.format("row", "place", "module", "channels", "stride", "read by", "inputs")]
    for row, place in zip(graph.rows, places(graph)):
        stride, readers = "-" if row.stride is None else f"{row.stride:g}", ", ".join(map(str, row.consumers)) or "-"
        inputs = [f"/{i} is {source}" for i, source in enumerate(row.sources, 1)] if row.module in SEVERAL else []
        lines.append(layout.format(row.index, place, row.module, row.channels, stride, readers, ", ".join(inputs)))
    return [line.rstrip() for line in lines]


def _find(graph: Graph, insertion: Insertion) -> tuple[Row, int | None]:
    """The row of a place, and the number from 0 of its input where the place names one."""
    name, slash, number = insertion.place.partition("/")
    row = _find_row(graph, name)
    if not slash:
        return row, None
    if insertion.kind != "before" or row.module not in SEVERAL:
        raise UserError(f"{row.where}: leave out '/{number}': it is for 'before' a row that reads a list.")
    if not number.isdecimal() or not 1 <= int(number) <= len(row.sources):
        raise UserError(f"{row.where}: its inputs are /1 to /{len(row.sources)}, found '/{number}'.")
    return row, int(number) - 1


def _find_row(graph: Graph, name: str) -> Row:
    names, single = places(graph), name.removesuffix(":1")
    if name in names or single in names:
        return graph.rows[names.index(name if name in names else single)]
    if name.isdecimal() and int(name) < len(names):
        return graph.rows[int(name)]
    module, total = name.partition(":")[0], Counter(row.module for row in graph.rows)
    if module in total:
        choices = ", ".join(f"{names[row.index]} (row {row.index})" for row in graph.rows if row.module == module)
        raise UserError(f"{graph.file}: '{name}' is not one row. Choose from {choices}.")
    inside = module in layer_classes() or re.match(r"(?!nn\.)\w+\.", module)
    problem = "is at most a part of other rows, whose inside is not a place" if inside else "is not a row"
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

    def insert_(self, insertion: Insertion) -> None:
        if insertion.module not in gates():
            problem = f"'{insertion.module}' is not a layer.{closest(insertion.module, gates())} Gates"
            if insertion.module in (*layer_classes(), *HEADS):
                problem = f"{insertion.module} may change the channels, so it cannot be inserted; gates"
            raise UserError(f"{problem} are: {', '.join(gates())}.")
        if insertion.kind == "at":
            return self._at_(insertion)
        row, number = _find(self.graph, insertion)
        if insertion.kind == "after":
            return self._after_(insertion, row)
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
        spans.append(_Span(start.index, end.index, numbers, lead, comma, begins and next_line != end.line))
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
        for before in (True, False):
            gates = [gate for gate in network.items if gate.gate and gate.row is row and gate.before == before]
            new_rows = [(new, "" if gap is None else gap + note) for new, note in map(network.new_row, gates)]
            edits += _new_rows(text, span, new_rows, before=before) if gates else []
    return edits


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
    """The text of a model YAML (a path, a bare name, or the name of another size of it) with gates inserted.

    After a row, all that read it read the gate. Before a row, only this row reads it; one with several inputs gets a
    gate on each, or on the one that the place names. At a row, the gate takes the row's number and is read as its -1.

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
    write_texts({file: _apply(text, edits)})


def run(options: Namespace) -> None:
    """Show the places, or insert; the new YAML goes to `--out` or is printed."""
    if options.list_places:
        return print("\n".join(table(graphs.read(options.cfg))))
    if bool(options.module) != bool(options.places):
        raise UserError("--module goes with --after, --before or --at. See the places with --list-places.")
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
