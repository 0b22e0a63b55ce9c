"""Archives that are not what they claim: refused in a line, in little time, memory and disk."""

from __future__ import annotations

import bz2
import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bounds import bounded
from utils.downloads import DownloadProblem, unpack

SECONDS, MEGABYTES = 10.0, 200.0


def refusal(archive: Path) -> str:
    """What the archive is refused with; nothing is written outside `out`, and little into it."""
    with bounded(SECONDS, MEGABYTES), pytest.raises(DownloadProblem) as caught:
        unpack(archive, archive.parent / "out")
    assert {file.name for file in archive.parent.iterdir()} == {archive.name, "out"}
    assert sum(file.stat().st_size for file in (archive.parent / "out").rglob("*")) < 1_000_000
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------------ tar


def header(name: str = "a", size: int = 0, kind: bytes = tarfile.REGTYPE, raw_size: bytes = b"") -> bytes:
    """512 bytes with the sum that belongs to them."""
    info = tarfile.TarInfo("x")
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[:100] = name.encode()[:100].ljust(100, b"\0")
    block[124 : 124 + len(raw_size)] = raw_size
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*lines: bytes) -> bytes:
    """An extended header about the next entry."""
    records = b""
    for line in lines:
        length = len(line) + 2
        length += len(str(length + len(str(length))))
        records += b"%d %s\n" % (length, line)
    return header(size=len(records), kind=tarfile.XHDTYPE) + padded(records)


def extended(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header(size=len(content), kind=kind) + padded(content)


A = header("a", 3) + padded(b"abc")
END = bytes(1024)
TARS: dict[str, tuple[bytes, str]] = {
    "digits for a record": (extended(b"1" * 60_000) + A, "extended header is damaged"),
    "digits for many records": ((extended(b"1" * 2_000_000) + A) * 4, "unreasonable size"),
    "digits in a value": (pax(b"comment=" + b"1" * 60_000, b"size=x") + A, "extended header is damaged"),
    "a record of no length": (extended(b"0 path=x\n") + A, "extended header is damaged"),
    "a record longer than its header": (extended(b"99999 path=x\n") + A, "extended header is damaged"),
    "thousands of records": (extended(b"7 a=bc\n" * 5000) + A, "extended header is damaged"),
    "a size of 5,000 digits": (pax(b"size=" + b"9" * 5000) + A, "extended header is damaged"),
    "a size below nothing": (pax(b"size=-512") + A, "extended header is damaged"),
    "a size of an exabyte": (pax(b"size=" + b"9" * 18) + A, "unpacks to more than"),
    "a sparse map of a billion": (
        pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=9")
        + extended(b"1000000000\n" + b"1\n" * 3000, tarfile.REGTYPE),
        "or sparse",
    ),
    "a sparse map in the header": (pax(b"GNU.sparse.map=" + b"1," * 20_000 + b"1") + A, "or sparse"),
    "an old sparse file": (header("a", 3, tarfile.GNUTYPE_SPARSE) + b"\1" * 512 * 3000, "or sparse"),
    "a negative size": (header("a", raw_size=b"\xff" * 12) + END, "a number in a header is damaged"),
    "a size of letters": (header("a", raw_size=b"12345x78901\0") + END, "a number in a header is damaged"),
    "a size of 2**88": (header("a", raw_size=b"\x80" + b"\xff" * 11) + END, "unpacks to more than"),
    "headers about headers": (pax(b"path=b") * 5000 + A, "unreasonable size"),
    "global headers without end": (extended(b"", tarfile.XGLTYPE) * 5000 + A, "unreasonable size"),
    "a long name of a megabyte": (extended(b"a" * 1_000_000, tarfile.GNUTYPE_LONGNAME) + A, "unreasonable size"),
    "a name of 2,000 characters": (extended(b"a/" * 1000, tarfile.GNUTYPE_LONGNAME) + A, "has 2000 characters"),
    "a name of 300 characters": (extended(b"a" * 300, tarfile.GNUTYPE_LONGNAME) + A, "of more than 255 bytes"),
    "no name": (header("", 3) + padded(b"abc"), "has 0 characters"),
    "a NUL in a name": (pax(b"path=a\0b") + A, "outside its folder"),
    "a folder above": (pax(b"path=../a") + A, "outside its folder"),
    "the same name twice": (A + A, "same name"),
    "a folder of a file's name": (A + header("a", kind=tarfile.DIRTYPE), "same name"),
    "a file below a file": (A + header("a/b"), "same name|both a file and a folder"),
    "half an entry": (header("a", 3000) + bytes(1000), "it ends inside an entry"),
    "half a header": (A + header("b")[:300], "a header is damaged"),
    "a wrong sum": (A + header("b").replace(b"ustar", b"Ustar"), "a header is damaged"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
@pytest.mark.parametrize(("content", "words"), TARS.values(), ids=TARS.keys())
def test_a_hostile_tar_is_refused(tmp_path: Path, content: bytes, words: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("a.tar" if pack is bytes else "a.tar.gz")
    path.write_bytes(pack(content))
    assert any(part in refusal(path) for part in words.split("|"))


@pytest.mark.slow
def test_a_tar_of_more_files_than_its_bytes_can_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.bz2"
    path.write_bytes(bz2.compress(header("__MACOSX/a") * 60_000))
    assert "unpacks to more than" in refusal(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 3_000_000])
def test_what_tarfile_writes_is_read(tmp_path: Path, form: int, size: int) -> None:
    """Long names, names that are not ASCII, folders and sizes around a block, in each format."""
    names = ["a.txt", "b/c d/e.txt", f"{'long/' * 40}{'x' * 90}.txt", "é/汽车.txt", "numbers/" + "1" * 90]
    if form == tarfile.USTAR_FORMAT:
        names = [name if len(name) < 200 else f"{'long/' * 25}{'x' * 60}" for name in names]
    content = {name: bytes([len(name) % 256]) * size for name in names}
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=form, compresslevel=1) as archive:
        folder = tarfile.TarInfo("empty")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1234567890.5
            archive.addfile(info, io.BytesIO(data))
    unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    found = {str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert found == content and (tmp_path / "out/empty").is_dir()


def test_a_size_above_eight_gigabytes_is_read_from_either_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in (header("a", raw_size=b"\x80" + (9 << 30).to_bytes(11, "big")), pax(b"size=%d" % (9 << 30)) + A):
        path = tmp_path / f"{len(content)}" / "a.tar"
        path.parent.mkdir()
        path.write_bytes(content + END)
        assert "unpacks to more than" in refusal(path), "9 GB are more than a small archive may hold"


# ------------------------------------------------------------------------------------------------------------------ zip


def zip_of(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, b"content")
    return path


ZIP_NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "no name": (("",), "has 0 characters"),
    "300 characters": (("a" * 300,), "of more than 255 bytes"),
    "300 characters of a folder": ((f"{'a' * 300}/b",), "of more than 255 bytes"),
    "90 letters of four bytes": (("🙂" * 90,), "of more than 255 bytes"),
    "5,000 characters": (("a/" * 2500 + "b",), "has 5001 characters"),
    "a name twice": (("a", "a"), "same name"),
    "a name twice with another spelling": (("b/a", "b//./a"), "same name"),
    "a file below a file": (("a", "a/b"), "same name|both a file and a folder"),
    "a drive": (("c:a",), "outside its folder"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("names", "words"), ZIP_NAMES.values(), ids=ZIP_NAMES.keys())
def test_a_zip_whose_names_cannot_be_is_refused(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    line = refusal(zip_of(tmp_path / "a.zip", *names))
    assert any(part in line for part in words.split("|"))


def test_a_name_that_ends_in_a_space_is_written_as_it_is(tmp_path: Path) -> None:
    unpack(zip_of(tmp_path / "a.zip", "a ", "b\nc"), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a ", "b\nc"]


@pytest.mark.parametrize("number", [0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF])
@pytest.mark.parametrize("field", [20, 24, 42], ids=["packed size", "size", "place"])
@pytest.mark.parametrize("extra", [0, 2**40, 2**63 - 1, 2**63, 2**64 - 1], ids=hex)
def test_lies_about_sizes_and_places_in_a_zip_change_nothing(
    tmp_path: Path, number: int, field: int, extra: int
) -> None:
    """The content is what was packed, or the archive is refused."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a")
        info.extra = struct.pack("<HHQQQ", 0x9999, 24, extra, extra, extra)
        archive.writestr(info, b"content")
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + field : place + field + 4] = struct.pack("<I", number)
    path.write_bytes(bytes(data).replace(b"\x99\x99", b"\x01\x00"))  # the extra field of zip64
    try:
        with bounded(SECONDS, MEGABYTES):
            unpack(path, tmp_path / "out")
    except DownloadProblem:
        assert field != 20 or number == 0xFFFFFFFF
    else:
        assert (tmp_path / "out/a").read_bytes() == b"content"
