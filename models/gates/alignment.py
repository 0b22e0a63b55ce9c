"""Which row of one network is which row of another: matched by what the rows are and what they read, not by index.

An inserted row moves the index of every later one. Matched by index, as usual code does, 198 of yolov5n's 349 tensors
survive an SE after SPPF.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from models.graph import HEADS, Graph, Row, inner_options, options_of

ALIGN_ROUNDS = 4  # the second round knows the sources; more only settle ties
IMAGE = -1


def align(source: Graph, target: Graph) -> dict[int, int]:
    """Which row of `target` is which row of `source`: old index -> new index, increasing in both.

    The alignment has the highest sum of `_likeness` over its pairs among all that keep the order (the dynamic programme
    of Needleman and Wunsch, 1970, with free gaps). From the second round on, pairs also count that read the same rows.
    """
    pairs: dict[int, int] = {}
    for round_ in range(ALIGN_ROUNDS):
        sources = _Sources(source, target, pairs) if round_ else None
        found = _best_pairs(source.rows, target.rows, sources)
        if found == pairs:
            break
        pairs = found
    return pairs


def _likeness(old: Row, new: Row) -> float:
    """How much alike two rows are by themselves, 0 for rows that cannot share weights."""
    if old.module != new.module:
        return 3.0 if old.module in HEADS and new.module in HEADS else 0.0
    score = 1.0
    score += 2.0 * (old.module in HEADS or old.args == new.args)
    score += 1.0 * (old.repeats == new.repeats)
    score += 2.0 * (old.channels == new.channels and old.inputs == new.inputs)
    return score + 1.0 * (old.stride == new.stride)


def _best_pairs(old: tuple[Row, ...], new: tuple[Row, ...], sources: _Sources | None) -> dict[int, int]:
    """The order-keeping pairs with the highest total score; of equal ones those nearest to the end."""
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]
    scores = [[_likeness(a, b) for b in new] for a in old]
    if sources is not None:
        scores = [[s + (s > 0) * 3.0 * sources.agreement(i, j) for j, s in enumerate(r)] for i, r in enumerate(scores)]
    for i in range(len(old)):
        for j in range(len(new)):
            paired = best[i][j] + scores[i][j] if scores[i][j] > 0 else 0.0
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], paired)
    pairs, i, j = {}, len(old), len(new)
    while i and j:
        if scores[i - 1][j - 1] > 0 and best[i][j] == best[i - 1][j - 1] + scores[i - 1][j - 1]:
            i, j = i - 1, j - 1
            pairs[i] = j
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return dict(sorted(pairs.items()))


class _Sources:
    """What rows of two networks read, in terms of the rows they share: inserted and removed rows are looked through."""

    def __init__(self, source: Graph, target: Graph, pairs: Mapping[int, int]) -> None:
        self.source, self.target, self.pairs = source, target, pairs
        self.back = {new: old for old, new in pairs.items()}
        self._old = _origins(source.rows, pairs)
        self._new = _origins(target.rows, {new: new for new in pairs.values()})

    def agrees(self, old: int, new: int) -> list[bool]:
        """Per source of row `new` of the target, whether row `old` of the source network reads the same there."""
        before, now = self.source.rows[old].sources, self.target.rows[new].sources
        return [k < len(before) and bool(self._old[before[k]] & self._new[f]) for k, f in enumerate(now)]

    def agreement(self, old: int, new: int) -> float:
        """The share of sources that are the same, 0..1."""
        longest = max(len(self.source.rows[old].sources), len(self.target.rows[new].sources))
        return sum(self.agrees(old, new)) / longest

    def expected(self, old: int) -> list[int | None]:
        """What the row that matches `old` would read in the target: the row itself, or the gates inserted behind it."""
        result: list[int | None] = []
        for f in self.source.rows[old].sources:
            new = next(iter(self._old[f]), None)
            result.append(None if new is None else self._behind(new))
        return result

    def _behind(self, new: int) -> int:
        """The last of the inserted rows that follow row `new` one after the other and keep its shape."""
        for row in self.target.rows[new + 1 :]:
            shape = self.target.rows[new] if new != IMAGE else None
            same = shape is not None and (row.channels, row.stride) == (shape.channels, shape.stride)
            if row.index not in self.back and row.sources == (new,) and same:
                new = row.index
        return new


def _origins(rows: Iterable[Row], shared: Mapping[int, int]) -> dict[int, set[int]]:
    """For each row, the shared rows (by their new index) it is, or that reach it through rows that are not shared."""
    origins: dict[int, set[int]] = {IMAGE: {IMAGE}}
    for row in rows:
        through = set().union(*(origins[f] for f in row.sources))
        origins[row.index] = {shared[row.index]} if row.index in shared else through
    return origins


def wiring_warnings(source: Graph, target: Graph, pairs: Mapping[int, int], name: str) -> list[str]:
    """One line, with the YAML's line, per shared row that reads other layers than in the checkpoint's own network."""
    sources = _Sources(source, target, pairs)
    lines = []
    for old, new in pairs.items():
        row = target.rows[new]
        expected = sources.expected(old)
        if len(expected) == len(row.sources) and all(sources.agrees(old, new)):
            continue
        wanted = ", ".join("a layer that is gone" if e is None else "the image" if e < 0 else str(e) for e in expected)
        raw = row.raw_from if isinstance(row.raw_from, list) else [row.raw_from]
        usual = [f if f == IMAGE and ok else e for f, e, ok in zip(raw, expected, sources.agrees(old, new))]
        known = len(expected) == len(raw) == len(set(usual)) and None not in usual
        fix = f" Did you mean {usual if len(usual) > 1 else usual[0]}?" if known else ""
        reads = ", ".join(str(f) for f in row.sources)
        lines.append(f"{row.where} reads {reads}; its weights in {name} were trained reading {wanted}.{fix}")
    return lines


def argument_warnings(source: Graph, target: Graph, pairs: Mapping[int, int], name: str) -> list[str]:
    """One line, with the YAML's line, per shared row whose arguments are not those its weights were trained with.

    Rows of other channels are left out: their weights do not fit, which the report tells. So are heads, whose classes
    and anchors are matched by the copy. The activation of the whole network counts as an argument, too.
    """
    lines = []
    before, now = (graph.yaml.get("activation") for graph in (source, target))
    if before != now:
        usual = {None: "none given, which is nn.SiLU()"}
        lines.append(
            f"{target.file}: activation: {usual.get(now, now)}; the weights in {name} were trained with"
            f" {usual.get(before, before)}. The network computes something else until it is trained."
        )
    for old, new in pairs.items():
        a, b = source.rows[old], target.rows[new]
        if a.module != b.module or a.module in HEADS or (a.inputs, a.channels) != (b.inputs, b.channels):
            continue
        trained, given = (_described(row, with_gate=a.inner is not None) for row in (a, b))
        for key in (key for key in given if given[key] != trained.get(key)):
            lines.append(
                f"{b.where} has {key} {given[key]}; its weights in {name} were trained with {key} {trained.get(key)}."
                " Write that to keep what they computed."
            )
    return lines


def _described(row: Row, *, with_gate: bool) -> dict[str, Any]:
    """What a row's weights were trained with, by name; of the gate inside only where the trained one had one."""
    found = {"number (after the depth)": row.repeats, **options_of(row)}
    if not with_gate:
        return found
    kind = {"gate inside": row.inner.gate if row.inner else "none"}
    return {**found, **kind, **{f"{key} of its gate": value for key, value in inner_options(row).items()}}
