"""Start one network from the checkpoint of another: align their rows, copy what fits, say what did not and why.

Matching state-dict keys by index, as usual code does, loses everything behind an inserted row: 198 of yolov5n's 349
tensors survive an SE after SPPF. Here rows are matched by what they are and what they read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models import graph as graphs
from models.checkpoint import Checkpoint, network_yaml
from models.graph import HEADS, Graph, Row
from models.yolo import DetectionModel
from utils.config import UserError, display_path

MAX_ALIGNED_ROWS = 2000  # the alignment takes rows x rows steps; yolov5x6 has 34
ALIGN_ROUNDS = 4  # the second round knows the sources; more only settle ties
FP16_ROUNDING = 2.0**-10  # relative; half of it is the rounding of one number, and the YAML's was rounded too
IMAGE = -1

# ----------------------------------------------------------------------------------------------------------- alignment


def align(source: Graph, target: Graph) -> dict[int, int]:
    """Which row of `target` is which row of `source`: old index -> new index, increasing in both.

    The alignment has the highest sum of `_likeness` over its pairs among all that keep the order (the dynamic programme
    of Needleman and Wunsch, 1970, with free gaps). From the second round on, pairs also count that read the same rows.

    Raises:
        UserError: more than `MAX_ALIGNED_ROWS` rows.
    """
    if max(len(source.rows), len(target.rows)) > MAX_ALIGNED_ROWS:
        raise UserError(f"{target.file}: too many rows to align. Use --transfer index.")
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


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class RowReport:
    """What became of one row: `old` and `new` are its indices, None where a network has no such row."""

    old: int | None
    new: int | None
    module: str
    status: str  # copied, partly, reshaped, new, dropped, no weights
    copied: int  # tensors
    total: int
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `transfer` did. `copied` counts whole tensors, `partial` those of which some rows came over."""

    name: str
    rows: tuple[RowReport, ...]
    copied: int
    partial: int
    total: int
    copied_parameters: int
    parameters: int
    anchors: str
    warnings: tuple[str, ...] = ()

    @property
    def percent_parameters(self) -> float:
        """Share of the target's parameters that come from the checkpoint, 0..100."""
        return 100.0 * self.copied_parameters / max(self.parameters, 1)

    def summary(self) -> str:
        """One line for the log."""
        part = f" and parts of {self.partial}" if self.partial else ""
        fresh = [row for row in self.rows if row.status in ("new", "reshaped", "partly") and row.total]
        rest = ", ".join(f"{row.new} {row.module} ({row.why})" for row in fresh[:6])
        more = f" and {len(fresh) - 6} more" if len(fresh) > 6 else ""
        gone = sum(row.status == "dropped" and row.total > 0 for row in self.rows)
        return (
            f"Transferred {self.copied}/{self.total} tensors{part} from {self.name},"
            f" {self.percent_parameters:.1f}% of the parameters; {self.anchors}"
            + (f"; not or not all from the file: {rest}{more}" if fresh else "")
            + (f"; {gone} of its layers have no place here" if gone else "")
        )

    def lines(self) -> list[str]:
        """The whole table: one line per row of either network."""
        head = f"{'old':>4} {'new':>4}  {'module':<18}{'status':<12}{'tensors':>9}  why"
        return [head] + [
            f"{'-' if r.old is None else r.old:>4} {'-' if r.new is None else r.new:>4}  {r.module:<18}{r.status:<12}"
            f"{f'{r.copied}/{r.total}':>9}  {r.why}".rstrip()
            for r in self.rows
        ]


# ------------------------------------------------------------------------------------------------------------ transfer


@dataclass
class _Copy:
    """The state of one transfer: the target's tensors and what was done to them."""

    target: dict[str, Tensor]
    checkpoint: Checkpoint
    parameter_keys: set[str]
    whole: set[str] = field(default_factory=set)
    partial: set[str] = field(default_factory=set)
    parameters: int = 0
    why: dict[int, str] = field(default_factory=dict)

    def tensor(self, old_key: str, new_key: str) -> str:
        """Copy one tensor if it fits; otherwise the reason why it does not."""
        old, new = self.checkpoint.tensors[old_key], self.target[new_key]
        if old.shape != new.shape:
            return f"shape {tuple(new.shape)} here, {tuple(old.shape)} in the file"
        new.copy_(old)
        self.count(new_key, new.numel(), whole=True)
        return ""

    def count(self, key: str, elements: int, *, whole: bool) -> None:
        (self.whole if whole else self.partial).add(key)
        self.parameters += elements if key in self.parameter_keys else 0


@torch.no_grad()
def transfer(
    model: DetectionModel, checkpoint: Checkpoint, *, mode: str = "aligned", names: Mapping[int, str] | None = None
) -> Report:
    """Copy a checkpoint's tensors into a freshly built network, in place.

    Rows are matched by `align`, or by their index with `mode='index'` (what usual code does: equal key and shape). In
    a matched head, boxes and objectness are kept whatever the classes, and each class is matched by its name. Anchors
    are the YAML's where they differ from the checkpoint's by more than fp16 rounding, else the checkpoint's; a network
    built from the checkpoint's own YAML has the checkpoint's.

    Args:
        model: the network to fill, on any device.
        checkpoint: from `models.checkpoint.read`. One without a YAML is taken to be of the same network as `model`.
        mode: 'aligned' or 'index'.
        names: class names of the target; `model.names` if not given.

    Raises:
        UserError: the checkpoint was saved with folded batch norms, or is of a classification network.
    """
    if mode not in ("aligned", "index"):
        raise UserError(f"--transfer {mode}: unknown. Write 'aligned' or 'index'.")
    name = display_path(checkpoint.path)
    if checkpoint.fused:
        raise UserError(
            f"{name}: saved with its batch norms folded, which cannot be trained on. Give the file before fusing."
        )
    target = model.graph
    bare = checkpoint.yaml is None and checkpoint.task != "classify"
    source = target if bare else graphs.read(network_yaml(checkpoint))
    aligned = mode == "aligned" and not bare
    pairs = align(source, target) if aligned else {i: i for i in range(min(len(source.rows), len(target.rows)))}
    copy = _Copy(model.state_dict(), checkpoint, {key for key, _ in model.named_parameters()})
    anchors = _copy_rows(copy, source, target, pairs, dict(names or model.names), by_class=mode == "aligned")
    rows = _row_reports(copy, source, target, pairs)
    return Report(
        name,
        rows,
        len(copy.whole),
        len(copy.partial - copy.whole),
        len(copy.target),
        copy.parameters,
        sum(parameter.numel() for parameter in model.parameters()),
        anchors,
        tuple(wiring_warnings(source, target, pairs, name)) if aligned else (),
    )


def _prefix(index: int) -> str:
    return f"model.{index}."


def _keys(tensors: Mapping[str, Tensor], index: int) -> list[str]:
    return [key for key in tensors if key.startswith(_prefix(index))]


def _copy_rows(
    copy: _Copy, source: Graph, target: Graph, pairs: Mapping[int, int], names: dict[int, str], *, by_class: bool
) -> str:
    """Copy every matched row; returns what became of the anchors."""
    anchors = "anchors of the YAML"
    for old, new in pairs.items():
        a, b = source.rows[old], target.rows[new]
        heads = a.module in HEADS and b.module in HEADS
        problems = []
        for old_key in _keys(copy.checkpoint.tensors, old):
            rest = old_key[len(_prefix(old)) :]
            new_key = _prefix(new) + rest
            if heads and rest == "anchors":
                if _keep_checkpoint_anchors(copy.checkpoint.tensors[old_key], copy.target.get(new_key), source, target):
                    copy.tensor(old_key, new_key)
                    anchors = "anchors of the checkpoint"
                continue
            if heads and by_class and rest.startswith("m."):
                continue
            if by_class and not _statistics_fit(copy, old_key, new_key):
                continue
            if new_key in copy.target:
                problems.append(copy.tensor(old_key, new_key))
        if heads and by_class:
            problems += _copy_head(copy, a, b, pairs, names)
        copy.why[new] = next((problem for problem in problems if problem), "")
    return anchors


def _statistics_fit(copy: _Copy, old_key: str, new_key: str) -> bool:
    """False for the counter of a batch norm whose statistics do not fit: it has no width, so it always would."""
    if not old_key.endswith(".num_batches_tracked"):
        return True
    old = copy.checkpoint.tensors.get(old_key.replace("num_batches_tracked", "running_mean"))
    new = copy.target.get(new_key.replace("num_batches_tracked", "running_mean"))
    return old is None or new is None or old.shape == new.shape


def _keep_checkpoint_anchors(old: Tensor, new: Tensor | None, source: Graph, target: Graph) -> bool:
    """The house's rule; both (nl, na, 2) in cells. Autoanchor changes a checkpoint's anchors but not its YAML."""
    if new is None or old.shape != new.shape:
        return False
    own_yaml = target.name is None and target.yaml.get("anchors") == source.yaml.get("anchors")
    return own_yaml or bool(((new.cpu() - old).abs() <= FP16_ROUNDING * old.abs()).all())


# ---------------------------------------------------------------------------------------------------------------- head


def _copy_head(copy: _Copy, old: Row, new: Row, pairs: Mapping[int, int], names: dict[int, str]) -> list[str]:
    """Copy the output convolutions of Detect or Segment row by row; returns why something stayed fresh, per level."""
    classes = _class_rows(copy.checkpoint.names, names, old.args[0], new.args[0])
    problems = []
    for level, reads in enumerate(new.sources):
        like = [k for k, f in enumerate(old.sources) if pairs.get(f) == reads]
        if not like and len(old.sources) == len(new.sources):
            like = [level]
        if not like:
            problems.append(f"level {level} has no counterpart")
            continue
        problem = ""
        for part in ("weight", "bias"):
            old_key = f"{_prefix(old.index)}m.{like[0]}.{part}"
            new_key = f"{_prefix(new.index)}m.{level}.{part}"
            if old_key in copy.checkpoint.tensors and new_key in copy.target and not problem.startswith("shape"):
                problem = _copy_outputs(copy, (old_key, new_key), (old, new), classes)
        problems.append(problem)  # a bias fits any width, but means nothing beside another weight
    return problems


def _class_rows(old: Mapping[int, str], new: Mapping[int, str], old_nc: int, new_nc: int) -> dict[int, int]:
    """New class -> old class of the same name. Equal numbers of classes without a name in common keep their places."""
    by_name: dict[str, int] = {}
    for index in range(old_nc):
        by_name.setdefault(old.get(index, str(index)).strip().casefold(), index)
    wanted = {index: new.get(index, str(index)).strip().casefold() for index in range(new_nc)}
    nameless = all(word == str(index) for index, word in wanted.items())
    rows = {} if nameless else {index: by_name[word] for index, word in wanted.items() if word in by_name}
    return {index: index for index in range(new_nc)} if not rows and old_nc == new_nc else rows


def _copy_outputs(copy: _Copy, keys: tuple[str, str], rows: tuple[Row, Row], classes: Mapping[int, int]) -> str:
    """Copy one weight (na * no, c, 1, 1) or bias (na * no,): box, objectness, matched classes, masks if as many."""
    old_key, new_key = keys
    (old_na, old_nc, old_nm), (new_na, new_nc, new_nm) = (_head_sizes(row) for row in rows)
    old, new = copy.checkpoint.tensors[old_key], copy.target[new_key]
    if old_na != new_na or old.shape[1:] != new.shape[1:] or len(old) != old_na * (5 + old_nc + old_nm):
        return f"shape {tuple(new.shape)} here, {tuple(old.shape)} in the file"
    old = old.view(old_na, 5 + old_nc + old_nm, *old.shape[1:])
    out = new.view(new_na, 5 + new_nc + new_nm, *new.shape[1:])
    to = [*range(5), *(5 + index for index in classes)]
    take = [*range(5), *(5 + index for index in classes.values())]
    if old_nm == new_nm:
        to += range(5 + new_nc, 5 + new_nc + new_nm)
        take += range(5 + old_nc, 5 + old_nc + old_nm)
    out[:, to] = old[:, take].to(out)
    copy.count(new_key, out[:, to].numel(), whole=len(to) == out.shape[1])
    missing = new_nc - len(classes)
    if len(to) == out.shape[1]:
        return ""
    return f"{missing} of {new_nc} classes are not in the file" if missing else "other masks"


def _head_sizes(row: Row) -> tuple[int, int, int]:
    """Anchors per level, classes, mask coefficients."""
    masks = row.args[2] if row.module == "Segment" else 0
    return len(row.args[1][0]) // 2, row.args[0], masks


def _row_reports(copy: _Copy, source: Graph, target: Graph, pairs: Mapping[int, int]) -> tuple[RowReport, ...]:
    """Every row of both networks, in the order of the target; dropped rows before the next one that is kept."""
    back = {new: old for old, new in pairs.items()}
    reports: list[RowReport] = []
    dropped = iter([row for row in source.rows if row.index not in pairs])
    pending: Row | None = next(dropped, None)
    for row in target.rows:
        old = back.get(row.index)
        while old is not None and pending is not None and pending.index < old:
            reports.append(_dropped(copy, pending))
            pending = next(dropped, None)
        keys = _keys(copy.target, row.index)
        whole = sum(key in copy.whole for key in keys)
        some = any(key in copy.whole or key in copy.partial for key in keys)
        if old is None:
            status, why = "new", "no such row in the file"
        elif not keys:
            status, why = "no weights", ""
        elif whole == len(keys):
            status, why = "copied", ""
        else:
            status = "partly" if some else "reshaped"
            why = copy.why.get(row.index) or "some tensors are not in the file"
        reports.append(RowReport(old, row.index, row.module, status, whole, len(keys), why))
    while pending is not None:
        reports.append(_dropped(copy, pending))
        pending = next(dropped, None)
    return tuple(reports)


def _dropped(copy: _Copy, row: Row) -> RowReport:
    total: Any = len(_keys(copy.checkpoint.tensors, row.index))
    return RowReport(row.index, None, row.module, "dropped", 0, total, "no such row in the network")
