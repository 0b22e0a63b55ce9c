"""Copying a checkpoint's tensors into the matched rows of another network, the head's output channel by channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from models.checkpoints.files import Checkpoint
from models.graph import HEADS, Graph, Row, same_gate

YAML_ANCHORS, KEPT_ANCHORS = "anchors of the YAML", "anchors of the checkpoint"
FP16_ROUNDING = 2.0**-10  # relative; half of it is the rounding of one number, and the YAML's was rounded too


@dataclass(frozen=True)
class RowReport:
    """What became of one row: `old` and `new` are its indices, None where a network has no such row.

    `module` is as in the YAML: C3SE for a C3 with SE inside.
    """

    old: int | None
    new: int | None
    module: str
    status: str  # copied, partly, reshaped, new, dropped, no weights
    copied: int  # tensors
    total: int
    why: str = ""


@dataclass
class Copy:
    """The state of one transfer: the target's tensors and what was done to them."""

    target: dict[str, Tensor]
    checkpoint: Checkpoint
    parameter_keys: set[str]
    whole: set[str] = field(default_factory=set)
    placed: set[str] = field(default_factory=set)  # keys of the checkpoint
    partial: set[str] = field(default_factory=set)
    parameters: int = 0
    why: dict[int, str] = field(default_factory=dict)
    head: bool = False  # whether every level of the head has the checkpoint's weights
    anchors: str = YAML_ANCHORS

    def tensor(self, old_key: str, new_key: str) -> str:
        """Copy one tensor if it fits; otherwise the reason why it does not."""
        old, new = self.checkpoint.tensors[old_key], self.target[new_key]
        if old.shape != new.shape:
            return f"shape {tuple(new.shape)} here, {tuple(old.shape)} in the file"
        new.copy_(old)
        self.placed.add(old_key)
        self.count(new_key, new.numel(), whole=True)
        return ""

    def count(self, key: str, elements: int, *, whole: bool) -> None:
        (self.whole if whole else self.partial).add(key)
        self.parameters += elements if key in self.parameter_keys else 0


def _prefix(index: int) -> str:
    return f"model.{index}."


def _keys(tensors: Mapping[str, Tensor], index: int) -> list[str]:
    return [key for key in tensors if key.startswith(_prefix(index))]


def copy_rows(
    copy: Copy, source: Graph, target: Graph, pairs: Mapping[int, int], names: dict[int, str], *, by_class: bool
) -> None:
    """Copy every matched row."""
    for old, new in pairs.items():
        a, b = source.rows[old], target.rows[new]
        heads = a.module in HEADS and b.module in HEADS
        problems = []
        for old_key in _keys(copy.checkpoint.tensors, old):
            rest = old_key[len(_prefix(old)) :]
            new_key = _prefix(new) + rest
            if heads and rest == "anchors":
                if _keep_checkpoint_anchors(copy.checkpoint.tensors[old_key], copy.target.get(new_key), a, b):
                    copy.tensor(old_key, new_key)
                    copy.anchors = KEPT_ANCHORS
                continue
            if heads and by_class and rest.startswith("m."):
                continue
            if by_class and not (_statistics_fit(copy, old_key, new_key) and _gate_fits(rest, a, b)):
                continue
            if new_key in copy.target:
                problems.append(copy.tensor(old_key, new_key))
        if heads and by_class:
            problems += _copy_head(copy, a, b, pairs, names)
        copy.why[new] = next((problem for problem in problems if problem), "")
        if heads:
            weights = [f"{_prefix(new)}m.{level}.weight" for level in range(len(b.sources))]
            copy.head = all(key in copy.whole or key in copy.partial for key in weights)


def _statistics_fit(copy: Copy, old_key: str, new_key: str) -> bool:
    """False for the counter of a batch norm whose statistics do not fit: it has no width, so it always would."""
    if not old_key.endswith(".num_batches_tracked"):
        return True
    old = copy.checkpoint.tensors.get(old_key.replace("num_batches_tracked", "running_mean"))
    new = copy.target.get(new_key.replace("num_batches_tracked", "running_mean"))
    return old is None or new is None or old.shape == new.shape


def _gate_fits(rest: str, old: Row, new: Row) -> bool:
    """False for a tensor of a gate inside the block, where the other row has another gate there: SE's are CBAM's, too,
    by name and shape."""
    inner = "gate" in rest.split(".") and new.inner is not None and old.inner is not None
    return not inner or same_gate(old, new)


def _keep_checkpoint_anchors(old: Tensor, new: Tensor | None, source: Row, target: Row) -> bool:
    """Whether the anchors (nl, na, 2) that the head's weights were trained with stay.

    They do unless the target's YAML states others than the checkpoint's own YAML: AutoAnchor changes a checkpoint's
    anchors but not its YAML.
    """
    if new is None or old.shape != new.shape:
        return False
    same_yaml = target.args[1] == source.args[1]
    return same_yaml or bool(((new.cpu() - old).abs() <= FP16_ROUNDING * old.abs()).all())


# ---------------------------------------------------------------------------------------------------------------- head


def _copy_head(copy: Copy, old: Row, new: Row, pairs: Mapping[int, int], names: dict[int, str]) -> list[str]:
    """Copy the output convolutions of Detect or Segment row by row; returns why something stayed fresh, per level."""
    classes = class_rows(copy.checkpoint.names, names, old.args[0], new.args[0])
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


def class_rows(old: Mapping[int, str], new: Mapping[int, str], old_nc: int, new_nc: int) -> dict[int, int]:
    """New class -> old class of the same name. Equal numbers of classes without a name in common keep their places."""
    by_name: dict[str, int] = {}
    for index in range(old_nc):
        by_name.setdefault(old.get(index, str(index)).strip().casefold(), index)
    wanted = {index: new.get(index, str(index)).strip().casefold() for index in range(new_nc)}
    nameless = all(word == str(index) for index, word in wanted.items())
    rows = {} if nameless else {index: by_name[word] for index, word in wanted.items() if word in by_name}
    return {index: index for index in range(new_nc)} if not rows and old_nc == new_nc else rows


def _copy_outputs(copy: Copy, keys: tuple[str, str], rows: tuple[Row, Row], classes: Mapping[int, int]) -> str:
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
    copy.placed.add(old_key)
    copy.count(new_key, out[:, to].numel(), whole=len(to) == out.shape[1])
    missing = new_nc - len(classes)
    if len(to) == out.shape[1]:
        return ""
    return f"{missing} of {new_nc} classes are not in the file" if missing else "other masks"


def _head_sizes(row: Row) -> tuple[int, int, int]:
    """Anchors per level, classes, mask coefficients."""
    masks = row.args[2] if row.module == "Segment" else 0
    return len(row.args[1][0]) // 2, row.args[0], masks


def row_reports(copy: Copy, source: Graph, target: Graph, pairs: Mapping[int, int]) -> tuple[RowReport, ...]:
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
            status, why = "new", copy.why.get(row.index, "no such row in the file")
        elif not keys:
            status, why = "no weights", ""
        elif whole == len(keys):
            status, why = "copied", copy.why.get(row.index, "")  # of a gate without weights inside
        else:
            status = "partly" if some else "reshaped"
            why = copy.why.get(row.index) or "some tensors are not in the file"
        reports.append(RowReport(old, row.index, row.name, status, whole, len(keys), why))
    while pending is not None:
        reports.append(_dropped(copy, pending))
        pending = next(dropped, None)
    return tuple(reports)


def _dropped(copy: Copy, row: Row) -> RowReport:
    total = len(_keys(copy.checkpoint.tensors, row.index))
    return RowReport(row.index, None, row.name, "dropped", 0, total, "no such row in the network")
