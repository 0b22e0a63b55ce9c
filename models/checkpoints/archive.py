"""A `.pt` file as data: its zip is opened here, its pickle read by `models.checkpoints.unpickle`; nothing in it is run.

`torch.load` is not used for files we did not write: it hands TorchScript zips and pre-1.6 files to other loaders, and
it needs the classes a file names.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from models.checkpoints.unpickle import Global, PickleMachine, PickleProblem, Record, StoredTensor
from utils.config import UserError, display_path

MAX_PICKLE_BYTES = 16 << 20  # yolov5x writes 0.2 MB; a pickle that describes more is not a detection network
MAX_MEMBERS = 100_000
MAX_DEPTH = 64  # containers inside containers
MAX_VALUES = 200_000  # a few lists inside each other can stand for more values than there are atoms
EXPORTED = {
    ".onnx": "ONNX",
    ".torchscript": "TorchScript",
    ".engine": "TensorRT",
    ".tflite": "TensorFlow Lite",
    ".pb": "TensorFlow GraphDef",
    ".mlmodel": "CoreML",
    ".mlpackage": "CoreML",
    ".xml": "OpenVINO",
    ".bin": "OpenVINO",
    ".safetensors": "safetensors",
}
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
)


class Archive:
    """An open `.pt` file: `content` is what its pickle describes, with tensors still in the file (`StoredTensor`).

    Raises:
        UserError: one line with the path, what was found and what to do, for anything that is not such a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.where = display_path(self.path)
        self._check_file()
        try:
            self._zip = zipfile.ZipFile(self.path)
        except ZIP_ERRORS:
            raise self._damaged() from None
        try:
            members = self._check_members()
            self.content = self._unpickle(members)
        except BaseException:
            self._zip.close()
            raise
        self._storages: dict[str, torch.Tensor] = {}
        self._bytes_left = 4 * self.path.stat().st_size  # tensors may share a storage, but not without end

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()
        self._storages.clear()

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor with its dtype, on the CPU, contiguous, in memory of its own."""
        storage = stored.storage
        if stored.numel > storage.numel:  # a stride of 0 lets one stored number stand for a terabyte once copied
            raise UserError(f"{self.where}: refused: a tensor has more elements than its storage.")
        self._bytes_left -= stored.numel * storage.dtype.itemsize
        if self._bytes_left < 0:
            raise UserError(f"{self.where}: refused: its tensors take more than four times the size of the file.")
        if storage.key not in self._storages:
            self._storages[storage.key] = self._read_bytes(storage.key)
        flat = self._storages[storage.key][: storage.numel * storage.dtype.itemsize]
        if self._swapped:
            flat = flat.view(-1, storage.dtype.itemsize).flip(1).reshape(-1)
        flat = flat.view(storage.dtype)
        return flat.as_strided(stored.size, stored.stride, stored.offset).clone(memory_format=torch.contiguous_format)

    def materialise(self, value: Any) -> Any:
        """`value` with every `StoredTensor` read; dicts, lists and tuples are copied, objects are refused."""
        visited = 0

        def copied(value: Any, depth: int) -> Any:
            nonlocal visited
            visited += 1
            if depth > MAX_DEPTH or visited > MAX_VALUES:
                raise UserError(f"{self.where}: refused: it holds too many values, or nested too deep (a bomb?).")
            if isinstance(value, StoredTensor):
                return self.tensor(value)
            if isinstance(value, Record | Global):
                raise UserError(f"{self.where}: holds an object of class {value.name[:60]!r}; expected plain data.")
            if isinstance(value, dict):
                return {k: copied(v, depth + 1) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(v, depth + 1) for v in value)
            return value

        return copied(value, 0)

    def _read_bytes(self, key: str) -> torch.Tensor:
        """The bytes of storage `key`, copied out of the file."""
        raw = bytearray(self._read(f"{self._root}data/{key}"))
        return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except (*ZIP_ERRORS, RuntimeError):
            raise self._damaged() from None

    def _damaged(self) -> UserError:
        return UserError(f"{self.where}: damaged or incomplete zip archive. Copy or download the file again.")

    def _check_file(self) -> None:
        if self.path.suffix.lower() in EXPORTED:
            kind = EXPORTED[self.path.suffix.lower()]
            raise UserError(f"{self.where}: a {kind} file, not a checkpoint. Give the .pt it was made from.")
        if not os.path.exists(self.path):  # Path.exists raises for a name that no file can have
            raise UserError(f"{self.where}: no such file.")
        if self.path.is_dir():
            raise UserError(f"{self.where}: a folder, not a checkpoint. Give the .pt file.")
        if not self.path.is_file():  # reading a pipe or a device might never end
            raise UserError(f"{self.where}: not a regular file. Give the .pt file.")
        try:
            with self.path.open("rb") as file:
                head = file.read(64)
        except OSError as error:
            raise UserError(f"{self.where}: cannot be read ({error.strerror}).") from None
        if not head:
            raise UserError(f"{self.where}: empty file (0 bytes). Copy or download it again.")
        if head[:1] == b"\x80":
            raise UserError(
                f"{self.where}: saved in PyTorch's format before 1.6 (a bare pickle), and reading that can run"
                " code. If you trust it, open it where it was made and save it again with torch>=1.6."
            )
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{self.where}: a git-lfs pointer, not the weights. Run 'git lfs pull'.")
        if not head.startswith(b"PK\x03\x04"):
            raise UserError(f"{self.where}: not a PyTorch checkpoint (no zip archive). Give a .pt file.")

    def _check_members(self) -> dict[str, zipfile.ZipInfo]:
        """The members by name, all stored without compression and together no larger than the file."""
        infos = self._zip.infolist()
        size = self.path.stat().st_size
        members = {info.filename: info for info in infos}
        if len(infos) > MAX_MEMBERS or len(members) != len(infos):
            raise UserError(f"{self.where}: refused: {len(infos)} members, some of them twice or too many.")
        if any(info.filename.endswith("constants.pkl") or "/code/" in info.filename for info in infos):
            raise UserError(
                f"{self.where}: a TorchScript archive, which holds code. Give the .pt checkpoint it was exported from."
            )
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise UserError(
                    f"{self.where}: refused: a member is compressed, which torch.save never does (a zip bomb?)."
                )
            if info.flag_bits & 0x1:
                raise UserError(f"{self.where}: refused: a member is encrypted.")
        if sum(info.file_size for info in infos) > size:
            raise UserError(
                f"{self.where}: refused: its members claim more bytes than the file's {size} (a zip bomb?)."
            )
        return members

    def _unpickle(self, members: dict[str, zipfile.ZipInfo]) -> Any:
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(
                f"{self.where}: a zip archive but not a PyTorch checkpoint (no data.pkl in it). Give a .pt file."
            )
        self._root = pickles[0][: -len("data.pkl")]
        if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{self.where}: refused: its data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MB.")
        order = self._read(f"{self._root}byteorder") if f"{self._root}byteorder" in members else b"little"
        if order.strip() not in (b"little", b"big"):
            raise UserError(f"{self.where}: refused: its member 'byteorder' is neither 'little' nor 'big'.")
        self._swapped = order.strip() != sys.byteorder.encode()
        start = f"{self._root}data/"
        storages = {name[len(start) :]: info.file_size for name, info in members.items() if name.startswith(start)}
        try:
            return PickleMachine(self._read(pickles[0]), storages).run()
        except PickleProblem as problem:
            raise UserError(f"{self.where}: refused: {problem}.") from None
