"""Writing a network as YOLOv5 does: a `.pt` file that ultralytics/yolov5 v6.0 and later opens with its `torch.load`.

Such a file is a pickle of the network's modules, which names classes of YOLOv5 (`models.yolo.Model`,
`models.common.Conv`, ...) and gives them the attributes that their code reads. Nothing of YOLOv5 is needed to write
one: the network is turned into `Record`s, which `unpickle` makes of such a file, and `PickleWriter` turns them into
bytes.
"""

from __future__ import annotations

import datetime
import inspect
import os
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from models import attention
from models.checkpoints.files import Checkpoint, load_model, plain, read
from models.checkpoints.unpickle import STORAGE_DTYPES, Global, Record
from models.common import SE, Gate
from models.gates.start import absorb_gain_
from models.yolo import DetectionModel, Segment
from utils.config import UserError, display_path
from utils.files import replacing, write_texts

ALIGNMENT = 64  # of the tensors in the file, as torch writes them, so that it can map the file into memory
STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
# Class -> the attributes its code in YOLOv5 reads, besides parameters, buffers and child modules.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Conv", "DWConv", "C3", "C3x", "C3TR", "C3SPP", "C3Ghost", "BottleneckCSP", "SPP", "SPPF"), ()),
    **dict.fromkeys(("Focus", "GhostConv", "GhostBottleneck", "TransformerLayer", "MixConv2d", "Proto", "SE"), ()),
    "Bottleneck": ("add",),
    "CrossConv": ("add",),
    "TransformerBlock": ("c2", "conv"),
    "Contract": ("gain",),
    "Expand": ("gain",),
    "Concat": ("d",),
    "Detect": ("nc", "no", "nl", "na", "inplace", "stride"),
    "Segment": ("nc", "no", "nl", "na", "inplace", "stride", "nm", "npr"),
}
ELSEWHERE = {"Detect": "models.yolo", "Segment": "models.yolo", "MixConv2d": "models.experimental"}
ROW = ("i", "f", "type", "np")  # of a layer of the network itself


# ------------------------------------------------------------------------------------------------------------- writing


def write_yolov5(path: str | Path, source: str | Path | Checkpoint, *, with_code: bool = False) -> list[Path]:
    """Write a checkpoint as a `.pt` file of YOLOv5, in half precision; the files written.

    What it computes is what the checkpoint computes with every weight rounded to half precision, which a stripped
    checkpoint's are. SE becomes the class that tutorials paste into `models/common.py`; that has no gain, so a gain in
    the YAML is first taken into the layers that read the gate, which a power of two does without rounding.

    Args:
        path: the file to write; its folder must be there.
        source: a checkpoint of ours or of YOLOv5, or the path of one.
        with_code: allow gates that YOLOv5 does not have, and write their classes to `<stem>_attention.py` beside.

    Raises:
        UserError: a layer that YOLOv5 does not have, a gain that cannot be taken away exactly, folded batch norms, or
            a file that cannot be written.

    >>> write_yolov5("best-yolov5.pt", "runs/train/exp/weights/best.pt")
    [PosixPath('best-yolov5.pt')]
    """
    path = Path(path)
    checkpoint = source if isinstance(source, Checkpoint) else read(source, training=False)
    where = display_path(checkpoint.path)
    if checkpoint.fused:
        raise UserError(
            f"{where}: its batch norms are folded into its convolutions, and YOLOv5's classes need them."
            " Give the checkpoint from before the folding."
        )
    model = load_model(checkpoint, fuse=False)
    extra = _foreign_layers(model, where, allowed=with_code)
    _remove_gains(model, where)
    model.half()
    stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    content = {
        "epoch": -1,
        "best_fitness": None,
        "model": network_record(model, hyp=checkpoint.hyp),
        "ema": None,
        "updates": None,
        "optimizer": None,
        "opt": checkpoint.opt or None,
        "git": None,
        "date": stamp,
    }
    try:
        with replacing(path) as file:
            write_archive(file, content)
    except OSError as error:
        raise UserError(f"{display_path(path)}: cannot be written ({error.strerror}). Choose another folder.") from None
    if not extra:
        return [path]
    code = path.with_name(f"{path.stem}_attention.py")
    write_texts({code: _code_for(extra, path.name)})
    return [path, code]


def _foreign_layers(model: DetectionModel, where: str, *, allowed: bool) -> list[type[nn.Module]]:
    """The classes in a network that YOLOv5 lacks; UserError for the first one where they are not allowed."""
    found: dict[type[nn.Module], None] = {}
    for row, layer in zip(model.graph.rows, model.model):
        if row.inner:
            raise UserError(
                f"{where}: row {row.index} is {row.name}, and YOLOv5's {row.module} has no room for a gate inside."
                f" Put the gate behind the block ({row.inner.gate}@after:every:{row.module}), or export to onnx, say."
            )
        for part in layer.modules():
            kind = type(part)
            if kind.__name__ in ATTRIBUTES or kind.__module__.startswith("torch.nn.") or kind in found:
                continue
            if kind.__name__ == "DWConvTranspose2d":
                continue
            if not allowed:
                raise UserError(
                    f"{where}: row {row.index} is {kind.__name__}, a layer that YOLOv5 does not have. With --with-code"
                    " its class is written beside the file, and must be added to YOLOv5 before the file opens there."
                )
            found[kind] = None
    return list(found)


def _remove_gains(model: DetectionModel, where: str) -> None:
    """Give every SE a gain of 1 and its YAML row no gain, with the network's output unchanged, in place."""
    for row in model.graph.rows:
        if row.module != "SE":
            continue
        obstacle = absorb_gain_(model, row.index)
        if obstacle:
            raise UserError(
                f"{where}: row {row.index} is SE with a gain, which YOLOv5's SE does not have, and {obstacle}."
                " Start the gate with --gate absorbed, or train it without a gain."
            )
        rows = [raw for section in ("backbone", "head") for raw in model.yaml[section]]
        rows[row.index][3] = rows[row.index][3][:2]  # channels and reduction


def _code_for(extra: Iterable[type[nn.Module]], name: str) -> str:
    """A Python file with these classes for YOLOv5's repository, and what to do with it."""
    ours = [kind for kind in extra if kind.__module__ == attention.__name__]
    theirs = [kind.__name__ for kind in extra if kind.__module__ != attention.__name__]
    listed = ", ".join(kind.__name__ for kind in ours)
    note = [
        f"Layers of {name} that YOLOv5 does not have. Licence: Apache-2.0.",
        "",
        "Save this file as models/attention.py of the YOLOv5 repository. Detection, validation and export then work.",
        "To train there, too, add to models/yolo.py at the top, and in parse_model before its last else:",
        "",
        f"    from models.attention import {listed}",
        "",
        f"    elif m in ({listed},):",
        "        c2 = ch[f]",
        "        args = [c2, c2, *args[1:]]",
    ]
    if theirs:
        note += ["", f"Also needed in its models/common.py, as you have it here: {', '.join(theirs)}."]
    parts: list[Any] = [Gate, attention.zero_, attention.odd, *ours]
    imports = [
        "from __future__ import annotations",
        "import math",
        "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn",
        "from models.common import Conv",
    ]
    return (
        "\n\n".join(['"""' + "\n".join(note) + '\n"""', *imports])
        + "\n\n\n"
        + "\n\n".join(inspect.getsource(part) for part in parts)
    )


# ------------------------------------------------------------------------------------------------------------- records


def network_record(model: DetectionModel, hyp: Mapping[str, Any] | None = None) -> Record:
    """A network as the object that YOLOv5 pickles."""
    is_segment = isinstance(model.head, Segment)
    record = Record(Global("models.yolo", "SegmentationModel" if is_segment else "Model"))  # the name of all versions
    record.state = {
        **_base_state(model, _Modules()),
        "yaml": plain(model.yaml),
        "yaml_file": Path(model.yaml_file).name if model.yaml_file else "",
        "save": list(model.save),
        "names": dict(model.names),
        "inplace": bool(model.inplace),
        "stride": model.stride.float().cpu(),
        "nc": model.head.nc,
        "hyp": plain(dict(hyp or {})),
    }
    return record


class _Modules:
    """Modules as records; an object that stands in several places, as an activation does, stays one."""

    def __init__(self) -> None:
        self.known: dict[int, Record] = {}

    def __call__(self, module: nn.Module) -> Record:
        if id(module) not in self.known:
            self.known[id(module)] = self._record(module)
        return self.known[id(module)]

    def _record(self, module: nn.Module) -> Record:
        kind = type(module)
        name, home = kind.__name__, kind.__module__
        values = vars(module)
        base = set(vars(nn.Module()))
        if home.startswith("torch.nn.") or isinstance(module, nn.ConvTranspose2d):
            own = {key: value for key, value in values.items() if key not in base}
        elif name in ATTRIBUTES:
            home = ELSEWHERE.get(name, "models.common")
            own = {key: values[key] for key in (*ATTRIBUTES[name], *ROW) if key in values}
        else:
            own = {key: value for key, value in values.items() if key not in base}
        if "type" in own:  # a row of several layers in a chain names what they are
            own["type"] = own["type"].replace("models.common.MixConv2d", "models.experimental.MixConv2d")
        if name in ("Detect", "Segment"):
            own |= {"grid": [torch.zeros(1)] * own["nl"], "anchor_grid": [torch.zeros(1)] * own["nl"]}
        if name == "Segment":  # YOLOv5 keeps the function there
            own["detect"] = Record(Global("__builtin__", "getattr"), (Global("models.yolo", "Detect"), "forward"))
        record = Record(Global(home, name))
        record.state = {**_base_state(_tutorial_se(module) if isinstance(module, SE) else module, self), **own}
        return record


def _tutorial_se(gate: SE) -> nn.Module:
    """The parts of SE as the class has them that tutorials paste into YOLOv5."""
    parts = nn.Module()
    parts.avgpool = nn.AdaptiveAvgPool2d(1)
    parts.l1 = gate.l1
    parts.relu = nn.ReLU(inplace=True)
    parts.l2 = gate.l2
    parts.sig = nn.Sigmoid()
    return parts.train(gate.training)


def _base_state(module: nn.Module, record_of: _Modules) -> dict[str, Any]:
    """What `torch.nn.Module` itself keeps of a module, without hooks; child modules as records."""
    return {
        **vars(nn.Module()),
        "training": module.training,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(module._non_persistent_buffers_set),
        "_modules": OrderedDict((k, v if v is None else record_of(v)) for k, v in module._modules.items()),
    }


# ------------------------------------------------------------------------------------------------------ pickle and zip


class PickleWriter:
    """Values as a pickle of protocol 2, the way `torch.save` writes it; what `PickleMachine` reads.

    Known are None, booleans, numbers, text, tuples, lists, dicts, sets, tensors, `Global` and `Record`. The numbers of
    a tensor are not in the pickle: tensor k is in `storages[k]`, for the file's member `data/k`.
    """

    def __init__(self) -> None:
        self.storages: list[Tensor] = []
        self.data = bytearray()
        self.memo: dict[int, int] = {}
        self.kept: list[Any] = []  # an id is only unique as long as its object lives

    def dump(self, value: Any) -> bytes:
        """The pickle of `value`; TypeError for what is none of the above."""
        self.data = bytearray(b"\x80\x02")
        self._put(value)
        return bytes(self.data + b".")

    def _put(self, value: Any) -> None:
        match value:
            case None | bool():
                self.data += {None: b"N", True: b"\x88", False: b"\x89"}[value]
            case int():
                self._put_int(value)
            case float():
                self.data += b"G" + struct.pack(">d", value)
            case str():
                text = value.encode("utf-8", "surrogatepass")
                self.data += b"X" + struct.pack("<I", len(text)) + text
            case Tensor() | Record():
                self._put_once(value)
            case Global():
                self.data += f"c{value.module}\n{value.name}\n".encode()
            case OrderedDict():
                self._put_call(Global("collections", "OrderedDict"))
                self._put_items(value)
            case dict():
                self.data += b"}"
                self._put_items(value)
            case list():
                self.data += b"]("
                self._put_all(value, b"e")
            case tuple():
                self.data += b"("
                self._put_all(value, b"t")
            case set():
                self._put_call(Global("__builtin__", "set"), sorted(value))
            case _:
                raise TypeError(f"a {type(value).__name__} cannot be written into a checkpoint of YOLOv5")

    def _put_int(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.data += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.data += b"\x8a" + bytes([len(raw)]) + raw

    def _put_all(self, values: Iterable[Any], end: bytes) -> None:
        for value in values:
            self._put(value)
        self.data += end

    def _put_items(self, values: Mapping[Any, Any]) -> None:
        self.data += b"("
        self._put_all((part for pair in values.items() for part in pair), b"u")

    def _put_call(self, function: Global, *args: Any) -> None:
        self._put(function)
        self._put(args)
        self.data += b"R"

    def _put_once(self, value: Any) -> None:
        """An object, or at its second place a reference to the first."""
        if id(value) in self.memo:
            self.data += b"j" + struct.pack("<I", self.memo[id(value)])
            return
        if isinstance(value, Tensor):
            self._put_tensor(value)
        elif value.state is None:
            self._put_call(Global(value.module, value.name), *value.args)
        else:
            self._put(Global(value.module, value.name))
            self.data += b")\x81"
        self.memo[id(value)] = len(self.memo)
        self.kept.append(value)
        self.data += b"r" + struct.pack("<I", self.memo[id(value)])
        if isinstance(value, Record) and value.state is not None:
            self._put(value.state)
            self.data += b"b"

    def _put_tensor(self, tensor: Tensor) -> None:
        """The call that rebuilds a tensor, on the CPU, from a storage of its own."""
        if isinstance(tensor, nn.Parameter):
            self._put(Global("torch._utils", "_rebuild_parameter"))
            self.data += b"("
            self._put_tensor(tensor.detach())
            self._put_all((False, OrderedDict()), b"tR")
            return
        tensor = tensor.detach().cpu().contiguous()
        self._put(Global("torch._utils", "_rebuild_tensor_v2"))
        key, kind = str(len(self.storages)), Global("torch", STORAGES[tensor.dtype])
        self.data += b"("
        self._put(("storage", kind, key, "cpu", tensor.numel()))
        self.data += b"Q"
        self.storages.append(tensor)
        self._put_all((0, tuple(tensor.shape), tensor.stride(), False, OrderedDict()), b"tR")


def write_archive(file: IO[bytes], content: Any) -> None:
    """Write the zip file that `torch.load` opens: `content` pickled, and its tensors."""
    writer = PickleWriter()
    pickled = writer.dump(content)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, file, "data.pkl", pickled)
        _write_member(archive, file, "byteorder", sys.byteorder.encode())
        for key, tensor in enumerate(writer.storages):
            _write_member(archive, file, f"data/{key}", tensor.flatten().view(torch.uint8).numpy().tobytes())
        _write_member(archive, file, "version", b"3\n")
    file.flush()
    os.fsync(file.fileno())


def _write_member(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: bytes) -> None:
    """Add a member whose bytes begin at a multiple of `ALIGNMENT`, by padding its extra field."""
    info = zipfile.ZipInfo(f"archive/{name}")  # the date stays 1980: equal networks make equal members
    start = file.tell() + 30 + len(info.filename) + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, data)
