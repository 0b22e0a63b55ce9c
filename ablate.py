"""Does it help? Train several arms of one recipe with the same seeds, on the same splits, and compare them fairly.

    python ablate.py --cfg yolov5n.yaml yolov5n-se-last.yaml --weights yolov5n.pt --data coco128.yaml --folds 4 \
        --seeds 8 --epochs 100 --img 320
    python ablate.py --arm plain:cfg=yolov5n.yaml --arm gain:cfg=yolov5n.yaml,insert=SE@after:SPPF,gate=gain ...

Every flag of train.py is part of the recipe. A cell (one arm with one seed) is a normal run folder; cells that are done
are never run again, so a killed ablation goes on where it was when the same command is given.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train
from utils.config import ROOT, WORK, ArgumentParser, UserError, check_minimum, display_path, options_from
from utils.files import write_texts
from utils.runtime import LOGGER, run_script, select_device, setup_logging

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from experiments.trials import Cell
    from models.yolo import DetectionModel

ENDED = (
    "a training process was ended from outside, perhaps for want of memory. Give the same command again, with fewer"
    " --jobs: cells that are done are kept."
)


def build_parser() -> ArgumentParser:
    """The flags beside those of train.py."""
    parser = ArgumentParser(
        prog="ablate.py",
        allow_abbrev=False,  # --device and --seed are train.py's, not short for --devices and --seeds
        description="Compare arms of one recipe with the same seeds and splits.",
        epilog="Every flag of train.py may be given, too, and is part of the recipe of all arms.",
    )
    add = parser.add_argument
    add("--cfg", nargs="+", default=[], help="an arm per network YAML; A.yaml+SE@after:SPPF inserts a gate first")
    add("--arm", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="an arm by flags or hyper-parameters")
    add("--seeds", nargs="+", default=["3"], help="how many, or which (two or more numbers)")
    add("--folds", type=int, default=0, help="split train's images anew per seed; every K-th part is held out")
    add("--train-is-val", action="store_true", help="insist on validating on the training images")
    add("--jobs", type=int, default=1, help="cells at once on a machine, which share its cores")
    add("--engine", choices=["local", "ray"], default="local", help="processes here, or the slots of a Ray cluster")
    add("--devices", default="", help="CUDA numbers that the jobs are spread over: 0,1,2,3")
    add("--project", default=str(WORK / "runs/ablate"), help="folder of the ablations")
    add("--name", default="exp", help="name of this one; the same name goes on where it stopped")
    return parser


# ------------------------------------------------------------------------------------------------------------ the cells


def try_arm(cell: Cell) -> dict[str, Any]:
    """Build one arm and train it on one batch, to find its mistakes before the first hour is spent.

    Returns:
        What the network costs and what came from the checkpoint.
    """
    from models.measure import Size
    from utils.downloads import find_weights
    from utils.inference import to_float

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = {**cell.options, "project": folder, "name": "try", "noplots": True, "workers": 0, "cache": "none"}
        options = options_from(train.build_parser(), settings)
        train.check(options)
        parts = train.Training(options, select_device(_device(cell)), None)
        batch = next(iter(parts.loader))
        images = to_float(batch.images, parts.device)
        loss, _ = parts.trainer.compute_loss(parts.model.train()(images), batch.targets.to(parts.device))
        loss.backward()
        parts.loader.close()
        size = Size.of(parts.model)
        report = parts.report
        weights = find_weights(options.weights).read_bytes() if options.weights else b""
        recipe = json.dumps([parts.model.yaml, parts.hyp, parts.names], default=str)
    return {
        "fingerprint": hashlib.sha256(recipe.encode() + weights).hexdigest()[:16],
        "parameters": size.parameters,
        "tensors": f"{report.copied}/{report.total}" if report else "0",
        "percent": report.percent_parameters if report else 0.0,
    }


def _device(cell: Cell) -> str:
    return os.environ.get("ABLATE_DEVICE") or cell.options["device"]


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train one cell, or go on with it, judge its last epoch, and write `cell.json`; what it wrote there.

    The last epoch is judged and not the best one: the best of many epochs was chosen on the images it is judged on.
    """
    from experiments.trials import RESULT
    from models.checkpoints.files import read

    begun = time.monotonic()
    with _logging_to(cell.folder / "log.txt"):
        last = cell.folder / "weights" / "last.pt"
        found = read(last) if last.is_file() else None
        if found and found.training and not _same_file(found.opt.get("data"), cell.options["data"]):
            shutil.rmtree(cell.folder / "weights")  # the ablation was moved: its splits are elsewhere now
            found = None
        if found and found.training:
            train.run(resume=str(last), device=_device(cell))
        elif not found:
            place = {"project": str(cell.folder.parent), "name": cell.folder.name, "exist_ok": True}
            train.run(**{**cell.options, **place, "device": _device(cell)})
        judged = judge(last, cell)
    seconds = None if found else round(time.monotonic() - begun, 1)  # nobody took the time of what was there before
    result = {"arm": cell.arm, "seed": cell.seed, "seconds": seconds, **judged}
    write_texts({cell.folder / RESULT: json.dumps(result, indent=1)})
    return result


def _same_file(one: Any, other: Any) -> bool:
    return os.path.abspath(str(one)) == os.path.abspath(str(other))


@contextlib.contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """What is logged and printed inside goes to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler, before = logging.FileHandler(file, encoding="utf-8"), list(LOGGER.handlers)
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(handler.stream), contextlib.redirect_stderr(handler.stream):
            yield
    finally:
        LOGGER.handlers[:] = before
        handler.close()


def judge(weights: Path, cell: Cell) -> dict[str, Any]:
    """Precision, recall and mAP of a checkpoint on the cell's held-out images; `judged.npz` keeps every detection."""
    import numpy as np
    import torch

    from models.backends import load
    from utils import engine
    from utils.data import prepare
    from utils.inference import input_hw

    network = load(weights, select_device(_device(cell)))
    found: list[Any] = []
    result = engine.judge(
        network,
        prepare(cell.options["data"]),
        "val",
        engine.EvalOptions(len(network.names), single_cls=cell.options["single_cls"], progress=False),
        imgsz=input_hw([cell.options["imgsz"]], network)[0],
        batch_size=16,
        workers=0,
        max_pixels=cell.options["max_megapixels"] * 1_000_000,
        skip_bad=cell.options["skip_bad"],
        prefix="",
        on_image=found.append,
    )
    numbers = [len(image.detections) for image in found]
    np.savez_compressed(
        cell.folder / "judged.npz",
        detections=torch.cat([image.detections[:, :6] for image in found]).numpy(),
        detection_image=np.repeat(np.arange(len(found)), numbers),
        truth=torch.cat([image.truth for image in found]).numpy(),
        truth_image=np.repeat(np.arange(len(found)), [len(image.truth) for image in found]),
        paths=np.array([image.path for image in found]),
    )
    scores = ("precision", "recall", "mAP50", "mAP50-95")
    names, classes = list(network.names.values()), [int(c) for c in result.ap.classes]
    called = {c: f"{names[c]} ({c})" if names.count(names[c]) > 1 else names[c] for c in classes}
    return {
        **dict(zip(scores, map(float, result.summary[:4]))),
        "per_class": {called[c]: float(result.maps[c]) for c in classes},
    }


# ----------------------------------------------------------------------------------------------------------- the report


def measure_arms(cells: Sequence[Cell], folder: Path) -> None:
    """Add to `arms.json` what each arm costs to run, and what its gates do on the held-out images of its first seed."""
    import torch

    from experiments.data import read_arms
    from experiments.pools import LocalPool
    from models.gates.inspect import HEADER, draw, inspect_gates
    from models.gates.start import gates_in
    from models.measure import gflops, latencies
    from utils.data import prepare
    from utils.images import read_image
    from utils.labels import image_files

    file = folder / "arms.json"
    arms = read_arms(file)
    first = {cell.arm: cell for cell in reversed(cells) if cell.done}
    if not first:
        return
    device = select_device(_device(next(iter(first.values()))))
    loaded = {arm: _network(cell, device) for arm, cell in first.items()}
    times = latencies(*zip(*loaded.values()))
    for (arm, (model, image)), milliseconds in zip(loaded.items(), times):
        stride, size = max(int(model.stride.max()), 32), image.shape[-1]
        costs = arms.setdefault(arm, {})
        costs.update(gflops=gflops(model, model.graph.ch, (size, size), stride), latency_ms=milliseconds)
        with LocalPool(1, torch.get_num_threads(), []) as fresh:
            costs["memory_mb"] = fresh.submit(memory_of, first[arm]).result()
        if gates_in(model):
            paths = image_files(prepare(first[arm].options["data"]).split("val"))[:100]
            found = inspect_gates(model, (read_image(path) for path in paths), size)
            costs["gates"] = [list(HEADER), *(entry.cells() for entry in found)]
            costs["gates_picture"] = f"gates-{first[arm].folder.parent.name}.png"
            draw(found, folder / costs["gates_picture"])
    write_texts({file: json.dumps(arms, indent=1)})


def memory_of(cell: Cell) -> float | None:
    """MB that one image takes in a trained cell's network, to be asked of a process of its own."""
    from models.measure import image_memory

    return image_memory(*_network(cell, select_device(_device(cell))))


def _network(cell: Cell, device: torch.device) -> tuple[DetectionModel, Tensor]:
    """The trained network of a cell, and an image of the size it was trained at."""
    import torch

    from models.checkpoints.files import load_model
    from utils.inference import round_up

    model = load_model(cell.folder / "weights/last.pt", device).to(memory_format=torch.channels_last)
    size = round_up(cell.options["imgsz"], max(int(model.stride.max()), 32))
    image = torch.zeros(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return model, image


def draw_samples(cells: Sequence[Cell], folder: Path, count: int = 2) -> list[tuple[str, Path]]:
    """Held-out images of the first seed with its labels and with what each arm found, side by side."""
    import numpy as np
    import torch

    from models.checkpoints.files import load_model
    from utils.drawing import plot_batch
    from utils.images import read_image

    seed = next((cell.seed for cell in cells if cell.done), None)
    shown = [cell for cell in cells if cell.done and cell.seed == seed]
    if not shown:
        return []
    names = load_model(shown[0].folder / "weights/last.pt").names
    judged = [np.load(cell.folder / "judged.npz") for cell in shown]
    busiest = np.bincount(judged[0]["truth_image"], minlength=len(judged[0]["paths"])).argsort()[::-1]
    pictures = []
    for number in busiest[:count]:
        path = Path(str(judged[0]["paths"][number]))
        boxes = [judged[0]["truth"][judged[0]["truth_image"] == number]]
        for file in judged:
            found = file["detections"][file["detection_image"] == number]
            boxes.append(np.concatenate((found[:, 5:6], found[:, :5]), 1))
        image = torch.from_numpy(read_image(path)[..., ::-1].copy()).permute(2, 0, 1)
        titles, picture = ["labels", *(cell.arm for cell in shown)], folder / f"sample-{path.stem}.jpg"
        plot_batch(image.expand(len(titles), -1, -1, -1), boxes, titles, names, picture)
        pictures.append((f"{path.name}, held out by seed {seed}: the labels, then what each arm found", picture))
    return pictures


def _commit() -> str:
    git = shutil.which("git")
    done = git and subprocess.run([git, "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done and done.returncode == 0 else "not a git checkout"


def write_report(cells: Sequence[Cell], folder: Path, command: str) -> None:
    """report.md, results.csv and report.html of everything that is finished."""
    import platform

    import numpy
    import torch

    from experiments import report

    measure_arms(cells, folder)
    environment = {
        "commit": _commit(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "Python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
    }
    files = report.write(
        report.load(folder), folder, command=command, environment=environment, pictures=draw_samples(cells, folder)
    )
    LOGGER.info(f"Report: {', '.join(display_path(file) for file in files)}")


# ------------------------------------------------------------------------------------------------------------ the whole


def main(argv: list[str] | None = None) -> None:
    """Command line; a user's mistake raises UserError."""
    setup_logging()
    words = sys.argv[1:] if argv is None else argv
    own, rest = build_parser().parse_known_args(words)
    ablate(own, vars(train.build_parser().parse_args(rest)), words)


def ablate(own: argparse.Namespace, options: Mapping[str, Any], command: Sequence[str] = ()) -> Path:
    """Run what is missing of an ablation, whose recipe are train.py's `options`, and report it; its folder."""
    from experiments.statistics import scipy_stats
    from experiments.trials import (
        PER_ARM,
        PER_CELL,
        alone_in,
        arms_of,
        check_flags,
        check_recipe,
        make_cells,
        plain_recipe,
        planned_of,
        seeds_of,
        threads_of,
        write_splits,
    )
    from utils.files import write_yaml

    check_minimum(own, jobs=1, folds=0)
    check_flags(own, options, train.build_parser())
    scipy_stats()  # its absence should not be found after hours of training
    recipe = {key: value for key, value in options.items() if key not in (*PER_ARM, *PER_CELL)}
    arms = arms_of(own.cfg, own.arm, train.build_parser())
    seeds, folder = seeds_of(own.seeds), Path(own.project) / own.name
    with alone_in(folder):
        threads = threads_of(folder, max((os.cpu_count() or 1) // own.jobs, 1))
        fixed = {
            "seeds": planned_of(folder, seeds),
            "arms": {arm.name: arm.options for arm in arms},
            "folds": own.folds,
            "threads": threads,
            "recipe": recipe,
        }
        check_recipe(folder, fixed)
        splits = write_splits(recipe["data"], seeds, own.folds, folder / "splits", insist=own.train_is_val)
        cells = make_cells(arms, splits, recipe, folder)
        todo = [cell for cell in cells if not cell.done]
        LOGGER.info(f"{len(cells)} cells: {len(arms)} arms x {len(seeds)} seeds, {len(cells) - len(todo)} done already")
        with _pool(own, threads) as pool:
            if todo:
                _try_arms(pool, [next(cell for cell in cells if cell.arm == arm.name) for arm in arms], folder)
                write_yaml(folder / "recipe.yaml", plain_recipe(fixed))
            failed = _run_all(pool, todo)
        for cell, why in failed:
            log = display_path(cell.folder / "log.txt")
            LOGGER.error(f"{cell.arm} seed {cell.seed} failed: {why.rstrip('.')}. Its log: {log}")
        if any(cell.done for cell in cells):
            write_report(cells, folder, shlex.join(["python", "ablate.py", *command]))
        if failed:
            raise UserError(
                f"{len(failed)} of {len(cells)} cells failed, see above. The same command tries them again."
            )
    return folder


def _pool(own: argparse.Namespace, threads: int) -> Executor:
    from experiments.pools import LocalPool, RayPool

    devices = own.devices.split(",") if own.devices else []
    return LocalPool(own.jobs, threads, devices) if own.engine == "local" else RayPool(threads)


def _try_arms(pool: Executor, cells: Sequence[Cell], folder: Path) -> None:
    """Every arm is built and sees one batch; the first mistake ends the ablation before it begins."""
    from experiments.data import read_arms

    found = {}
    for cell, future in [(cell, pool.submit(try_arm, cell)) for cell in cells]:
        try:
            found[cell.arm] = future.result()
        except UserError as error:
            raise UserError(f"arm '{cell.arm}': {error}") from None
        except BrokenProcessPool:
            raise UserError(f"arm '{cell.arm}': {ENDED}") from None
        except Exception as error:
            raise RuntimeError(f"arm '{cell.arm}' failed on its first batch") from error
        LOGGER.info(f"arm '{cell.arm}': {_in_words(found[cell.arm])}")
    file = folder / "arms.json"
    before = read_arms(file)
    for arm, tried in found.items():
        if before.get(arm, tried).get("fingerprint", tried["fingerprint"]) != tried["fingerprint"]:
            raise UserError(
                f"arm '{arm}': its YAML, hyper-parameters, class names or weights are not those this ablation was"
                " begun with. Put them back, or give --name a new name."
            )
    write_texts({file: json.dumps(found, indent=1)})


def _in_words(tried: Mapping[str, Any]) -> str:
    """What `try_arm` returned, for the log."""
    size = f"{tried['parameters']:,} parameters"
    if tried["tensors"] == "0":
        return f"{size}, none of them from a checkpoint"
    return f"{size}, {tried['percent']:.1f} % of them from the checkpoint ({tried['tensors']} tensors)"


def _run_all(pool: Executor, cells: Sequence[Cell]) -> list[tuple[Cell, str]]:
    """Run cells side by side; those that failed, with why."""
    begun, failed = time.monotonic(), []
    futures: dict[Future[dict[str, Any]], Cell] = {pool.submit(run_cell, cell): cell for cell in cells}
    for number, future in enumerate(as_completed(futures), 1):
        cell = futures[future]
        left = (time.monotonic() - begun) / number * (len(cells) - number) / 60
        try:
            result = future.result()
        except BrokenProcessPool:
            raise UserError(ENDED) from None
        except Exception as error:
            failed.append((cell, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        scores = " ".join(f"{key} {result[key]:.3f}" for key in ("mAP50", "mAP50-95"))
        LOGGER.info(f"{number}/{len(cells)} {cell.arm} seed {cell.seed}: {scores}; about {left:.0f} min left")
    return failed


if __name__ == "__main__":
    run_script(main)
