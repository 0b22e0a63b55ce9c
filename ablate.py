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
import dataclasses
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train
from utils.config import ROOT, WORK, ArgumentParser, UserError, check_minimum, display_path, options_from
from utils.files import write_texts
from utils.runtime import LOGGER, run_script, select_device, setup_logging

if TYPE_CHECKING:
    from experiments.trials import Arm, Cell

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
    add("--split-seeds", nargs="+", default=[], help="as --seeds, of the splits alone: each is trained with all seeds")
    add("--folds", type=int, default=0, help="split train's images anew per seed; every K-th part is held out")
    add("--pool", action="store_true", help="with --folds: split the val images, too")
    add("--fresh-data", action="store_true", help="draw a dataset per split (shapes.yaml; about 0.13 MB an image)")
    add("--val-images", type=int, default=0, help="val images that --fresh-data draws per split; 0: as usual")
    add("--against", action="append", default=[], metavar="ARM:BASELINE", help="compare ARM not with the first arm")
    add("--placebo", action="store_true", help="an arm 'redraw': the first one with its new weights drawn anew")
    add("--margin", type=float, default=0.01, help="arms whose mAP50-95 surely differs by less are equivalent")
    add("--least", type=float, default=0.005, help="least mean difference to be called better or worse")
    add("--look", action="store_true", help="only report what is finished; recorded, and told in the report")
    add("--train-is-val", action="store_true", help="insist on validating on the training images")
    add("--jobs", type=int, default=1, help="cells at once on a machine, which share its cores")
    add("--engine", choices=["local", "ray"], default="local", help="processes here, or the slots of a Ray cluster")
    add("--devices", default="", help="CUDA numbers that the jobs are spread over: 0,1,2,3")
    add("--project", default=str(WORK / "runs/ablate"), help="folder of the ablations")
    add("--name", default="exp", help="name of this one; the same name goes on where it stopped")
    return parser


# ------------------------------------------------------------------------------------------------------------ the cells


# Options in which arms may differ and yet train alike: what they do to the network is seen in its weights, or nothing.
NOT_TRAINING = (
    *("weights", "cfg", "insert", "transfer", "gate", "min_transfer", "freeze", "hyp", "label_smoothing", "data"),
    *("seed", "init_seed", "autoanchor", "noautoanchor", "patience", "resume", "exist_ok", "project", "name"),
    *("save_dir", "noplots", "nosave", "noval", "save_period", "workers", "cache", "device", "skip_bad", "local_rank"),
)


def try_arm(cell: Cell) -> dict[str, Any]:
    """Build one arm and train it on one batch, to find its mistakes before the first hour is spent.

    Returns:
        What the network costs, what came from the checkpoint, and how many of its weights did not.
    """
    from models.measure import Size
    from utils.downloads import find_weights
    from utils.inference import to_float

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = {**cell.options, "project": folder, "name": "try", "noplots": True, "workers": 0, "cache": "none"}
        options = options_from(train.build_parser(), settings)
        train.check(options)
        parts = train.Training(options, select_device(cell.device), None)
        start = _start(parts)
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
        "start": start,
        "parameters": size.parameters,
        "new": size.parameters - report.copied_parameters if report else size.parameters,
        "tensors": f"{report.copied}/{report.total}" if report else "0",
        "percent": report.percent_parameters if report else 0.0,
    }


def _start(parts: train.Training) -> str:
    """A name of all that decides what a training becomes, its seed and images apart: arms of one name are the same."""
    from utils.config import check_hyp, read_hyp
    from utils.training import HYP_OWNERS

    options = {key: value for key, value in vars(parts.options).items() if key not in NOT_TRAINING}
    rows = [[row.module, row.args, row.sources] for row in parts.model.graph.rows]
    trains = [parameter.requires_grad for parameter in parts.model.parameters()]
    hyp = dict(check_hyp(read_hyp(parts.hyp), HYP_OWNERS))
    name = hashlib.sha256(json.dumps([rows, trains, hyp, options], default=str, sort_keys=True).encode())
    for tensor in parts.model.state_dict().values():
        name.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return name.hexdigest()[:16]


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train one cell, or go on with it, judge its last epoch, and write `cell.json`; what it wrote there.

    The last epoch is judged and not the best one: the best of many epochs was chosen on the images it is judged on. A
    training that diverges has found nothing: its arm would look better without it.
    """
    from experiments.cells import judge, weights_of
    from experiments.trials import RESULT
    from utils.engine import NonFiniteLoss

    begun, found, diverged = time.monotonic(), False, {}
    with _logging_to(cell.folder / "log.txt"):
        try:
            found = _train(cell) if cell.trains else True
            judged = judge(weights_of(cell), cell)
        except NonFiniteLoss as error:
            LOGGER.error(str(error))
            judged, diverged = judge(None, cell), {"diverged": str(error)[:1000]}
    seconds = None if found else round(time.monotonic() - begun, 1)  # nobody took the time of what was there before
    run = {"arm": cell.arm, "seed": cell.seed, **({} if cell.split is None else {"split": cell.split})}
    extra = {**({} if cell.trains else {"trained": False}), **diverged, "registered": cell.registered}
    result = {**run, "seconds": seconds, **judged, **extra}
    write_texts({cell.folder / RESULT: json.dumps(result, indent=1)})
    return result


def _train(cell: Cell) -> bool:
    """Train a cell to its last epoch; whether a part of it had been trained before."""
    from models.checkpoints.files import read

    last = cell.folder / "weights" / "last.pt"
    found = read(last) if last.is_file() else None
    if found and found.training and not _same_file(found.opt.get("data"), cell.options["data"]):
        shutil.rmtree(cell.folder / "weights")  # the ablation was moved: its splits are elsewhere now
        found = None
    if found and found.training:
        train.run(resume=str(last), device=cell.device)
    elif not found:
        place = {"project": str(cell.folder.parent), "name": cell.folder.name, "exist_ok": True}
        train.run(**{**cell.options, **place, "device": cell.device})
    return found is not None


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


# ----------------------------------------------------------------------------------------------------------- the report


def _commit() -> str:
    git = shutil.which("git")
    done = git and subprocess.run([git, "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done and done.returncode == 0 else "not a git checkout"


def environment() -> dict[str, str]:
    """Versions, machine and commit."""
    import platform

    import numpy
    import torch

    return {
        "commit": _commit(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "Python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
    }


def write_report(cells: Sequence[Cell], folder: Path, command: str) -> None:
    """report.md, results.csv and report.html of everything that is finished."""
    from experiments import report
    from experiments.cells import draw_samples, measure_arms

    measure_arms(cells, folder)
    pictures = draw_samples(cells, folder)
    files = report.write(report.load(folder), folder, command=command, environment=environment(), pictures=pictures)
    LOGGER.info(f"Report: {', '.join(display_path(file) for file in files)}")


# ------------------------------------------------------------------------------------------------------------ the whole


def main(argv: list[str] | None = None) -> None:
    """Command line; a user's mistake raises UserError."""
    setup_logging()
    words = sys.argv[1:] if argv is None else argv
    own, rest = build_parser().parse_known_args(words)
    if own.look:
        look(Path(own.project) / own.name)
    else:
        ablate(own, vars(train.build_parser().parse_args(rest)), words)


def look(folder: Path) -> None:
    """Report what is finished of an ablation, which may be running, and remember that it was looked at."""
    from experiments import report
    from experiments.registration import note_look

    ablation = report.load(folder)
    done = sum(map(len, ablation.cells.values()))
    note_look(folder, done, ablation.planned_cells)
    command = str(ablation.registered.get("command", "not registered"))
    files = report.write(report.load(folder), folder, command=command, environment=environment())
    LOGGER.info(f"{done} of {ablation.planned_cells} cells are done. Report: {display_path(files[0])}")


def ablate(own: argparse.Namespace, options: Mapping[str, Any], command: Sequence[str] = ()) -> Path:
    """Run what is missing of an ablation, whose recipe are train.py's `options`, and report it; its folder."""
    from experiments.registration import digest, register
    from experiments.statistics import Rule, scipy_stats
    from experiments.trials import (
        PER_ARM,
        PER_CELL,
        against_of,
        alone_in,
        arms_of,
        check_flags,
        check_recipe,
        make_cells,
        plain_recipe,
        planned_of,
        runs_of,
        seeds_of,
        threads_of,
    )
    from utils.files import write_yaml

    check_minimum(own, jobs=1, folds=0, val_images=0)
    check_flags(own, options, train.build_parser())
    scipy_stats()  # its absence should not be found after hours of training
    recipe = {key: value for key, value in options.items() if key not in (*PER_ARM, *PER_CELL)}
    arms = arms_of(own.cfg, own.arm, train.build_parser())
    rule, against = Rule(least=own.least, margin=own.margin), against_of(own.against, [arm.name for arm in arms])
    seeds, folder = seeds_of(own.seeds), Path(own.project) / own.name
    split_seeds = seeds_of(own.split_seeds, "--split-seeds") if own.split_seeds else []
    with alone_in(folder):
        arms += _references(own, arms[0], recipe)
        threads = threads_of(folder, max((os.cpu_count() or 1) // own.jobs, 1))
        fixed = {
            "seeds": planned_of(folder, seeds),
            **({"split_seeds": split_seeds} if split_seeds else {}),
            "arms": {arm.name: arm.options for arm in arms},
            "against": against,
            "rule": dataclasses.asdict(rule),
            **_images(own),
            "threads": threads,
            "recipe": recipe,
        }
        check_recipe(folder, fixed)
        runs = runs_of(seeds, split_seeds)
        splits = _splits(own, recipe["data"], dict.fromkeys(runs.values()), folder)
        cells = make_cells(arms, {run: splits[split] for run, split in runs.items()}, recipe, folder)
        todo = [cell for cell in cells if not cell.done]
        LOGGER.info(f"{len(cells)} cells: {len(arms)} arms x {len(runs)} runs, {len(cells) - len(todo)} done already")
        typed = shlex.join(["python", "ablate.py", *command])
        with _pool(own, threads) as pool:
            if todo:
                firsts = [next(cell for cell in cells if cell.arm == arm.name) for arm in arms]
                _try_arms(pool, [cell for cell in firsts if cell.trains], folder)
                register(folder, plain_recipe(fixed), environment(), typed)
                write_yaml(folder / "recipe.yaml", plain_recipe(fixed))
            under = digest(folder)
            failed = _run_all(pool, [dataclasses.replace(cell, registered=under) for cell in todo])
        _conclude(cells, failed, folder, typed)
    return folder


def _conclude(cells: Sequence[Cell], failed: Sequence[tuple[Cell, str]], folder: Path, command: str) -> None:
    """Report what is finished, and say what failed."""
    from experiments.registration import note_look

    for cell, why in failed:
        log = display_path(cell.folder / "log.txt")
        LOGGER.error(f"{cell.arm} seed {cell.seed} failed: {why.rstrip('.')}. Its log: {log}")
    if any(cell.done for cell in cells):
        note_look(folder, sum(cell.done for cell in cells), len(cells))
        write_report(cells, folder, command)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed, see above. The same command tries them again.")


def _images(own: argparse.Namespace) -> dict[str, Any]:
    """What a recipe says of its images; older ones lack what is not asked for."""
    drawn = {"fresh_data": True, "val_images": own.val_images} if own.fresh_data else {}
    return {"folds": own.folds, **({"pool": True} if own.pool else {}), **drawn}


def _references(own: argparse.Namespace, baseline: Arm, recipe: Mapping[str, Any]) -> list[Arm]:
    """The arms that are shown beside those that are compared: a placebo, and the checkpoint as it comes."""
    from experiments.trials import PLACEBO, UNTOUCHED, Arm, untouched_fits
    from utils.data import load_dataset

    arms = [Arm(PLACEBO, dict(baseline.options))] if own.placebo else []
    weights = {**recipe, **baseline.options}["weights"]
    names = load_dataset(recipe["data"], val_optional=True).names
    single = recipe["single_cls"] and len(names) > 1
    reason = "--single-cls" if single else untouched_fits(weights, names)
    if not reason:
        return [*arms, Arm(UNTOUCHED, {"weights": weights})]
    LOGGER.info(f"No arm '{UNTOUCHED}': {weights or 'no checkpoint'} cannot be judged as it comes ({reason}).")
    return arms


def _splits(own: argparse.Namespace, data: str, seeds: Iterable[int], folder: Path) -> dict[int, str]:
    from experiments.trials import draw_splits, write_splits

    if own.fresh_data:
        return draw_splits(data, seeds, own.val_images, folder / "data")
    return write_splits(data, seeds, own.folds, folder / "splits", insist=own.train_is_val, pool=own.pool)


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
    _check_starts(found)
    file = folder / "arms.json"
    before = read_arms(file)
    for arm, tried in found.items():
        if before.get(arm, tried).get("fingerprint", tried["fingerprint"]) != tried["fingerprint"]:
            raise UserError(
                f"arm '{arm}': its YAML, hyper-parameters, class names or weights are not those this ablation was"
                " begun with. Put them back, or give --name a new name."
            )
    write_texts({file: json.dumps(found, indent=1)})


def _check_starts(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse arms that would be trained alike: hours for a difference of nothing."""
    from experiments.trials import PLACEBO

    first = next(iter(found))
    if PLACEBO in found and not found[first].get("new"):
        raise UserError(
            f"--placebo: '{first}' has no weights that do not come from its checkpoint, so none could be drawn anew."
            " How much a training scatters by itself, seeds of one split show: --split-seeds 8 --seeds 2."
        )
    names: dict[str, str] = {}
    for arm, tried in found.items():
        other = names.setdefault(tried["start"], arm)
        if other != arm:
            raise UserError(
                f"the arms '{other}' and '{arm}' begin with the same network and train alike (fingerprint"
                f" {tried['start']}), so they would give the same numbers. Leave one out, or change it."
            )


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
