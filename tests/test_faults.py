"""What goes wrong around a run: kills, a full disk, data that vanish, loader processes that die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.checkpoints.files import read
from tests.conftest import TinyDataset
from tests.test_train import micro_network
from utils.config import ROOT, UserError
from utils.data import prepare
from utils.dataloaders import Loader, LoaderOptions, build_loader
from utils.files import PARTIAL

PATIENCE = 300


class Run:
    """train.py in a process of its own, for more epochs than anybody waits for."""

    def __init__(
        self, dataset: TinyDataset, place: Path, *words: str, preexec: Callable[[], None] | None = None
    ) -> None:
        self.save_dir, self.log = place / "exp", dataset.root.parent / "log.txt"
        micro = micro_network(dataset.root.parent)
        common = (
            f"--weights= --cfg {micro} --data {dataset.yaml} --img 64 --batch 2 --epochs 5000 --noplots --device cpu"
        )
        command = [sys.executable, "train.py", *common.split(), "--project", str(place), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=preexec
            )

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not what():
            assert self.process.poll() is None, self.text[-3000:]
            assert time.monotonic() < end, self.text[-3000:]
            time.sleep(0.01)

    def mistake(self) -> str:
        """The one line that it ended with."""
        assert self.process.wait(PATIENCE) == 2, self.text[-3000:]
        lines = self.text.replace("\r", "\n").strip().split("\n")
        assert "Traceback" not in self.text and "Warning" not in self.text, self.text[-3000:]
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.text[-3000:]
        return lines[-1]


@contextlib.contextmanager
def running(*arguments: object, **options: object) -> Iterator[Run]:
    run = Run(*arguments, **options)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks trainings")
def test_killed_trainings_end_like_an_undisturbed_one() -> None:
    """`make faults` kills fifty."""
    command = [sys.executable, "-m", "tests.faults", "--kills", "4", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = done.stdout.strip().splitlines()[-1]
    runs = re.search(r"4 kills \(.*\) of (\d+) trainings.*; (\d+) of \1 ended like the undisturbed one", summary)
    assert runs and runs[1] == runs[2], summary


# ----------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB; the test is skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_it_can_go_on(
    own_tiny_dataset: TinyDataset, small_disk: Path
) -> None:
    with running(own_tiny_dataset, small_disk, "--workers", "0") as run:
        weights = run.save_dir / "weights"
        run.wait_for((weights / "last.pt").exists)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**12))
        assert re.search(
            r"(last\.pt|best\.pt|results\.csv): cannot be written \(.*(No space|file write)", run.mistake()
        )
        assert not [*run.save_dir.glob(PARTIAL), *weights.glob(PARTIAL)]
    epoch = read(weights / "last.pt").epoch
    rows = (run.save_dir / "results.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] in (list(range(epoch + 1)), list(range(epoch + 2)))
    (small_disk / "filler").unlink()
    command = [sys.executable, "train.py", "--resume", str(weights / "last.pt")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as resumed:
        end = time.monotonic() + PATIENCE
        try:
            while read(weights / "last.pt", training=False).epoch <= epoch:
                assert resumed.poll() is None and time.monotonic() < end
                time.sleep(0.1)
        finally:
            resumed.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not limit the size of files")
def test_a_checkpoint_that_does_not_fit_is_one_line_and_leaves_nothing(
    own_tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    with running(own_tiny_dataset, tmp_path / "runs", "--workers", "0", preexec=limit) as run:
        assert re.search(r"best\.pt: cannot be written .*Free some space", run.mistake())
        assert list((run.save_dir / "weights").iterdir()) == []


# ----------------------------------------------------------------------------------------- data and loader processes


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_dataset_that_vanishes_ends_a_run_in_one_line(
    own_tiny_dataset: TinyDataset, tmp_path: Path, workers: str
) -> None:
    with running(own_tiny_dataset, tmp_path / "runs", "--workers", workers) as run:
        run.wait_for((run.save_dir / "weights/last.pt").exists)
        own_tiny_dataset.root.rename(tmp_path / "elsewhere")
        assert re.search(r"(train|val)\d\.png", run.mistake())
        assert read(run.save_dir / "weights/last.pt").training is not None


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc to find the loader processes")
def test_a_loader_process_that_is_killed_ends_a_run_in_one_line(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    with running(own_tiny_dataset, tmp_path / "runs", "--workers", "2") as run:
        run.wait_for((run.save_dir / "weights/last.pt").exists)
        for child in children_of(run.process.pid):
            os.kill(child, signal.SIGKILL)
        assert re.search(r"loader process was ended from outside.*memory.*--workers than 2.*--cache", run.mistake())


def loader_of(dataset: TinyDataset) -> Loader:
    spec = prepare(dataset.yaml, task="train")
    options = LoaderOptions(imgsz=64, batch_size=2, workers=2, prefix="train: ")
    return build_loader(spec, spec.split("train"), options)[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no such signal")
def test_after_a_loader_process_was_killed_new_ones_are_started(own_tiny_dataset: TinyDataset) -> None:
    loader = loader_of(own_tiny_dataset)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before  # else a worker's end is raised anywhere in the program
    for worker in loader._loader._iterator._workers:  # type: ignore[union-attr]
        worker.kill()
    with pytest.raises(UserError, match=r"^train: a loader process was ended from outside"):
        list(batches) + list(loader)
    assert sum(len(batch.paths) for batch in loader) == 8
    loader.close()


@pytest.mark.slow
@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, ConnectionError])
def test_a_mistake_of_ours_in_a_loader_process_keeps_its_traceback(
    own_tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    loader = loader_of(own_tiny_dataset)

    def broken(self: object, index: int, failed: list[str]) -> None:
        raise error("ours")

    monkeypatch.setattr("utils.dataloaders.ImageDataset._plain", broken)
    with pytest.raises(error, match=r"Caught \w+ in DataLoader worker(.|\n)*in broken"):
        list(loader)
    loader.close()
