"""Where cells run: whatever runs them, the same numbers; nothing goes on once its ablation was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ablate
from experiments.pools import RayPool
from experiments.trials import Cell
from models.checkpoints.files import read
from tests.conftest import TinyDataset
from tests.test_ablate import options
from utils.config import ROOT, UserError


def test_without_ray_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray: pip install.*--engine local"):
        RayPool(1)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere:port"])
def test_a_cluster_that_does_not_answer_is_named_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={address}: no Ray cluster answers there"):
        RayPool(1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc to find the processes")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_trainings_end_with_a_killed_or_interrupted_ablation(how: signal.Signals, tmp_path: Path) -> None:
    """They would write into the folders in which the next start trains."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from experiments.pools import LocalPool\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's `&` has it ignored
        "    with LocalPool(2, 1, []) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        [pool.submit(time.sleep, 600) for _ in range(9)]\n"
        "        time.sleep(600)\n",
        encoding="utf-8",
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    ) as ablation:
        assert ablation.stdout
        worker = int(ablation.stdout.readline())
        assert _alive(worker)
        if how is signal.SIGKILL:
            ablation.kill()
        else:
            os.killpg(ablation.pid, how)  # as a terminal does: to all of them
        try:
            ablation.wait(60)
        finally:
            ablation.kill()
    for _ in range(600):
        if not _alive(worker):
            return
        time.sleep(0.1)
    pytest.fail(f"process {worker} goes on after its ablation ended")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no groups of processes to interrupt")
@pytest.mark.parametrize("after", [0.0, 0.1, 0.3, 1.0])
def test_processes_that_are_just_starting_say_nothing_when_interrupted(after: float, tmp_path: Path) -> None:
    script = tmp_path / "starting.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from experiments.pools import LocalPool\n"
        "from utils.runtime import run_script\n"
        "def main():\n"
        "    with LocalPool(2, 1, []) as pool:\n"
        "        futures = [pool.submit(time.sleep, 600) for _ in range(4)]\n"
        "        print('submitted', flush=True)\n"
        "        futures[0].result()\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    run_script(main)\n",
        encoding="utf-8",
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True)
    with subprocess.Popen([sys.executable, str(script)], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "submitted\n"
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")


@pytest.mark.slow
def test_ray_gives_cell_for_cell_what_processes_give(
    own_tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real Ray, started here."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    results: dict[str, dict[str, object]] = {}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for engine in ("local", "ray"):
        own, recipe = options(own_tiny_dataset.yaml, tmp_path / engine, engine=engine, jobs=2)
        folder = ablate.ablate(own, recipe)
        assert (folder / "report.html").is_file()
        results[engine], tensors[engine] = {}, {}
        for cell in folder.glob("cells/*/*"):
            name = f"{cell.parent.name} {cell.name}"
            found = json.loads((cell / "cell.json").read_text(encoding="utf-8"))
            differs = {"seconds": 0, "registered": found["registered"] != ""}  # when, and by which command
            results[engine][name] = {**found, **differs}
            weights = read(cell / "weights/last.pt").tensors
            tensors[engine].update({f"{name} {key}": tensor for key, tensor in weights.items()})
    assert len(results["local"]) == 4 and results["ray"] == results["local"]
    assert tensors["ray"].keys() == tensors["local"].keys() and len(tensors["ray"]) > 1000
    assert all(torch.equal(tensor, tensors["local"][key]) for key, tensor in tensors["ray"].items())
    assert not ray.is_initialized()


@pytest.mark.slow
def test_ray_hands_back_the_mistake_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with RayPool(1) as pool:
        error = pool.submit(ablate.run_cell, Cell("a", 0, tmp_path / "seed0", {})).exception()
        assert isinstance(error, KeyError) and "Traceback" not in str(error)
    with pytest.raises(UserError, match="no node of the Ray cluster has the 999 CPUs"):
        RayPool(999)
