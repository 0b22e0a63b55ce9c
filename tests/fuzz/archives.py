"""Archives of datasets: damaged zip and tar files, and tar files whose headers say anything under a right sum."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from tests.fuzz.damage import NUMBERS, damage_bytes
from tests.fuzz.harness import Target
from utils.config import UserError
from utils.downloads import DownloadProblem, unpack

NAMES = (
    "a", "b/", "images/a.jpg", "labels/a.txt", "", ".", "..", "/", "a/../b", "a" * 300, "a/" * 600, "a\0b", "a ",
    "C:x", "\\x", "__MACOSX/x", "é" * 90, "a\nb", "images", "images/a.jpg/c",
)  # fmt: skip
SUFFIXES = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}
PAX = (b"path=b", b"size=5", b"size=-1", b"size=" + b"9" * 40, b"GNU.sparse.map=0,9", b"hdrcharset=BINARY", b"x", b"=")


def _pick(rng: np.random.Generator, values: tuple) -> object:
    return values[int(rng.integers(0, len(values)))]


def _zip(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in {str(_pick(rng, NAMES)) for _ in range(int(rng.integers(1, 6)))}:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.external_attr = int(_pick(rng, (0, 0o100644 << 16, 0o120777 << 16, 0o40755 << 16)))
            info.compress_type = int(_pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))
            archive.writestr(info, rng.bytes(20) * int(rng.integers(0, 100)))
    return buffer.getvalue()


def _header(rng: np.random.Generator, name: bytes, size: int, kind: bytes) -> bytes:
    """512 bytes of a tar, some of them wrong, with the sum that belongs to them."""
    info = tarfile.TarInfo("x")
    info.size = size
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[:100], block[156:157] = name[:100].ljust(100, b"\0"), kind
    if rng.random() < 0.3:
        number = int(_pick(rng, NUMBERS))
        block[124:136] = (
            b"\x80" + number.to_bytes(11, "big") if rng.random() < 0.5 else str(number)[:12].encode().ljust(12)
        )
    if rng.random() < 0.2:
        place = int(rng.integers(0, 512))
        block[place] = int(rng.integers(0, 256))
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:512]) + 8 * 32)
    return bytes(block[:512])


def _extension(rng: np.random.Generator, kind: bytes) -> bytes:
    if kind == b"L":
        return str(_pick(rng, NAMES)).encode()
    records = []
    for _ in range(int(rng.integers(0, 4))):
        body = b" " + bytes(_pick(rng, PAX)) + b"\n"  # type: ignore[call-overload]
        records.append(str(len(body) + 2 if rng.random() < 0.8 else _pick(rng, NUMBERS)).encode() + body)
    return b"".join(records) or b"1" * int(rng.integers(0, 5000))


def _tar(rng: np.random.Generator) -> bytes:
    out = b""
    for _ in range(int(rng.integers(1, 8))):
        kind = bytes(_pick(rng, (b"0", b"0", b"0", b"5", b"x", b"x", b"L", b"g", b"S", b"2", b"\0")))  # type: ignore[call-overload]
        content = _extension(rng, kind) if kind in b"xLg" else rng.bytes(int(rng.integers(0, 2000)))
        content = b"" if kind == b"5" else content
        out += _header(rng, str(_pick(rng, NAMES)).encode(), len(content), kind)
        out += content + bytes(-len(content) % 512)
    return out + bytes(1024 * int(rng.integers(0, 2)))


def _case(rng: np.random.Generator, folder: Path) -> object:
    if rng.random() < 0.4:
        suffix, data = ".zip", _zip(rng)
    else:
        suffix = str(_pick(rng, tuple(SUFFIXES)))
        data = _tar(rng)
        data = SUFFIXES[suffix](damage_bytes(rng, data) if rng.random() < 0.2 else data)
    file = folder / f"archive{suffix}"
    file.write_bytes(damage_bytes(rng, data) if rng.random() < 0.5 else data)
    try:
        return unpack(file, folder / "content")
    except DownloadProblem as problem:
        raise UserError(str(problem)) from None


TARGETS = (Target("archive", _case),)
