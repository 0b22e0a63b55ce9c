"""Files that are not what they claim: nothing in them runs, and each gets one line that says what is wrong."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.checkpoints.files import load_model, read
from tests.bounds import bounded
from utils.config import UserError

SECONDS, MEGABYTES = 10.0, 700.0  # every refusal must come long before; a hash or a walk that explodes never comes


def write_pt(path: Path, content: bytes, storages: dict[str, bytes] | None = None, method: int = 0) -> Path:
    """A zip with torch's layout around any pickle."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def refusal(path: Path) -> str:
    """The one line that reading the file ends with."""
    with bounded(SECONDS, MEGABYTES), pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert line.isprintable() and path.name in line and len(line) <= 500
    return line


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["top", "model", "names", "best_fitness"])
def test_a_reduce_to_os_system_does_not_run(tmp_path: Path, protocol: int, place: str) -> None:
    marker = tmp_path / "ran"
    bomb = Command(f"touch {marker}")
    content: Any = {"top": bomb}.get(place, {"model": None, place: bomb})
    data = pickle.dumps(content, protocol)
    pickle.loads(data)
    assert marker.exists(), "the bomb is live"
    marker.unlink()
    assert "no network" in refusal(write_pt(tmp_path / "bomb.pt", data))
    assert not marker.exists()


def test_a_bomb_beside_real_weights_does_not_run_and_the_weights_are_read(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"model": OrderedDict(weight=torch.arange(3.0)), "opt": Command(f"touch {marker}")}, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert checkpoint.tensors["weight"].tolist() == [0.0, 1.0, 2.0]
    assert checkpoint.opt == {} and not marker.exists()


def test_a_class_with_setstate_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Layer:
        def __getstate__(self) -> dict[str, Any]:
            return {"command": "rm"}

        def __setstate__(self, state: dict[str, Any]) -> None:
            ran.append("setstate")

    module = types.ModuleType("evil_layers")
    Layer.__module__, Layer.__qualname__ = "evil_layers", "Layer"
    module.Layer = Layer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evil_layers", module)
    data = pickle.dumps({"model": Layer()}, 2)
    pickle.loads(data)
    assert ran == ["setstate"], "the class is live"
    assert "no network" in refusal(write_pt(tmp_path / "a.pt", data))
    assert ran == ["setstate"]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_torchscript_archive_with_setstate_does_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    marker = "setstate ran"

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.zeros(1)

        @torch.jit.export
        def __getstate__(self) -> tuple[torch.Tensor, bool]:
            return self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
            print("setstate ran")
            self.weight = state[0]
            self.training = state[1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight

    path = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.script(Module()), str(path))
    torch.jit.load(str(path))
    assert marker in capfd.readouterr().out, "the archive is live"
    assert "TorchScript" in refusal(path)
    assert marker not in capfd.readouterr().out


def test_a_legacy_pickle_without_zip_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "old.pt"
    path.write_bytes(pickle.dumps(Command(f"touch {marker}"), 2))
    line = refusal(path)
    assert "before 1.6" in line and "save it again" in line
    assert not marker.exists()


def test_a_real_file_in_the_format_before_zip_is_told_how_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"model": {"w": torch.zeros(2)}}, path, _use_new_zipfile_serialization=False)
    assert "torch>=1.6" in refusal(path)


# ---------------------------------------------------------------------------------------------- tensors that do not fit


class FakeTensor:
    """Pickles as a tensor over storage '0' with any numbers."""

    def __init__(self, numel: Any, offset: Any, size: Any, stride: Any, kind: Any = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, "0", "cpu", numel)
        self.rest = (offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (FakeStorage(self.identity), *self.rest)


class FakeStorage:
    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity


def dumped(content: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return item.identity if isinstance(item, FakeStorage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def tensor_file(path: Path, tensor: FakeTensor, storage: bytes = bytes(16)) -> Path:
    return write_pt(path, dumped({"model.0.weight": tensor}), {"0": storage})


def test_the_tensor_files_of_these_tests_are_readable_when_their_numbers_are_right(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "a.pt", FakeTensor(4, 1, (3,), (1,)), struct.pack("4f", 1, 2, 3, 4))
    assert read(path).tensors["model.0.weight"].tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "tensor",
    [
        FakeTensor(4, 0, (5,), (1,)),
        FakeTensor(4, 0, (2,), (4,)),
        FakeTensor(4, 3, (2,), (1,)),
        FakeTensor(4, 0, (2**40,), (2**40,)),
        FakeTensor(4, 0, (1 << 40,), (0,)),
        FakeTensor(4, -1, (2,), (1,)),
        FakeTensor(4, 0, (-2,), (1,)),
        FakeTensor(4, 3, (2,), (-1,)),
        FakeTensor(4, 0, (2, 2), (1,)),
        FakeTensor(4, 0, (2.0,), (1,)),
        FakeTensor(4, 0, [2], (1,)),
        FakeTensor(4, "0", (2,), (1,)),
        FakeTensor(4, 0, (1,) * 40, (1,) * 40),
        FakeTensor(5, 0, (5,), (1,)),
        FakeTensor(-4, 0, (2,), (1,)),
        FakeTensor(2**62, 0, (2**62,), (1,)),
        FakeTensor(True, 0, (1,), (1,)),
        FakeTensor(4, 0, (1,), (2**63,)),
        FakeTensor(4, 0, (1,), (2**62,)),
        FakeTensor(4, 0, (0,), (2**64,)),
        FakeTensor(4, 0, (0, 2**63), (1, 1)),
        FakeTensor(4, 0, (0, 2**40, 2**40), (1, 1, 1)),
        FakeTensor(4, 2**63, (0,), (1,)),
        FakeTensor(4, 0, (4,), (1,), torch.DoubleStorage),
        FakeTensor(4, 0, (4,), (1,), os.system),
    ],
    ids=lambda t: f"{t.identity[4]}-{t.rest[:3]}"[:50],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path: Path, tensor: FakeTensor) -> None:
    assert "refused" in refusal(tensor_file(tmp_path / "a.pt", tensor))


def test_tensors_that_share_a_storage_without_end_are_refused(tmp_path: Path) -> None:
    numel = 1 << 20
    data = dumped({str(i): FakeTensor(numel, 0, (numel,), (1,)) for i in range(1000)})
    path = write_pt(tmp_path / "a.pt", data, {"0": bytes(4 * numel)})
    assert "four times" in refusal(path)


def test_a_missing_storage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist() if not name.endswith("data/0")}
    with zipfile.ZipFile(path, "w") as holed:
        for name, member in members.items():
            holed.writestr(name, member)
    assert "storage '0' is not in the file" in refusal(path)


def test_a_compressed_member_is_refused(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", b"\x80\x02N.", {"0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "zip bomb" in refusal(path)


def test_members_that_claim_more_bytes_than_the_file_has_are_refused(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "a.pt", b"\x80\x02N.", {"0": b"x" * 77})
    data = path.read_bytes()
    claim = struct.pack("<II", 77, 77)
    assert data.count(claim) == 2, "local header and central directory"
    path.write_bytes(data.replace(claim, struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)))
    assert "zip bomb" in refusal(path)


def test_many_members_over_the_same_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", bytes(10_000))
        first = archive.infolist()[1]
        for index in range(1, 50):  # entries of the directory that point at the first one's bytes
            twin = zipfile.ZipInfo(f"archive/data/{index}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, name, getattr(first, name))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]
    assert "zip bomb" in refusal(path)


def test_a_member_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    assert "twice" in refusal(tmp_path / "a.pt")


# --------------------------------------------------------------------------------------------------------- pickle bombs


def laughs(levels: int, pair: bytes = b"h\x00h\x00\x86") -> bytes:
    """Opcodes of a tuple of 2**levels leaves that takes 2 * levels objects."""
    return b")q\x00" + (pair + b"q\x00") * levels


BOMBS = {
    "a tuple as dict key, whose hash takes for ever": b"\x80\x02}" + laughs(80) + b"Ns.",
    "a tuple in a set": b"\x80\x04\x8f(" + laughs(80) + b"\x90.",
    "a set made by reduce": b"\x80\x02c__builtin__\nset\n](" + laughs(80) + b"e\x85R.",
    "an OrderedDict key": b"\x80\x02ccollections\nOrderedDict\n](" + laughs(80) + b"N\x86e\x85R.",
    "a memo index of two billion": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "two million objects": b"\x80\x02(" + b"}" * 2_000_000 + b"t.",
    "containers copied again and again": b"\x80\x02c__builtin__\nlist\nq\x00](" + b"N" * 20_000 + b"eq\x01"
    b"(" + b"h\x00h\x01\x85R" * 20_000 + b"l.",
    "an integer of a megabyte": b"\x80\x02\x8b" + struct.pack("<i", 1_000_000) + b"\x01" * 1_000_000 + b".",
    "a string that says it has four gigabytes": b"\x80\x02X\xff\xff\xff\xffabc.",
    "the extension registry": b"\x80\x02\x82\x01.",
    "an old style instance": b"(ios\nsystem\n.",
    "an object": b"\x80\x02(cos\nsystem\no.",
    "text opcodes": b"I1\n.",
    "an out of band buffer": b"\x80\x05\x97.",
    "pop from nothing": b"\x80\x020.",
    "tuple from nothing": b"\x80\x02\x87.",
    "no mark": b"\x80\x02t.",
    "no memo": b"\x80\x02h\x07.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a list that calls": b"\x80\x02])R.",
    "arguments that are no tuple": b"\x80\x02cos\nsystem\n]R.",
    "state of a list": b"\x80\x02]}b.",
    "append to a dict": b"\x80\x02}Na.",
    "item of a list": b"\x80\x02]NNs.",
    "key without value": b"\x80\x02}(Nu.",
    "list as key": b"\x80\x02}]Ns.",
    "two objects": b"\x80\x02NN.",
    "no end": b"\x80\x02N",
    "nothing": b"",
    "not a pickle": b"hello\nworld",
    "persistent id that is none": b"\x80\x02NQ.",
    "a rebuild without arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a rebuild of text": b"\x80\x02ctorch._utils\n_rebuild_parameter\nX\x01\x00\x00\x00a\x85R.",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_a_pickle_bomb_is_refused_quickly(tmp_path: Path, data: bytes) -> None:
    assert "refused" in refusal(write_pt(tmp_path / "a.pt", data))


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n"
TENSOR += text("0") + text("cpu") + b"K\x01tQK\x00K\x01\x85K\x01\x85\x89}tR"


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


PRIME = 2**61 - 1  # Python's hash of an integer is its remainder
HASHES: dict[str, Callable[[int], bytes]] = {
    "integers": lambda i: integer(i * PRIME),
    "negative integers": lambda i: integer(-i * PRIME),
    "equal low bits": lambda i: integer(i << 40),
    "floats": lambda i: b"G" + struct.pack(">d", float(i << 62)),
    "tuples": lambda i: integer(i * PRIME) + b"\x85",
}
CONTAINERS: dict[str, Callable[[list[bytes]], bytes]] = {
    "a dict": lambda keys: b"}(" + b"N".join(keys) + b"Nu.",
    "a dict item by item": lambda keys: b"}" + b"".join(key + b"Ns" for key in keys) + b".",
    "a set": lambda keys: b"\x8f(" + b"".join(keys) + b"\x90.",
    "a frozenset": lambda keys: b"(" + b"".join(keys) + b"\x91.",
    "a set by reduce": lambda keys: b"c__builtin__\nset\n](" + b"".join(keys) + b"e\x85R.",
    "an OrderedDict": lambda keys: b"ccollections\nOrderedDict\n](" + b"".join(k + b"N\x86" for k in keys) + b"e\x85R.",
    "an object": lambda keys: b"ca\nb\n)R(" + b"N".join(keys) + b"Nu.",
}


@pytest.mark.parametrize("keys", HASHES.values(), ids=HASHES.keys())
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_keys_with_chosen_hashes_are_refused(
    tmp_path: Path, keys: Callable[[int], bytes], container: Callable[[list[bytes]], bytes]
) -> None:
    data = b"\x80\x04" + container([keys(i) for i in range(1, 100_000)])
    assert "too many numbers" in refusal(write_pt(tmp_path / "a.pt", data))


def test_numbers_that_count_up_and_any_text_are_keys(tmp_path: Path) -> None:
    names = {i: f"class {i}" for i in range(20_000)}
    torch.save(
        {"model": {"w": torch.zeros(2)}, "names": names, "opt": {str(i): i for i in range(20_000)}}, tmp_path / "a.pt"
    )
    with bounded(SECONDS, MEGABYTES):
        assert list(read(tmp_path / "a.pt").tensors) == ["w"]


NAMES: dict[str, bytes] = {
    "a number": b"K\x01",
    "nothing": b"N",
    "bytes": b"C\x01a",
    "a tuple": b"K\x01\x85",
    "a million characters": text("a" * 1_000_000),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_of_tensors_that_are_not_short_text_are_refused(tmp_path: Path, name: bytes) -> None:
    state = b"\x80\x04}" + name + TENSOR + b"s."
    assert "holds no network" in refusal(write_pt(tmp_path / "state.pt", state, {"0": bytes(4)}))
    ours = (
        b"\x80\x04}(" + text("format") + text("yolov5-plain") + text("version") + b"K\x01" + text("model") + state[2:-1]
    )
    assert "not a state dict" in refusal(write_pt(tmp_path / "ours.pt", ours + b"u.", {"0": bytes(4)}))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("kind", ["_parameters", "_modules"])
def test_names_of_parameters_and_modules_that_are_not_short_text_are_refused(
    tmp_path: Path, name: bytes, kind: str
) -> None:
    value = (
        TENSOR if kind == "_parameters" else b"cm\nA\n)\x81}" + text("_parameters") + b"}" + text("w") + TENSOR + b"ssb"
    )
    data = b"\x80\x04}" + text("model") + b"cm\nA\n)\x81}" + text(kind) + b"}" + name + value + b"ssbs."
    assert "is not text, or too long" in refusal(write_pt(tmp_path / "a.pt", data, {"0": bytes(4)}))


def test_long_names_of_modules_inside_each_other_take_no_memory(tmp_path: Path) -> None:
    data = (
        b"\x80\x04"
        + text("a" * 100_000)
        + b"q\x010cm\nA\n)\x81}"
        + text("_parameters")
        + b"}"
        + text("w")
        + TENSOR
        + b"ssb"
    )
    for _ in range(60):
        data += b"q\x000cm\nA\n)\x81}" + text("_modules") + b"}(h\x01h\x00" + text("b") + b"h\x00usb"
    assert "too long" in refusal(write_pt(tmp_path / "a.pt", data + b".", {"0": bytes(4)}))


HUGE_ROWS: dict[str, list[Any]] = {
    "channels": [-1, 1, "Conv", [65536, 7]],
    "repeats": [-1, 1000, "C3", [1024]],
    "groups": [-1, 1, "nn.Linear", [100_000_000, 1000]],
}


@pytest.mark.parametrize("row", HUGE_ROWS.values(), ids=HUGE_ROWS.keys())
def test_a_stored_yaml_that_asks_for_more_than_the_tensors_is_refused(tmp_path: Path, row: list[Any]) -> None:
    yaml = {"nc": 1, "anchors": [[1, 2]], "backbone": [row, row], "head": [[[-1], 1, "Detect", ["nc", "anchors"]]]}
    content = {"format": "yolov5-plain", "version": 1, "model": {"w": torch.zeros(3)}, "yaml": yaml}
    torch.save(content, tmp_path / "a.pt")
    with (
        bounded(SECONDS, MEGABYTES),
        pytest.raises(UserError, match=r"describes a network of|more than 1000 layers"),
    ):
        load_model(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "stride", [["a"], [None, [8]], torch.zeros(2, 2, 2), torch.zeros(1 << 20), {"a": 1}, "abc", 8.0]
)
def test_strides_that_are_no_numbers_are_left_out(tmp_path: Path, stride: object) -> None:
    content = {"format": "yolov5-plain", "version": 1, "model": {"w": torch.zeros(3)}, "stride": stride}
    torch.save(content, tmp_path / "a.pt")
    assert all(type(value) is float for value in read(tmp_path / "a.pt").stride)


@pytest.mark.parametrize("part", [5, "rows", {"a": 1}, [5], [[1, 2, 3, 4]], None])
def test_a_stored_yaml_whose_rows_are_none_is_named(tmp_path: Path, part: object) -> None:
    yaml = {"nc": 1, "backbone": part, "head": [[-1, 1, "Detect", ["nc", "anchors"]]]}
    torch.save(
        {"format": "yolov5-plain", "version": 1, "model": {"w": torch.zeros(3)}, "yaml": yaml}, tmp_path / "a.pt"
    )
    with pytest.raises(UserError):
        load_model(tmp_path / "a.pt")


def test_modules_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    loop = b"\x80\x02}" + text("model") + b"cm\nA\n)\x81q\x00}" + text("_modules") + b"}" + text("m") + b"h\x00ssbs."
    assert "without end" in refusal(write_pt(tmp_path / "a.pt", loop))


def test_modules_that_share_children_exponentially_are_refused(tmp_path: Path) -> None:
    data = b"\x80\x02cm\nA\nq\x010h\x01)\x81q\x000"
    for _ in range(50):
        children = b"}(" + text("a") + b"h\x00" + text("b") + b"h\x00u"
        data += b"h\x01)\x81}" + text("_modules") + children + b"sbq\x000"
    assert "without end" in refusal(write_pt(tmp_path / "a.pt", data + b"h\x00."))


@pytest.mark.parametrize("key", ["yaml", "names", "hyp"])
def test_lists_that_multiply_are_refused(tmp_path: Path, key: str) -> None:
    rows = laughs(60, b"]h\x00ah\x00a")
    module = b"cmodels.yolo\nModel\n)\x81}(" + text("_parameters") + b"}" + text("w") + TENSOR + b"s"
    module += text(key) + b"}" + text("head") + b"](" + rows + b"esub"
    path = write_pt(tmp_path / "a.pt", b"\x80\x02}" + text("model") + module + b"s.", {"0": bytes(4)})
    start = time.monotonic()
    with pytest.raises(UserError, match="too many values"):
        read(path)
    assert time.monotonic() - start < SECONDS


def test_a_very_deep_list_is_read_or_refused_without_a_crash(tmp_path: Path) -> None:
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    assert "no network" in refusal(write_pt(tmp_path / "a.pt", deep))


def half(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(50_000)}}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(50_000)}}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda path: path.write_text("weights go here\n"), "not a PyTorch checkpoint"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>Not found</html>"), "not a PyTorch checkpoint"),
    "git lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "half": (half, "damaged or incomplete"),
    "flipped bit": (flipped, "damaged or incomplete"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "missing": (lambda path: None, "no such file"),
    "pipe": (lambda path: os.mkfifo(path), "not a regular file"),
    "zip of text": (lambda path: write_zip(path, {"a.txt": b"a"}), "no data.pkl"),
    "number": (lambda path: torch.save(3, path), "holds no network"),
    "no model": (lambda path: torch.save({"weights": 3, "a\nb": 1}, path), "no 'model', 'ema' or state dict"),
    "big pickle": (lambda path: write_pt(path, b"N" * (17 << 20)), "larger than 16 MB"),
    "byte order": (lambda path: write_zip(path, {"a/data.pkl": b"\x80\x02N.", "a/byteorder": b"pdp"}), "byteorder"),
}


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(("make", "words"), FILES.values(), ids=FILES.keys())
def test_what_is_not_a_checkpoint_is_named(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    path = tmp_path / "best.pt"
    make(path)
    assert words in refusal(path)


@pytest.mark.parametrize(("suffix", "kind"), [(".onnx", "ONNX"), (".engine", "TensorRT"), (".torchscript", "Torch")])
def test_exported_files_are_named_by_their_suffix(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"best{suffix}"
    path.write_bytes(b"x" * 100)
    assert kind in refusal(path)


def test_big_endian_numbers_are_turned_round(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "a.pt", FakeTensor(4, 0, (4,), (1,)), struct.pack(">4f", 1, 2, 3, 4))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    assert read(path).tensors["model.0.weight"].tolist() == [1.0, 2.0, 3.0, 4.0]


def small_pickle() -> bytes:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).half()
    buffer = io.BytesIO()
    torch.save({"model": module, "ema": None, "epoch": 3, "names": ["a"], "opt": {"hyp": {"lr0": 0.01}}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


SMALL = small_pickle()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_in_the_pickle_never_do_more_than_refuse(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for position, value in changes:
        data[position] = value
    storages = {str(i): bytes(16) for i in range(8)}
    try:
        read(write_pt(tmp_path / "a.pt", bytes(data), storages))
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_in_the_zip_never_do_more_than_refuse(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(write_pt(tmp_path / "a.pt", SMALL, {str(i): bytes(16) for i in range(8)}).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.pt").write_bytes(whole)
    try:
        read(tmp_path / "a.pt")
    except UserError as error:
        assert "\n" not in str(error)
