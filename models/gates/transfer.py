"""Start one network from the checkpoint of another: align their rows, copy what fits, say what did not and why.

Rows are matched by models.gates.alignment; gates that the checkpoint does not have are made neutral by
models.gates.start, so that the network computes what the checkpoint's computed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models import graph as graphs
from models.checkpoints.files import Checkpoint, load_model, network_yaml, read, save
from models.gates.alignment import align, argument_warnings, wiring_warnings
from models.gates.copying import KEPT_ANCHORS, Copy, RowReport, class_rows, copy_rows, row_reports
from models.gates.start import (
    GATE_STARTS,
    built_elsewhere,
    gain_of,
    gates_in,
    open_gain,
    set_gain_,
    start_gate_,
    takes_gain,
)
from models.graph import Graph, same_gate
from models.pasted import advice
from models.yolo import Config, DetectionModel, build_model
from utils.config import UserError, display_path
from utils.data import load_dataset
from utils.downloads import find_weights
from utils.runtime import LOGGER

PROBE_SIZE = 256  # pixels; a power of two fits every stride

# -------------------------------------------------------------------------------------------------------------- report


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
    placed: int  # tensors of the file that have a place here, whole or in part
    stored: int  # tensors of the file
    warnings: tuple[str, ...] = ()
    gates: tuple[int, ...] = ()  # rows whose gate the file does not have
    head: bool = False  # whether the head has the file's weights, and anchors that they can be used with
    difference: float | None = None  # of the outputs on a probe image, in pixels and scores; None: not comparable

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
            + (f"; outputs differ by {self.difference:.3g} from the file's" if self.difference is not None else "")
        )

    def lines(self) -> list[str]:
        """The whole table: one line per row of either network, then the totals."""
        table = [f"{'old':>4} {'new':>4}  {'module':<18}{'status':<12}{'tensors':>9}  why"]
        for row in self.rows:
            old, new = ("-" if index is None else str(index) for index in (row.old, row.new))
            count = f"{row.copied}/{row.total}"
            table.append(f"{old:>4} {new:>4}  {row.module:<18}{row.status:<12}{count:>9}  {row.why}".rstrip())
        measured = "not comparable" if self.difference is None else f"largest difference {self.difference:.3g}"
        return [
            *table,
            f"{self.placed} of {self.stored} tensors of {self.name} have a place here;"
            f" {self.copied} of {self.total} tensors, {self.percent_parameters:.1f}% of the parameters, come from it",
            f"outputs on a probe image: {measured}",
        ]


# ------------------------------------------------------------------------------------------------------------ transfer


@torch.no_grad()
def transfer(
    model: DetectionModel,
    checkpoint: Checkpoint,
    *,
    mode: str = "aligned",
    gate: str | None = None,
    names: Mapping[int, str] | None = None,
) -> Report:
    """Copy a checkpoint's tensors into a freshly built network, in place.

    Rows are matched by `align`, or by their index with `mode='index'` (what usual code does: equal key and shape). In
    a matched head, boxes and objectness are kept whatever the classes, and each class is matched by its name. Anchors
    are the checkpoint's, unless the YAML states others than the checkpoint's own YAML. A gate whose YAML leaves its
    gain open has the checkpoint's; any other argument that differs in a matched row is a warning. Gates without a
    counterpart are started by `start_gate_`.

    Args:
        model: the network to fill, on any device.
        checkpoint: from `files.read`. One without a YAML is taken to be of the same network as `model`.
        mode: 'aligned' or 'index'.
        gate: how such gates start: 'absorbed', 'gain' or 'random'; None is 'gain', 'absorbed' where the class takes
            none, and 'random' with mode 'index'.
        names: class names of the target; `model.names` if not given.

    Raises:
        UserError: the checkpoint was saved with folded batch norms, or is of a classification network; a neutral start
            is asked for rows matched by index, which leaves nothing for the gate to be neutral about.
    """
    _check_words(mode, gate)
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
    copy = Copy(model.state_dict(), checkpoint, {key for key, _ in model.named_parameters()})
    copy_rows(copy, source, target, pairs, dict(names or model.names), by_class=mode == "aligned")
    _adopt_gains_(model, source, pairs)
    gates = _inserted_gates(model, source, pairs)
    for index in gates:
        copy.why[index] = start_gate_(model, index, gate or _usual_start(model, index, aligned=aligned))
    return Report(
        name,
        row_reports(copy, source, target, pairs),
        len(copy.whole),
        len(copy.partial - copy.whole),
        len(copy.target),
        copy.parameters,
        sum(parameter.numel() for parameter in model.parameters()),
        copy.anchors,
        len(copy.placed),
        len(checkpoint.tensors),
        tuple(_warnings(copy, source, model.graph, pairs, aligned=aligned, bare=bare)),
        tuple(gates),
        head=copy.head and not _placeholders(copy, target),
    )


def _warnings(
    copy: Copy, source: Graph, target: Graph, pairs: Mapping[int, int], *, aligned: bool, bare: bool
) -> list[str]:
    """What in the target would make the copied weights compute something else than in their own network."""
    name = display_path(copy.checkpoint.path)
    lines = _strangers(copy, name, target) if bare else []
    if aligned:
        lines = wiring_warnings(source, target, pairs, name) + argument_warnings(source, target, pairs, name)
    if copy.head and copy.anchors != KEPT_ANCHORS and not _placeholders(copy, target):
        lines.append(
            f"{target.head.where}: its anchors are not those that its weights in {name} were trained with. Write the"
            " anchors of that network to keep what they computed."
        )
    return lines


def _placeholders(copy: Copy, target: Graph) -> bool:
    """Whether the target's anchors still have to be found: its YAML only says how many there are."""
    return copy.anchors != KEPT_ANCHORS and isinstance(target.yaml.get("anchors"), int)


def _adopt_gains_(model: DetectionModel, source: Graph, pairs: Mapping[int, int]) -> None:
    """Give each gate whose YAML leaves its gain open that of the same gate in the checkpoint, in place.

    The gate's weights were trained with it: without it the network computes something else.
    """
    for old, new in pairs.items():
        row, here = source.rows[old], model.graph.rows[new]
        same = row.module == here.module and same_gate(row, here)
        if same and open_gain(model, new) and gain_of(row) != gain_of(here):
            set_gain_(model, new, gain_of(row))


def _usual_start(model: DetectionModel, index: int, *, aligned: bool) -> str:
    return "random" if not aligned else "gain" if takes_gain(model, index) else "absorbed"


def _check_words(mode: str, gate: str | None) -> None:
    if mode not in ("aligned", "index"):
        raise UserError(f"--transfer {mode}: unknown. Write 'aligned' or 'index'.")
    if gate not in (None, *GATE_STARTS):
        raise UserError(f"--gate {gate}: unknown. Write one of {', '.join(GATE_STARTS)}.")
    if mode == "index" and gate in ("absorbed", "gain"):
        raise UserError(f"--gate {gate} needs --transfer aligned: matched by index, the layers behind a gate are lost.")


def _strangers(copy: Copy, name: str, target: Graph) -> list[str]:
    """A warning where tensors without a network do not all fit the one they were taken to be of."""
    stored = len(copy.checkpoint.tensors)
    if len(copy.placed) == stored:
        return []
    return [
        f"{name}: does not say which network it is of, and {stored - len(copy.placed)} of its {stored} tensors do not"
        f" fit {target.file}. Store its own network with it first: 'python models/transfer.py --weights {name} --cfg"
        " <its YAML> --out named.pt'."
    ]


def _inserted_gates(model: DetectionModel, source: Graph, pairs: Mapping[int, int]) -> list[int]:
    """The rows of gates, pasted classes among them, that no row of the checkpoint's network is, or has inside."""
    rows = model.graph.rows
    pairs = {old: new for old, new in pairs.items() if source.rows[old].module == rows[new].module}
    known = {new for old, new in pairs.items() if same_gate(source.rows[old], rows[new])}
    fresh = [row.index for row in rows if row.index not in known]
    return [index for index in fresh if gates_in(model.model[index]) or built_elsewhere(model, index)]


# --------------------------------------------------------------------------------------------------- a network to train


@torch.no_grad()
def output_difference(model: DetectionModel, checkpoint: Checkpoint, names: Mapping[int, str]) -> float | None:
    """The largest difference between the two networks' predictions of a noise image, in pixels and scores.

    In eval mode, on the model's device. Boxes, objectness and the classes of the same name are compared; None where
    the heads have other levels or anchors, or the checkpoint does not say which network it is of.
    """
    if checkpoint.yaml is None:
        return None
    source, training = load_model(checkpoint, next(model.parameters()).device, fuse=False), model.training
    if source.graph.ch != model.graph.ch:
        return None
    noise = torch.Generator().manual_seed(0)
    image = torch.rand(1, model.graph.ch, PROBE_SIZE, PROBE_SIZE, generator=noise).to(next(model.parameters()).device)
    before, after = source(image)[0], model.eval()(image)[0]
    model.train(training)
    if before.shape[:2] != after.shape[:2]:
        return None
    classes = class_rows(checkpoint.names, names, source.head.nc, model.head.nc)
    old = [*range(5), *(5 + index for index in classes.values())]
    new = [*range(5), *(5 + index for index in classes)]
    return float((before[..., old] - after[..., new]).abs().max())


def start_network(
    cfg: Config,
    weights: Path,
    names: Mapping[int, str] | None,
    *,
    mode: str = "aligned",
    gate: str | None = None,
    min_transfer: float = 0,
    anchors: float | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> tuple[DetectionModel, Report | None]:
    """The network of `cfg`, or of the checkpoint itself where `cfg` is empty, started from a checkpoint.

    Args:
        cfg: as in DetectionModel.
        weights: the checkpoint.
        names: class names; None takes the checkpoint's.
        mode: 'aligned', 'index' or 'none' (the checkpoint then only names the network).
        gate: as in `transfer`.
        min_transfer: least percentage of the parameters that must come from the checkpoint.
        anchors, seed: as in DetectionModel.
        verbose: log a line per layer.

    Raises:
        UserError: as `read` and `transfer`; less than `min_transfer` came over.
    """
    if not 0 <= min_transfer <= 100:
        raise UserError(f"--min-transfer {min_transfer:g}: expected a percentage, 0 to 100.")
    checkpoint = read(weights, training=False)
    names = dict(names or checkpoint.names)
    if not cfg:
        LOGGER.info(f"No --cfg: training the network stored in {display_path(weights)}; no YAML file is read.")
    network = cfg or network_yaml(checkpoint)
    model = build_model(network, nc=len(names) or None, anchors=anchors, verbose=verbose, seed=seed)
    model.names = names or model.names
    if mode == "none":
        return model, None
    report = transfer(model, checkpoint, names=model.names, mode=mode, gate=gate)
    if (report.gates or report.warnings) and mode == "aligned":
        report = replace(report, difference=output_difference(model, checkpoint, model.names))
    for warning in report.warnings:
        LOGGER.warning(warning)
    fixes = {}
    for row in report.rows:
        if row.new in report.gates and row.why.startswith("not neutral"):
            LOGGER.warning(f"{model.graph.rows[row.new].where}: {row.why}.")
            if built_elsewhere(model, row.new):
                fixes[row.module] = "\n    ".join(advice(model.gates()[row.new][0]))
    for fix in fixes.values():
        LOGGER.info(fix)
    if report.percent_parameters < min_transfer:
        raise UserError(
            f"--min-transfer {min_transfer:g}: only {report.percent_parameters:.1f}% of the parameters come from"
            f" {report.name}. 'python models/transfer.py' prints what stayed behind, row by row."
        )
    return model, report


# -------------------------------------------------------------------------------------------------------- command line


def run(arguments: Namespace) -> None:
    """What the command line asks for."""
    out = Path(arguments.out)
    if out.exists() and not arguments.exist_ok:
        raise UserError(f"--out {out}: exists already. Choose another name, or add --exist-ok to replace it.")
    names = load_dataset(arguments.data).names if arguments.data else None
    weights = find_weights(arguments.weights)
    model, report = start_network(
        arguments.cfg,
        weights,
        names,
        mode=arguments.transfer,
        gate=arguments.gate,
        min_transfer=arguments.min_transfer,
    )
    assert report is not None
    if report.difference is None:  # measured already where gates were put in
        report = replace(report, difference=output_difference(model, read(weights, training=False), model.names))
    LOGGER.info("\n".join(report.lines()))
    save(
        out,
        {
            "model": _smallest(model, report.gates),
            "yaml": model.yaml,
            "names": dict(model.names),
            "stride": model.stride.tolist(),
        },
    )
    LOGGER.info(f"Saved {display_path(out)}, {out.stat().st_size / 1e6:.1f}MB")


def _smallest(model: DetectionModel, rows: Sequence[int]) -> dict[str, Tensor]:
    """The tensors as fp16, like official files, where that changes no number but those with which new gates start."""
    tensors, found = model.state_dict(), model.gates()
    fresh = {id(t) for index in rows for gate in found.get(index, []) for t in gate.state_dict(keep_vars=True).values()}
    kept = {key for key, t in model.state_dict(keep_vars=True).items() if id(t) not in fresh}
    old = [t for key, t in tensors.items() if t.is_floating_point() and key in kept]
    lossless = all(torch.equal(tensor.half().float(), tensor) for tensor in old)
    return {key: t.half() if lossless and t.is_floating_point() else t for key, t in tensors.items()}
