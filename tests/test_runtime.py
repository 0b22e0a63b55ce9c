"""Device choice, seeds, run folders, exit codes."""

from __future__ import annotations

import argparse
import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from utils.config import UserError
from utils.runtime import Stopwatch, increment_path, init_seeds, make_run_dir, run_script, select_device, user_cache_dir


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "exp"
    assert increment_path(path) == path
    path.mkdir()
    assert increment_path(path) == tmp_path / "exp2"
    (tmp_path / "exp2").mkdir()
    assert increment_path(path) == tmp_path / "exp3"
    assert increment_path(path, exist_ok=True) == path


def test_a_numbered_file_keeps_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert increment_path(tmp_path / "a.jpg") == tmp_path / "a2.jpg"


def test_a_run_folder_with_a_dot_in_its_name_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "v1.5").mkdir()
    assert increment_path(tmp_path / "v1.5") == tmp_path / "v1.52"


def test_a_run_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    options = argparse.Namespace(project=str(tmp_path / "file"), name="exp", exist_ok=False)
    with pytest.raises(UserError, match=r"file/exp: cannot be made \(Not a directory\)\. Choose another --project"):
        make_run_dir(options)


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def main() -> NoReturn:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a.yaml:3: no"), 2, "error: a.yaml:3: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/last.pt"), 2, "runs/last.pt"),
    ],
)
def test_a_users_mistake_is_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(raising(error))
    assert caught.value.code == code
    stderr = capsys.readouterr().err
    assert text in stderr
    assert stderr.count("\n") == 1


def test_our_own_mistake_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no CUDA device 99"):
        select_device("99")
    with pytest.raises(UserError, match="expected cpu, mps, or CUDA numbers"):
        select_device("gpu")


def test_several_devices_without_a_launcher_name_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        select_device("0,1")


def test_each_process_takes_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    done: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("current", device)))
    monkeypatch.setattr("utils.runtime._describe", lambda device: done.append(("described", device)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    third, second = torch.device("cuda", 3), torch.device("cuda", 1)
    assert select_device("2,3") == third
    assert select_device("") == second
    # the description is the first to touch CUDA: it must find the current device set
    assert done == [("current", third), ("described", third), ("current", second), ("described", second)]


def test_cpu_is_cpu() -> None:
    assert select_device("cpu") == torch.device("cpu")


def test_the_same_seed_gives_the_same_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        init_seeds(3, deterministic=False)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw() == draw()


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLOV5_CACHE_DIR", str(tmp_path))
    assert user_cache_dir() == tmp_path


def test_a_stopwatch_waits_for_its_own_device_and_not_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in (torch.device("cuda", 3), torch.device("mps"), torch.device("cpu"), None):
        with Stopwatch(device):
            pass
    assert waited == [torch.device("cuda", 3)] * 2 + [torch.device("mps")] * 2


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    with watch:
        first = watch.seconds
    with watch:
        pass
    assert first == 0.0
    assert watch.seconds > 0.0
