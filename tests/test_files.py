"""Files written whole or not at all, run folders that belong to one run, and what killed processes leave."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from utils.config import ROOT, UserError
from utils.files import PARTIAL, make_run_dir, remove_leftovers, replacing, user_cache_dir, write_texts


def options(project: Path, name: str = "exp", *, exist_ok: bool = False) -> argparse.Namespace:
    return argparse.Namespace(project=str(project), name=name, exist_ok=exist_ok)


# --------------------------------------------------------------------------------------------------------- run folders


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    made = [make_run_dir(options(tmp_path), "weights") for _ in range(3)]
    assert [folder.name for folder in made] == ["exp", "exp2", "exp3"]
    assert all((folder / "weights").is_dir() for folder in made)
    assert make_run_dir(options(tmp_path, exist_ok=True)) == tmp_path / "exp"


def test_a_run_folder_with_a_dot_in_its_name_keeps_it(tmp_path: Path) -> None:
    assert [make_run_dir(options(tmp_path, "v1.5")).name for _ in range(2)] == ["v1.5", "v1.52"]


def test_a_file_of_the_name_counts_as_taken_unless_its_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "exp").write_text("a file")
    assert make_run_dir(options(tmp_path)).name == "exp2"
    with pytest.raises(UserError, match=r"exp: cannot be made \(File exists\)"):
        make_run_dir(options(tmp_path, exist_ok=True))


def test_a_folder_that_another_run_makes_at_the_last_moment_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **settings: Any) -> None:
        if self == tmp_path / "exp":
            real(self, exist_ok=True)  # the other run
        real(self, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert make_run_dir(options(tmp_path)).name == "exp2"


def test_runs_started_at_once_get_a_folder_each(tmp_path: Path) -> None:
    count = 40
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_run_dir(options(tmp_path / "new"), "weights"), range(count)))
    assert len(set(made)) == count


@pytest.mark.parametrize(
    ("project", "name", "why"),
    [
        ("file", "exp", "File exists"),
        (".", "n" * 300, "File name too long"),
        ("p" * 300, "exp", "File name too long"),
        (".", "a\0b", "null byte"),
    ],
)
def test_a_run_folder_that_cannot_be_made_is_one_clear_line(in_tmp: Path, project: str, name: str, why: str) -> None:
    (in_tmp / "file").write_text("in the way")
    for exist_ok in (False, True):
        with pytest.raises(UserError, match=rf"cannot be made \(.*({why}).*\)\. Choose another --project or --name"):
            make_run_dir(options(Path(project), name, exist_ok=exist_ok))


# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_at_the_end_of_the_block_only(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")
    with replacing(file) as stream:
        stream.write(b"new")
        stream.flush()
        assert file.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(file) as stream:
        stream.write(b"half")
        raise error
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_long_name_leaves_room_for_the_unfinished_ones(tmp_path: Path) -> None:
    file = tmp_path / ("ü" * 120)
    write_texts({file: "text"})
    assert file.read_text(encoding="utf-8") == "text"


def test_texts_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.a: cannot be written \(No such file or directory\)"):
        write_texts({tmp_path / "b": "", tmp_path / "nowhere" / "a": ""})
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- leftovers

WRITER = """
import sys, time
from pathlib import Path
from utils.files import replacing
with replacing(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there an open file cannot be removed anyway")
def test_leftovers_of_a_killed_process_are_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    command = [sys.executable, "-c", WRITER, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout and writer.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(PARTIAL))) == 1
        writer.kill()
    assert len(list(tmp_path.glob(PARTIAL))) == 1 and not file.exists()
    remove_leftovers(tmp_path, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_run_into_an_existing_folder_removes_its_leftovers_and_nothing_else(tmp_path: Path) -> None:
    folder = make_run_dir(options(tmp_path), "weights")
    kept = [folder / ".notes.partial", folder / "results.csv", folder / "weights" / "last.pt"]
    for file in (*kept, folder / ".opt.yaml.0123abcd.partial", folder / "weights" / ".last.pt.89abcdef.partial"):
        file.write_bytes(b"")
    make_run_dir(options(tmp_path, exist_ok=True), "weights")
    assert sorted(file for file in folder.rglob("*") if file.is_file()) == sorted(kept)


def test_many_writers_of_one_file_never_disturb_each_other(tmp_path: Path) -> None:
    """Others remove leftovers meanwhile."""
    file, end = tmp_path / "cache", time.monotonic() + 1.5

    def write(number: int) -> int:
        count = 0
        while time.monotonic() < end:
            if number % 2:
                remove_leftovers(tmp_path)
            else:
                with replacing(file) as stream:
                    stream.write(bytes([number]) * 1000)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        assert min(pool.map(write, range(6))) > 3
    assert set(file.read_bytes()) < {0, 2, 4} and len(set(file.read_bytes())) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path))
    assert user_cache_dir() == tmp_path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_started_at_once_get_a_folder_each(tmp_path: Path) -> None:
    code = "import sys, argparse; from utils.files import make_run_dir\n"
    code += "made = argparse.Namespace(project=sys.argv[1], name='exp', exist_ok=False)\n"
    code += "print('ready', flush=True)\nsys.stdin.read(1)\nfor _ in range(50): print(make_run_dir(made, 'weights'))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go")
        process.stdin.flush()
    made = [line for process in both for line in process.communicate()[0].split()]
    assert len(made) == len(set(made)) == 100
