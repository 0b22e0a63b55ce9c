"""Checkpoints: read anybody's as data, load them as networks, write our own.

Upstream pickles whole modules. `read` collects their tensors, YAML and class names from the records of the file without
importing or creating any class, so it does not matter what the user's classes are called or where they lie. Our own
files hold tensors and plain data only and open with `torch.load(path, weights_only=True)`.
"""

from __future__ import annotations

import copy
import datetime
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from models import graph as graphs
from models.checkpoints.archive import MAX_DEPTH, MAX_VALUES, Archive
from models.checkpoints.unpickle import Record, StoredTensor
from models.graph import HEADS, Graph, is_known, layer_classes
from models.yolo import DetectionModel, build_model, parse_model
from utils.config import UserError, closest, display_path
from utils.files import replacing

FORMAT = "yolov5-plain"
VERSION = 1
MAX_MODULES = 100_000  # a network of records may refer to itself; yolov5x6 has 575 modules
MAX_NAME = 500  # characters of a tensor's name
MAX_LEVELS = 16
PLAIN = (str, int, float, type(None))
NUMPY_CODES = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "u1": "B", "b1": "?"}


@dataclass
class Checkpoint:
    """What a `.pt` file holds, as tensors and plain data.

    `tensors` is the state dict on the CPU, floating-point tensors as float32, of the EMA where there is one. `yaml` is
    the network as the file stores it; None for a bare state dict and for classification files. `training` is what a run
    of ours goes on from, dtypes unchanged, and None everywhere else.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    yaml: dict[str, Any] | None = None
    names: dict[int, str] = field(default_factory=dict)
    stride: tuple[float, ...] = ()
    task: str = "detect"
    epoch: int = -1
    best_fitness: float | None = None
    ours: bool = False
    opt: dict[str, Any] = field(default_factory=dict)
    hyp: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None

    @property
    def fused(self) -> bool:
        """Whether the batch norms were folded into the convolutions before saving."""
        blocks = [key.removesuffix("conv.bias") for key in self.tensors if key.endswith(".conv.bias")]
        normed = any(key.endswith(".conv.weight") and key[:-11] + "bn.weight" in self.tensors for key in self.tensors)
        return bool(blocks) and not normed

    @property
    def num_classes(self) -> int:
        return len(self.names)


def read(path: str | Path, *, training: bool = True) -> Checkpoint:
    """The checkpoint in a file by us, by upstream v6.0 to HEAD or by `torch.save(model.state_dict())`; runs nothing.

    Args:
        path: the `.pt` file.
        training: also read what a resumed run needs (two thirds of the bytes of our `last.pt`).

    Raises:
        UserError: one line saying what the file is instead, and what to do.
    """
    with Archive(path) as archive:
        content = archive.content
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return _read_ours(archive, content, training=training)
        if isinstance(content, dict) and not _is_state_dict(content):
            chosen = content.get("ema") or content.get("model") or content.get("state_dict")
        else:
            chosen, content = content, {}
        if isinstance(chosen, Record):
            return _read_module(archive, chosen, content)
        if _is_state_dict(chosen):
            return Checkpoint(archive.path, _load_tensors(archive, _without_prefix(chosen)))
        keys = ", ".join(repr(key)[:24] for key in list(content)[:8]) or type(chosen).__name__
        raise UserError(f"{archive.where}: holds no network: no 'model', 'ema' or state dict in it (found: {keys}).")


# ----------------------------------------------------------------------------------------------------- upstream's files


def _is_state_dict(value: Any) -> TypeGuard[dict[str, StoredTensor]]:
    tensors = isinstance(value, dict) and bool(value) and all(isinstance(v, StoredTensor) for v in value.values())
    return tensors and all(isinstance(key, str) and len(key) <= MAX_NAME for key in value)


def _without_prefix(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Keys without the `module.` of DataParallel and the `_orig_mod.` of torch.compile."""
    result = dict(tensors)
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in result):
            result = {key[len(prefix) :]: value for key, value in result.items()}
    return result


def _read_module(archive: Archive, chosen: Record, content: Mapping[str, Any]) -> Checkpoint:
    network = _unwrapped(chosen)
    if network.module.split(".")[0] == "ultralytics":
        raise UserError(
            f"{archive.where}: a {network.name} of the ultralytics package (YOLOv8 or later), another architecture."
            " Give a YOLOv5 checkpoint such as yolov5s.pt."
        )
    tensors = _load_tensors(archive, state_dict(network, archive.where))
    if not tensors:
        raise UserError(f"{archive.where}: holds no network: its {network.name[:60]!r} has no tensors.")
    attributes = network.attributes
    yaml = plain(attributes.get("yaml"), archive.where)
    yaml = yaml if isinstance(yaml, dict) and isinstance(yaml.get("head"), list) else None
    opt, hyp = (plain(value, archive.where) for value in (content.get("opt"), attributes.get("hyp")))
    opt = opt if isinstance(opt, dict) else {}
    return Checkpoint(
        archive.path,
        tensors,
        yaml,
        _names(attributes.get("names"), archive.where),
        _stride(archive, attributes.get("stride")),
        _task(yaml, network),
        epoch=epoch if isinstance(epoch := content.get("epoch"), int) else -1,
        best_fitness=number(content.get("best_fitness")),
        opt=opt,
        hyp=next((h for h in (opt.get("hyp"), hyp) if isinstance(h, dict)), {}),  # `opt` keeps it unscaled
    )


def _unwrapped(record: Record) -> Record:
    """The network inside DataParallel (`module`), torch.compile (`_orig_mod`) or a wrapper of upstream's (`model`)."""
    for _ in range(8):
        if "yaml" in record.attributes:
            break
        children = record.attributes.get("_modules")
        children = children if isinstance(children, dict) else {}
        inner = [children[key] for key in ("module", "_orig_mod") if isinstance(children.get(key), Record)]
        model = children.get("model")
        if isinstance(model, Record) and model.name not in ("Sequential", "ModuleList"):
            inner.append(model)
        if not inner:
            break
        record = inner[0]
    return record


def state_dict(module: Record, where: str = "") -> dict[str, StoredTensor]:
    """Key -> tensor of a recorded module, in `torch.nn.Module.state_dict`'s order: parameters, buffers, children."""
    tensors: dict[str, StoredTensor] = {}
    visited = 0

    def collect(record: Record, prefix: str, depth: int) -> None:
        nonlocal visited
        visited += 1
        if depth > MAX_DEPTH or visited > MAX_MODULES:
            raise UserError(f"{where}: refused: its modules contain each other without end.")
        attributes = record.attributes
        transient = attributes.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else set()
        for kind in ("_parameters", "_buffers", "_modules"):
            children = attributes.get(kind)
            for name, value in children.items() if isinstance(children, dict) else ():
                if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
                    raise UserError(f"{where}: refused: the name of a parameter or module is not text, or too long.")
                if isinstance(value, Record) and kind == "_modules":
                    collect(value, f"{prefix}{name}.", depth + 1)
                elif isinstance(value, StoredTensor) and name not in transient:
                    tensors[f"{prefix}{name}"] = value

    collect(module, "", 0)
    return tensors


def _load_tensors(archive: Archive, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The tensors, fp32 where floating, without v6.0's `anchor_grid` buffer: it repeats the anchors in pixels."""
    tensors = {key: archive.tensor(value) for key, value in stored.items() if not key.endswith(".anchor_grid")}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _stride(archive: Archive, value: Any) -> tuple[float, ...]:
    """Pixels per cell of each level, from a tensor or a list; empty where it is neither."""
    if isinstance(value, StoredTensor):
        value = archive.tensor(value).flatten().tolist() if value.numel <= MAX_LEVELS else None
    numbers = [number(item) for item in value] if isinstance(value, list | tuple) else []
    return tuple(item for item in numbers if item is not None)


def _names(value: Any, where: str) -> dict[int, str]:
    """Class names as index -> name, from a list (v6) or a dict (v7)."""
    value = plain(value, where)
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    named = [(str(index), name) for index, name in items if isinstance(name, str | int | float)]
    return {int(index): str(name) for index, name in named if index.isdecimal() and len(index) < 8}


def _task(yaml: Mapping[str, Any] | None, network: Record | None = None) -> str:
    """'detect', 'segment' or 'classify', by the last row of the head, or by the class where there is no YAML."""
    if yaml:
        row = yaml["head"][-1] if yaml["head"] else None
        module = row[2] if isinstance(row, list) and len(row) > 2 else ""
        return "segment" if module == "Segment" else "classify" if module == "Classify" else "detect"
    return "classify" if network and "classif" in network.name.lower() else "detect"


def plain(value: Any, where: str = "checkpoint") -> Any:
    """Plain data from what a file holds: tuples become lists, paths text, numpy scalars numbers, other objects None.

    Raises:
        UserError: more than `MAX_VALUES` values; a few lists inside each other can stand for any number.
    """
    visited = 0

    def copied(value: Any, depth: int) -> Any:
        nonlocal visited
        visited += 1
        if depth > MAX_DEPTH or visited > MAX_VALUES:
            raise UserError(f"{where}: refused: it holds too many values, or nested too deep (a bomb?).")
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, dict):
            keys = [key for key in value if isinstance(key, PLAIN)]
            return {key: copied(value[key], depth + 1) for key in keys}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [copied(item, depth + 1) for item in value]
        if isinstance(value, Record) and value.module.split(".")[0] == "pathlib":
            return "/".join(part for part in value.args if isinstance(part, str)).replace("//", "/")
        return number(value)

    return copied(value, 0)


def number(value: Any) -> float | None:
    """The number in a float, an int, or a numpy scalar or one-element array of a file; None for everything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Record) or value.module.split(".")[0] != "numpy":
        return None
    if value.name == "scalar" and len(value.args) == 2:
        dtype, data = value.args
    elif value.name == "_reconstruct" and isinstance(value.state, tuple) and len(value.state) == 5:
        dtype, data = value.state[2], value.state[4]
    else:
        return None
    if isinstance(data, Record) and data.name == "encode" and data.args and isinstance(data.args[0], str):
        data = data.args[0].encode("latin-1", "replace")  # Python 3 writes bytes so for protocol 2
    kind = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    code = NUMPY_CODES.get(kind) if isinstance(kind, str) else None
    order = ">" if isinstance(dtype, Record) and isinstance(dtype.state, tuple) and ">" in dtype.state else "<"
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(code):
        return None
    return float(struct.unpack(order + code, data)[0])


# ------------------------------------------------------------------------------------------------------------ networks


def network_yaml(checkpoint: Checkpoint) -> dict[str, Any]:
    """A copy of the stored YAML from which the network can be built that the tensors fit.

    The reduction of each SE row is the one its tensors have: tutorial code passes the YAML's to an unused parameter.

    Raises:
        UserError: the file stores no YAML, or it names a layer that is not defined here.
    """
    where = display_path(checkpoint.path)
    if checkpoint.yaml is None:
        if checkpoint.task == "classify":
            raise UserError(
                f"{where}: a classification network, which finds no boxes. Use {_detector_for(where)} instead."
            )
        raise UserError(
            f"{where}: holds tensors but not the network they belong to. Name it with --cfg, for example"
            f" 'python train.py --weights {where} --cfg models/yolov5s.yaml', whose best.pt then stores it."
        )
    yaml = copy.deepcopy(checkpoint.yaml)
    parts = [part for part in (yaml.get("backbone"), yaml.get("head")) if isinstance(part, list)]
    rows = [row for part in parts for row in part if isinstance(row, list)]
    for index, row in enumerate(rows):
        module = row[2] if len(row) == 4 else None
        if isinstance(module, str) and not is_known(module):
            raise UserError(
                f"{where}: its network uses a layer named {module[:60]}, which is not defined here."
                f"{closest(module, [*layer_classes(), *HEADS])} Add the class to models/attention.py to load this file."
            )
        if module == "SE" and isinstance(row[3], list) and row[3]:
            for key in (f"model.{index}.l1.weight", f"model.{index}.0.l1.weight"):
                if key in checkpoint.tensors and checkpoint.tensors[key].ndim == 2:
                    hidden, channels = checkpoint.tensors[key].shape
                    row[3] = [row[3][0], max(channels // max(hidden, 1), 1), *row[3][2:]]
    return yaml


def _detector_for(name: str) -> str:
    stem = Path(name).stem.removesuffix("-cls")
    return f"{stem}.pt" if Path(name).stem.endswith("-cls") else "a detection checkpoint such as yolov5s.pt"


def load_model(
    source: str | Path | Checkpoint, device: str | torch.device = "cpu", *, fuse: bool = True
) -> DetectionModel:
    """The network of a checkpoint with its weights: float32, in eval mode, with its class names.

    Args:
        source: the `.pt` file or what `read` returned.
        device: where the network goes.
        fuse: fold the batch norms into the convolutions; a file saved after folding comes out folded anyway.

    Raises:
        UserError: as `read` and `network_yaml`, or tensors that do not fit the stored YAML, naming the first.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read(source, training=False)
    graph = graphs.read(network_yaml(checkpoint))
    _check_size(graph, checkpoint)
    model = build_model(graph).float().eval()
    if checkpoint.fused:
        model.fuse()
    load_tensors(model, checkpoint)
    nc = int(model.yaml["nc"])
    model.names = {index: checkpoint.names.get(index, str(index)) for index in range(nc)}
    if fuse and not checkpoint.fused:
        model.fuse()
    return model.to(device)


def _check_size(graph: Graph, checkpoint: Checkpoint) -> None:
    """Compare numbers of weights before there are any: a YAML of a few bytes can ask for more than the memory."""
    with torch.device("meta"):
        layers, _ = parse_model(graph)
    wanted = sum(tensor.numel() for tensor in layers.state_dict().values())
    found = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    if wanted > 2 * found + (1 << 20):  # a batch norm more or less is for `load_tensors` to tell
        raise UserError(
            f"{display_path(checkpoint.path)}: its YAML describes a network of {wanted:,} numbers, but its tensors hold"
            f" {found:,}. The file is damaged, or its YAML is of another network."
        )


def load_tensors(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the tensors of a checkpoint into a network of exactly their names and shapes.

    Raises:
        UserError: a tensor is missing, too many, or of another shape.
    """
    expected = model.state_dict()
    found = checkpoint.tensors
    missing, extra = [k for k in expected if k not in found], [k for k in found if k not in expected]
    shapes = [k for k in expected if k in found and found[k].shape != expected[k].shape]
    if missing or extra or shapes:
        detail = [f"{len(keys)} {what} (first {keys[0][:80]})" for what, keys in
                  (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if keys]  # fmt: skip
        raise UserError(
            f"{display_path(checkpoint.path)}: its tensors do not fit the network it stores: {', '.join(detail)}."
            " The layers were changed in code: make the class of the same name in models/ do the same."
        )
    model.load_state_dict(found)


# ----------------------------------------------------------------------------------------------------------- our files


def _read_ours(archive: Archive, content: Mapping[str, Any], *, training: bool) -> Checkpoint:
    if type(version := content.get("version")) is not int:
        raise UserError(f"{archive.where}: damaged: its 'version' is not a number.")
    if version > VERSION:
        raise UserError(
            f"{archive.where}: written by a newer version of this repository (format {version}). Update it."
        )
    stored = content.get("ema") or content.get("model")
    if not _is_state_dict(stored):
        raise UserError(f"{archive.where}: damaged: its 'model' is not a state dict.")
    yaml, opt, hyp = (plain(content.get(key), archive.where) for key in ("yaml", "opt", "hyp"))
    yaml = yaml if isinstance(yaml, dict) and isinstance(yaml.get("head"), list) else None
    resumable = training and content.get("optimizer") is not None
    return Checkpoint(
        archive.path,
        _load_tensors(archive, stored),
        yaml,
        _names(content.get("names"), archive.where),
        _stride(archive, content.get("stride")),
        _task(yaml),
        epoch=epoch if isinstance(epoch := content.get("epoch"), int) else -1,
        best_fitness=number(content.get("best_fitness")),
        ours=True,
        opt=opt if isinstance(opt, dict) else {},
        hyp=hyp if isinstance(hyp, dict) else {},
        training=archive.materialise(dict(content)) if resumable else None,
    )


def save(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a checkpoint of ours so that the file is either the old one or the new one, never half of either.

    Args:
        path: the `.pt` file; its folder is made.
        content: tensors and plain data: `model` and perhaps `ema` (state dicts), `yaml`, `names`, `stride`, `epoch`,
            `best_fitness`, and for a run that can be resumed `updates`, `optimizer`, `schedule`, `rng`, `opt`, `hyp`,
            `new_gates`.
            `format`, `version` and `date` are added. Paths become text, numpy numbers Python's.

    Raises:
        UserError: the file cannot be written, because the disk is full or the folder is read-only.
        TypeError: `content` holds something that `torch.load(weights_only=True)` would refuse.
    """
    path = Path(path)
    stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    checked = _storable({"date": stamp, **content, "format": FORMAT, "version": VERSION}, "checkpoint")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(checked, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's zip writer says RuntimeError when the disk is full
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise UserError(
            f"{display_path(path)}: cannot be written ({reason}); a file already there is unchanged."
            " Free some space, or choose another folder."
        ) from None
    return path


def _storable(value: Any, where: str) -> Any:
    """`value` as tensors and plain data; ndarray scalars and paths converted, anything else refused with its key."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    if isinstance(value, Mapping):
        return {_storable(k, where): _storable(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_storable(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, os.PathLike):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors and plain data only")


def strip(path: str | Path, out: str | Path | None = None) -> Path:
    """Reduce a checkpoint to what is needed to run it: EMA weights in fp16, YAML, names, options; returns the file.

    Works on upstream's files too and then writes ours.
    """
    checkpoint = read(path, training=False)
    content: dict[str, Any] = {
        "epoch": checkpoint.epoch,
        "best_fitness": checkpoint.best_fitness,
        "model": {k: v.half() if v.is_floating_point() else v for k, v in checkpoint.tensors.items()},
        "yaml": checkpoint.yaml,
        "names": checkpoint.names,
        "stride": list(checkpoint.stride),
        "opt": checkpoint.opt,
        "hyp": checkpoint.hyp,
    }
    return save(out or path, content)
