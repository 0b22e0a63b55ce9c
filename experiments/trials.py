"""What an ablation consists of: its arms, seeds, splits and cells, and the recipe that all of them share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from experiments.statistics import Run, against_first
from utils.config import ROOT, UserError, check_hyp, closest, display_path, read_hyp, read_yaml
from utils.data import load_dataset, prepare
from utils.files import remove_leftovers, write_texts, write_yaml
from utils.labels import image_files
from utils.runtime import LOGGER
from utils.shapes import SPLITS, draw_files, missing_files
from utils.training import HYP_OWNERS

# options of train.py that belong to a cell
PER_CELL = ("seed", "init_seed", "project", "name", "exist_ok", "resume", "patience")
PER_ARM = ("cfg", "insert")  # and those that belong to an arm
SHARED = (
    "data",
    "single_cls",
    "max_megapixels",
)  # must be the same for all: arms are judged on the same images and classes
MOVE_AWAY = "Move the folder away, or give --name a new name."
MAX_SEEDS = 10_000
MAX_NAME_BYTES = 200  # of an arm's folder; file systems take 255 for a name, and pictures are named after it, too
RESULT = "cell.json"  # written last: a cell that has it is done
UNTOUCHED, PLACEBO = "untouched", "redraw"  # arms that are shown and not compared
PLACEBO_SEEDS = 1_000_000  # from here on, for its new weights


@dataclass(frozen=True)
class Arm:
    """A name, and the options of `train.run` in which this arm differs from the recipe."""

    name: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.+@-]+", "_", self.name)


@dataclass(frozen=True)
class Cell:
    """One arm with one seed, on one split where several seeds share one: what `train.run` gets, and the run folder."""

    arm: str
    seed: int
    folder: Path
    options: dict[str, Any]
    split: int | None = None
    registered: str = ""  # see `experiments.registration.digest`

    @property
    def device(self) -> str:
        """Where it is trained: the share of the process it runs in, or what its options say."""
        return os.environ.get("ABLATE_DEVICE") or str(self.options["device"])

    @property
    def trains(self) -> bool:
        """Whether its network is trained, and not judged as it comes."""
        return self.arm != UNTOUCHED

    @property
    def done(self) -> bool:
        return (self.folder / RESULT).is_file()


# ------------------------------------------------------------------------------------------------------------ the arms


def arms_of(cfgs: Sequence[str], specs: Sequence[str], parser: argparse.ArgumentParser) -> list[Arm]:
    """The arms that --cfg and --arm name, the baseline first; `parser` is train.py's.

    Raises:
        UserError: fewer than two, names or options given twice, an unknown key.
    """
    arms = []
    for spec in cfgs:
        place, file = os.path.split(spec)
        cfg, *gates = file.split("+")
        options = {"cfg": os.path.join(place, cfg), **({"insert": gates} if gates else {})}
        arms.append(Arm("+".join((Path(cfg).stem, *gates)), options))
    arms += [_arm(spec, parser) for spec in specs]
    taken = [arm.name for arm in arms if arm.folder in (UNTOUCHED, PLACEBO)]
    if taken:
        raise UserError(f"an arm cannot be called '{taken[0]}': ablate.py adds one of that name.")
    if len(arms) < 2:
        raise UserError("an ablation compares at least two arms: give --cfg two YAMLs, or --arm twice.")
    names = [arm.folder for arm in arms]
    for arm in arms:
        if names.count(arm.folder) > 1:
            raise UserError(f"two arms are called '{arm.name}'. Give each a name of its own.")
        if not arm.folder.strip("."):
            raise UserError(f"an arm cannot be called '{arm.name}': its name is a folder's. Use letters or digits.")
        if len(os.fsencode(arm.folder)) > MAX_NAME_BYTES:
            raise UserError(f"the arm '{arm.name[:40]}...' has too long a name for its folder. Use --arm NAME:...")
    return arms


def _arm(spec: str, parser: argparse.ArgumentParser) -> Arm:
    known = {action.dest: action for action in parser._actions if action.dest not in (*PER_CELL, *SHARED, "help")}
    name, colon, settings = spec.partition(":")
    if not name or not colon:
        raise UserError(f"--arm {spec}: expected NAME:KEY=VALUE,..., such as gain:cfg=yolov5n-se-last.yaml,gate=gain.")
    options: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--arm {spec}: expected KEY=VALUE, found '{setting}'.")
        if key in SHARED:
            raise UserError(f"--arm {spec}: {key} must be the same for all arms. Give --{key} beside --arm.")
        if key in known:
            options[key] = _train_value(parser, known[key], value)
        else:
            options.setdefault("hyp_changes", {})[key] = _hyp_value(spec, key, value, list(known))
    return Arm(name, options)


def _train_value(parser: argparse.ArgumentParser, action: argparse.Action, value: str) -> Any:
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        if value.lower() not in ("true", "false"):
            raise UserError(f"--arm: {action.dest}={value}: expected true or false.")
        return value.lower() == "true"
    return getattr(parser.parse_args([flag, *(value.split() or [""])]), action.dest)


def _hyp_value(spec: str, key: str, value: str, flags: Sequence[str]) -> float:
    known = [field.name for owner in HYP_OWNERS for field in dataclasses.fields(owner)]
    if key not in known:
        hint = closest(key, [*flags, *known])
        raise UserError(f"--arm {spec}: '{key}' is neither a flag of train.py nor a hyper-parameter.{hint}")
    try:
        return check_hyp(read_hyp({key: value}), HYP_OWNERS)[key]
    except UserError as error:
        raise UserError(f"--arm {spec}: {str(error).removeprefix('hyp: ')}") from None


def against_of(specs: Sequence[str], arms: Sequence[str]) -> dict[str, str]:
    """Which arm is compared with which: each with the first, but for those that ARM:BASELINE say otherwise.

    Raises:
        UserError: an unknown arm, one against itself, or one given twice.
    """
    against = against_first(arms)
    said = set[str]()
    for spec in specs:
        places = [place for place, letter in enumerate(spec) if letter == ":"]  # names may have colons, too
        pairs = [(spec[:place], spec[place + 1 :]) for place in places]
        pair = next(((arm, base) for arm, base in pairs if arm in arms and base in arms), None)
        if pair is None:
            raise UserError(f"--against {spec}: expected ARM:BASELINE, two of the arms {', '.join(arms)}.")
        if pair[0] == pair[1] or pair[0] in said:
            raise UserError(f"--against {spec}: an arm is compared once, and with another one.")
        said.add(pair[0])
        if pair[0] == arms[0]:
            raise UserError(f"--against {spec}: '{arms[0]}' is the first arm, which others are compared with.")
        against[pair[0]] = pair[1]
    return against


def untouched_fits(weights: str, data_names: Mapping[int, str]) -> str:
    """Why a checkpoint cannot be judged as it comes, on data with these class names; empty where it can."""
    from models.checkpoints.files import read
    from utils.downloads import find_weights

    if not weights:
        return "nothing is started from"
    names = list(read(find_weights(weights), training=False).names.values())
    if names != list(data_names.values()):
        return f"its {len(names)} classes are not the {len(data_names)} of the data"
    return ""


def runs_of(seeds: Sequence[int], split_seeds: Sequence[int]) -> dict[Run, int]:
    """By run, the seed that decides its split: each seed its own, or all seeds with each of `split_seeds`."""
    if not split_seeds:
        return {seed: seed for seed in seeds}
    return {(split, seed): split for split in split_seeds for seed in seeds}


def seeds_of(words: Sequence[str], flag: str = "--seeds") -> list[int]:
    """`8` is 0 to 7; `3 5` and `3,5` are these."""
    parts = [part for word in words for part in str(word).split(",") if part]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise UserError(f"{flag} {' '.join(words)}: expected whole numbers: how many seeds, or which.") from None
    if len(numbers) == 1 and "," not in str(words[0]):
        numbers = list(range(min(numbers[0], MAX_SEEDS + 1)))
    if len(numbers) > MAX_SEEDS:
        raise UserError(f"{flag} {' '.join(words)[:40]}: expected at most {MAX_SEEDS:,} of them.")
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"{flag} {' '.join(words)}: expected at least one, none below 0 and none twice.")
    return numbers


def check_flags(own: argparse.Namespace, options: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Refuse flags that would be dropped in silence; `own` are ablate.py's, `options` those of train.py's `parser`."""
    instead = {
        "insert": "Write it into an arm: --cfg yolov5n.yaml+SE@after:SPPF",
        "seed": f"Give --seeds {options['seed']},",
        "resume": "The same command goes on by itself",
        "exist_ok": "The same command goes on by itself",
        "init_seed": "--placebo adds an arm whose new weights are drawn from other seeds",
        "patience": "An ablation judges the last epoch: an early stop would choose it on the images it is judged on",
    }
    usual = vars(parser.parse_args([]))
    for key, advice in instead.items():
        if options[key] != usual[key] and not (key == "patience" and not options[key]):
            raise UserError(f"--{key.replace('_', '-')} belongs to a single training. {advice}.")
    if own.fresh_data and (own.folds or own.pool or own.train_is_val):
        raise UserError("--fresh-data draws images for every split: leave --folds, --pool and --train-is-val away.")
    if own.pool and not own.folds:
        raise UserError("--pool puts the training and val images together, to be split again: add --folds 4.")
    if own.val_images and not own.fresh_data:
        raise UserError("--val-images is about images that are drawn anew: add --fresh-data.")
    if own.split_seeds and not (own.folds or own.fresh_data):
        raise UserError("--split-seeds: all seeds share one split here. Add --folds 4, or leave it away.")
    devices = own.devices.split(",") if own.devices else []
    if devices and own.engine == "ray":
        raise UserError("--devices: Ray hands out the GPUs itself. Leave --devices away, or use --engine local.")
    if not all(device.isdecimal() for device in devices):
        raise UserError(f"--devices {own.devices}: expected CUDA numbers such as 0,1. For one device of all: --device.")
    if len(devices) > own.jobs:
        raise UserError(f"--devices {own.devices}: more than --jobs {own.jobs}. Give --jobs {len(devices)}.")


# ----------------------------------------------------------------------------------------------------------- the splits


def fold(images: Sequence[Path], seed: int, folds: int) -> tuple[list[Path], list[Path]]:
    """(training, held-out) images of one seed: part `seed % folds` of a random order that `seed // folds` decides.

    So `folds` consecutive seeds hold out every image once (cross-validation), and later seeds do so in another order.
    """
    order = np.random.default_rng(seed // folds).permutation(len(images))
    parts = np.array_split(order, folds)
    held_out = parts.pop(seed % folds)
    return [images[i] for i in sorted(np.concatenate(parts))], [images[i] for i in sorted(held_out)]


def write_splits(
    data: str, splits: Iterable[int], folds: int, folder: Path, *, insist: bool, pool: bool = False
) -> dict[int, str]:
    """The dataset YAML of every split: the given one, or one per split with a held-out part of the training images.

    With `pool` the val images, if there are any, are among those that are split.

    Raises:
        UserError: the dataset validates on its training images and neither `folds` nor `insist` says what to do, or
            splits that were written before would change.
    """
    spec = prepare(data, task="train", val_optional=bool(folds))
    if not folds:
        if set(image_files(spec.train)) & set(image_files(spec.val)):
            advice = "--folds 4 holds out a fourth of the images, another one for every seed"
            if not insist:
                raise UserError(f"{data}: validates on its own training images, which measures memory. {advice}.")
            LOGGER.warning(f"{data} validates on its own training images: the numbers show how much is remembered.")
        return dict.fromkeys(splits, data)
    images = image_files(spec.train)
    if pool and spec.val:
        images = list(dict.fromkeys([*images, *image_files(spec.val)]))
    if not 2 <= folds <= len(images):
        raise UserError(f"--folds {folds}: expected 2 to {len(images)}, the number of images to split.")
    files = {}
    for seed in splits:
        texts = {}
        for name, part in zip(("train", "val"), fold(images, seed, folds)):
            texts[name] = folder / f"seed{seed}-{name}.txt"
            # not resolved: the labels of a link lie beside the link
            _write_once(texts[name], "".join(f"{os.path.abspath(path)}\n" for path in part))
        files[seed] = str(folder / f"seed{seed}.yaml")
        write_yaml(Path(files[seed]), {**{k: str(v.resolve()) for k, v in texts.items()}, "names": spec.names})
    return files


def draw_splits(data: str, splits: Iterable[int], val_images: int, folder: Path) -> dict[int, str]:
    """The dataset YAML of every split, each with images drawn for it alone into `folder`.

    Raises:
        UserError: the dataset is not one that is drawn, or the disk is full.
    """
    spec = load_dataset(data)
    if spec.draw != "shapes":
        raise UserError(f"{data}: --fresh-data needs a dataset that is drawn (draw: shapes), such as shapes.yaml.")
    counts = {**SPLITS, "val": val_images or SPLITS["val"]}
    files = {}
    for seed in splits:
        root = (folder / f"seed{seed}").resolve()
        try:
            if missing_files(root, counts, seed):
                draw_files(root, counts, seed)
        except OSError as error:
            raise UserError(f"{display_path(root)}: cannot be drawn ({error.strerror}). {MOVE_AWAY}") from None
        files[seed] = str(folder / f"seed{seed}.yaml")
        places = {"path": str(root), "train": "images/train", "val": "images/val"}
        write_yaml(Path(files[seed]), {**places, "names": spec.names})
    return files


def _write_once(file: Path, text: str) -> None:
    """A split that changed would move images that cells have trained on among those that they are judged on."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.read_bytes() if file.exists() else None
    except OSError as error:
        raise UserError(f"{display_path(file)}: cannot be read or made ({error.strerror}). {MOVE_AWAY}") from None
    if there is None:
        write_texts({file: text})
    elif there != text.encode("utf-8", "surrogateescape"):
        raise UserError(
            f"{display_path(file)}: the training images are not those this ablation was begun with. Put them back, or"
            " give --name a new name."
        )


def make_cells(arms: Sequence[Arm], runs: Mapping[Run, str], recipe: Mapping[str, Any], folder: Path) -> list[Cell]:
    """All cells, run by run, so that whatever is finished early can be compared; `runs` is run -> dataset YAML.

    Runs of one split train with seeds that no other split has: else what a seed does to an arm would be in all splits,
    and these could not be flipped one by one.
    """
    cells = []
    for (run, data), arm in itertools.product(runs.items(), arms):
        split, number = run if isinstance(run, tuple) else (None, run)
        seed = number if split is None else split * MAX_SEEDS + number
        options = {**recipe, **arm.options, "seed": seed, "data": data, "patience": 0}
        if arm.name == PLACEBO:
            options["init_seed"] = PLACEBO_SEEDS + seed
        changes = options.pop("hyp_changes", {})
        if changes:
            options["hyp"] = {**read_hyp(options["hyp"]), **changes}
        place = f"seed{number}" if split is None else f"seed{number}-split{split}"
        cells.append(Cell(arm.name, number, folder / "cells" / arm.folder / place, options, split))
    for one, other in itertools.combinations([cell for cell in cells[: len(arms)] if cell.trains], 2):
        if _complete(one.options) == _complete(other.options):
            raise UserError(f"the arms '{one.arm}' and '{other.arm}' are identical. Leave one out, or change it.")
    return cells


def _complete(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "hyp": read_hyp(options["hyp"])}


def check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Refuse a recipe in the folder of an ablation with another one, showing the difference; `seeds` may grow."""
    file = folder / "recipe.yaml"
    if not file.exists():
        return
    written = read_yaml(file).data
    try:
        both = plain_recipe(dict(written)), plain_recipe(recipe)
    except TypeError:  # dates and the like, which YAML has and JSON has not
        raise UserError(f"{display_path(file)}: not as ablate.py writes it. {MOVE_AWAY}") from None
    for values in both:
        values.pop("seeds", None)
        if isinstance(values.get("recipe"), dict):
            values["recipe"].pop("skip_bad", None)  # lets a run go on, and changes none; older recipes lack it
        arms = values.get("arms")
        values["order of arms"] = (
            ", ".join(arms) if isinstance(arms, dict) else "unreadable"
        )  # the first is the baseline
    old, new = map(_flat, both)
    keys = [key for key in {**old, **new} if old.get(key, "not set") != new.get(key, "not set")]
    if keys:
        lines = [f"{key}: {old.get(key, 'not set')!r} there, {new.get(key, 'not set')!r} now" for key in keys]
        raise UserError(
            f"{display_path(file)}: another ablation stands in this folder ({'; '.join(lines[:6])})."
            " Give --name a new name, or the old recipe again."
        )


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse a second ablation in a folder while the first one works there; both would write the same cells."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w", encoding="ascii")  # noqa: SIM115 - closed below
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason, place = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None) or folder
        raise UserError(f"{display_path(place)}: cannot be made ({reason}). Change --project or --name.") from None
    with lock:
        if sys.platform != "win32":  # which has no such lock
            _lock_or_refuse(lock, folder)
        remove_leftovers(folder, folder / "splits")
        yield


def _lock_or_refuse(lock: IO[str], folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it, however we end
    except BlockingIOError:
        where = display_path(folder)
        raise UserError(f"{where}: another ablate.py works in this folder. Give --name a new name.") from None
    except OSError as error:
        LOGGER.warning(f"{display_path(folder)}: no locks there ({error.strerror}): start one ablation only.")


def planned_of(folder: Path, seeds: Sequence[int]) -> list[int]:
    """The seeds that an ablation was begun with; `seeds` for a new one."""
    begun = _begun(folder).get("seeds", list(seeds))
    if not isinstance(begun, list):
        raise UserError(f"{display_path(folder / 'recipe.yaml')}: seeds: expected a list, found {begun!r}. {MOVE_AWAY}")
    return begun


def threads_of(folder: Path, usual: int) -> int:
    """Threads per cell: those an ablation was begun with, since sums depend on them; `usual` for a new one."""
    begun = _begun(folder).get("threads", usual)
    if not isinstance(begun, int) or begun < 1:
        raise UserError(
            f"{display_path(folder / 'recipe.yaml')}: threads: expected 1 or more, found {begun!r}. {MOVE_AWAY}"
        )
    return begun


def _begun(folder: Path) -> Mapping[str, Any]:
    """The recipe that an ablation was begun with; empty for a new one."""
    file = folder / "recipe.yaml"
    return read_yaml(file).data if file.exists() else {}


def plain_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it comes back from its file; paths below the repository start there, so that it may be moved."""
    plain: dict[str, Any] = json.loads(json.dumps(recipe).replace(json.dumps(f"{ROOT}{os.sep}")[1:-1], ""))
    return plain


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value  # an arm without options is a value
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat
