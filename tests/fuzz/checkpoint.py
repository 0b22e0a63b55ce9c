"""Checkpoints: damaged zips, damaged pickles inside whole zips, and pickles made of opcodes that never met before."""

from __future__ import annotations

import io
import struct
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from models.checkpoints.files import FORMAT, load_model, network_yaml, read, save
from models.yolo import DetectionModel
from tests.fuzz.damage import WORDS, damage_bytes
from tests.fuzz.harness import Target

INTEGERS = (0, 1, 2, 3, 8, 255, -1, 2**31, 2**40, 2**61 - 1, 2**62, 2**63, 2**64, -(2**63), 2**255, 2**4000)
KEYS = (
    "model", "ema", "yaml", "names", "stride", "opt", "hyp", "epoch", "version", "format", "_modules", "_parameters",
    "_buffers", "_non_persistent_buffers_set", "nc", "ch", "anchors", "backbone", "head", "state_dict",
    "best_fitness", "optimizer", "0", "", FORMAT, "weight", "depth_multiple", "width_multiple", "activation",
)  # fmt: skip
GLOBALS = (
    b"collections\nOrderedDict", b"torch\nSize", b"torch._utils\n_rebuild_tensor_v2",
    b"torch._utils\n_rebuild_parameter", b"torch._tensor\n_rebuild_from_type_v2", b"builtins\nset",
    b"__builtin__\nlist", b"torch\nFloatStorage", b"models.yolo\nModel", b"models.common\nConv", b"os\nsystem",
    b"numpy.core.multiarray\nscalar", b"numpy\ndtype", b"pathlib\nPosixPath", b"_codecs\nencode",
)  # fmt: skip
REAL_GLOBALS = 8  # the first ones become something, where their arguments are right
STORAGE_BYTES = 64


def _network() -> DetectionModel:
    backbone = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [8]], [-1, 1, "SE", [8, 2]]]
    head = [[-1, 1, "Conv", [16, 3, 2]], [[2, 3], 1, "Detect", ["nc", "anchors"]]]
    levels = {"anchors": [[10, 13, 16, 30], [30, 61, 62, 45]], "backbone": backbone, "head": head}
    return DetectionModel({"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, **levels})


@cache
def _bases() -> tuple[bytes, ...]:
    """Whole files: ours, ours to be resumed, a pickled network as upstream's are, a state dict."""
    network, folder = _network(), Path.cwd()
    content = {"model": network.state_dict(), "yaml": network.yaml, "names": network.names, "stride": network.stride}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    more = {
        "epoch": 3,
        "best_fitness": 0.5,
        "optimizer": optimizer.state_dict(),
        "hyp": {"lr0": 0.01},
        "opt": {"cfg": "x"},
    }
    files = [save(folder / "ours.pt", content), save(folder / "resumable.pt", {**content, **more})]
    pickled = {"model": network.half(), "ema": None, "epoch": -1, "opt": {"hyp": {"lr0": 0.1}}, "date": "2001-01-01"}
    for name, value in (("upstream", pickled), ("state", network.state_dict())):
        torch.save(value, folder / f"{name}.pt")
        files.append(folder / f"{name}.pt")
    return tuple(file.read_bytes() for file in files)


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(folder: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "damaged.pt", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return folder / "damaged.pt"


def _open(file: Path) -> object:
    checkpoint = read(file)
    network_yaml(checkpoint)
    return load_model(checkpoint)


def _damaged(rng: np.random.Generator, folder: Path) -> object:
    data = _bases()[int(rng.integers(0, len(_bases())))]
    if rng.random() < 0.2:
        (folder / "damaged.pt").write_bytes(damage_bytes(rng, data))
        return _open(folder / "damaged.pt")
    members = _members(data)
    name = next(name for name in members if name.endswith("data.pkl"))
    if rng.random() < 0.1:
        name = list(members)[int(rng.integers(0, len(members)))]
    members[name] = damage_bytes(rng, members[name])
    return _open(_write(folder, members))


# --------------------------------------------------------------------------------------------------------- opcode soups


def _text(word: str) -> bytes:
    data = word.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def _some(rng: np.random.Generator, depth: int) -> list[bytes]:
    return [_value(rng, depth - 1) for _ in range(int(rng.integers(0, 5)))]


def _tensor(rng: np.random.Generator) -> bytes:
    """A tensor over the file's only storage; each of its numbers may be any."""

    def number(value: int) -> bytes:
        return _integer(INTEGERS[int(rng.integers(0, len(INTEGERS)))] if rng.random() < 0.02 else value)

    size = [int(n) for n in rng.choice([1, 2, 2, 0], int(rng.integers(0, 5)))]
    strides = [int(np.prod(size[i + 1 :])) for i in range(len(size))]
    identity = (
        b"("
        + _text("storage")
        + b"ctorch\nFloatStorage\n"
        + _text("0")
        + _text("cpu")
        + number(STORAGE_BYTES // 4)
        + b"tQ"
    )
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, strides)) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + number(0) + shape + b"\x89}tR"


def _mapping(rng: np.random.Generator, depth: int) -> bytes:
    items = b""
    for _ in range(int(rng.integers(0, 6))):
        known = rng.random() < 0.98
        key = _text(KEYS[int(rng.integers(0, len(KEYS)))]) if known else _value(rng, 1)
        items += key + _value(rng, depth - 1)
    return b"}(" + items + b"u"


def _row(rng: np.random.Generator) -> bytes:
    module = ("Conv", "SE", "Detect", "Concat", "nn.Upsample", "nn.MaxPool2d", "C3", "nn.Identity")[
        int(rng.integers(0, 8))
    ]
    return b"](" + _integer(-1) + _integer(1) + _text(module) + b"](" + b"".join(_some(rng, 2)) + b"ee"


def _yaml(rng: np.random.Generator) -> bytes:
    """The YAML of a network, of rows that seldom fit."""
    items = b""
    for key in ("backbone", "head"):
        rows = b"".join(_row(rng) for _ in range(int(rng.integers(0, 4))))
        items += _text(key) + (b"](" + rows + b"e" if rng.random() < 0.9 else _value(rng, 2))
    for key in ("nc", "ch", "anchors", "depth_multiple", "width_multiple", "channel_multiple", "activation"):
        items += _text(key) + (_value(rng, 2) if rng.random() < 0.2 else b"K\x01")
    return b"}(" + items + b"u"


def _value(rng: np.random.Generator, depth: int) -> bytes:
    """Opcodes that leave one value on the stack."""
    kind = int(rng.integers(0, 16 if depth > 0 else 7))
    if kind < 3:
        return (b"N", b"\x88", b"\x89", b"K\x01", b"h\x00", b"h\x01", b"]", b"}", b")", b"\x8f")[
            int(rng.integers(0, 10))
        ]
    if kind == 3:
        return _integer(INTEGERS[int(rng.integers(0, len(INTEGERS) if rng.random() < 0.05 else 9))])
    if kind == 4:
        return b"G" + struct.pack(">d", float(rng.choice([0.0, 1.5, -1.0, np.inf, np.nan, 1e300])))
    if kind in (5, 6):
        words = WORDS if rng.random() < 0.3 else KEYS
        return _text(words[int(rng.integers(0, len(words)))])
    if kind in (7, 8):
        return (
            b"}(" + _text("weight") + _tensor(rng) + _text("b") + _tensor(rng) + b"u"
            if rng.random() < 0.5
            else _tensor(rng)
        )
    if kind in (9, 10, 11):
        return _mapping(rng, depth)
    if kind == 12:
        return b"](" + b"".join(_row(rng) if rng.random() < 0.5 else value for value in _some(rng, depth)) + b"e"
    if kind == 13:
        return (
            b"\x8f(" + b"".join(_some(rng, 0)) + b"\x90" if rng.random() < 0.1 else b"\x8f(" + _text("weight") + b"\x90"
        )
    name = b"c" + GLOBALS[int(rng.integers(0 if rng.random() < 0.05 else REAL_GLOBALS, len(GLOBALS)))] + b"\n"
    if kind == 14:
        return name + b"(" + b"".join(_some(rng, depth)) + b"tR"
    parts = b"".join(
        _text(key) + _value(rng, depth - 1) for key in ("_modules", "_parameters", "_buffers", "yaml", "stride")
    )
    return name + b")\x81" + (b"}(" + parts + b"u" if rng.random() < 0.7 else _mapping(rng, depth)) + b"b"


def _module(rng: np.random.Generator) -> bytes:
    """A network as upstream pickles it."""
    parts = {
        "_parameters": b"}(" + _text("weight") + _tensor(rng) + b"u",
        "_modules": _mapping(rng, 4),
        "yaml": _yaml(rng),
        "names": _value(rng, 4),
    }
    return b"cmodels.yolo\nModel\n)\x81}(" + b"".join(_text(key) + value for key, value in parts.items()) + b"ub"


def _soup(rng: np.random.Generator, folder: Path) -> object:
    """A dict of the usual keys with values that fit or do not, perhaps damaged."""
    weights = b"}(" + _text("weight") + _tensor(rng) + b"u"
    usual = {
        "model": _module(rng) if rng.random() < 0.5 else weights,
        "ema": b"N",
        "yaml": _yaml(rng),
        "names": b"]",
        "stride": _tensor(rng),
        "opt": b"}",
    }
    if rng.random() < 0.4:
        usual |= {"format": _text(FORMAT), "version": b"K\x01"}
    items = [_text(key) + (_value(rng, 5) if rng.random() < 0.3 else value) for key, value in usual.items()]
    data = b"\x80\x02Nq\x000)q\x010}(" + b"".join(items) + b"u."
    data = damage_bytes(rng, data, most=2) if rng.random() < 0.1 else data
    return _open(_write(folder, {"a/data.pkl": data, "a/data/0": bytes(STORAGE_BYTES)}))


TARGETS = (Target("checkpoint", _damaged), Target("pickle", _soup))
