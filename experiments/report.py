"""The report of an ablation: `report.md`, `results.csv` and `report.html`, the first and last from the same blocks.

    ablation = load("runs/ablate/exp")
    write(ablation, ablation.folder, command="python ablate.py ...", environment={"commit": "...", "machine": "..."})

Unfinished cells are left out and named. Nothing is drawn or trained here.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.data import METRICS, PRIMARY, SECOND, Ablation, Cell, average_precision, load
from experiments.page import (
    Block,
    Charts,
    Code,
    DifferenceRow,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    curve_panel,
    difference_plot,
    markdown,
    page,
)
from experiments.sizes import AREAS, in_areas
from experiments.statistics import POWER, Comparison, Run, image_bootstrap_seeds, paired_differences, seeds_needed
from experiments.trials import UNTOUCHED
from utils.config import UserError
from utils.data import load_dataset
from utils.files import write_texts
from utils.labels import image_files

__all__ = ["load", "write"]

COSTS = {
    "parameters": "parameters",
    "gflops": "GFLOPs",
    "latency_ms": "latency, ms",
    "latency_ratio": "latency against the first arm's",
    "memory_mb": "memory of one image, MB",
    "tensors": "tensors transferred",
    "percent": "% of parameters transferred",
}
SIZE_LIMITS = {
    "all": "all",
    "small": "small, below 32² px",
    "medium": "medium, 32² to 96² px",
    "large": "large, 96² px and more",
}
CLASSES_SHOWN = 10
LEAST_HEIGHT = 0.01  # of the axis of learning curves, where all of them are lower
SHOWN = 0.0005  # the least score or difference that three digits show
NOTHING_FOUND = (
    f"No arm found anything: every {SECOND} and {PRIMARY} is below {SHOWN}, so there is nothing to compare. Train for"
    " more epochs, at a larger --img, or start from --weights."
)
RESAMPLES = 300  # of the images: half an interval is then off by a tenth or so, with 1,000 by a twentieth
MISSING = "-"


def write(
    ablation: Ablation,
    folder: str | Path,
    *,
    command: str,
    environment: Mapping[str, str],
    pictures: Sequence[tuple[str, Path]] = (),
    resamples: int = RESAMPLES,
) -> tuple[Path, Path, Path]:
    """Write `report.md`, `results.csv` and `report.html` into a folder; their paths.

    Each replaces the old one in a single step, and none is touched before all three are on the disk.

    Args:
        command: what repeats the ablation, as typed.
        environment: versions, machine, commit and the like, by name.
        pictures: (caption, JPEG or PNG file); files that do not exist are left out.
        resamples: of the images, for their interval. With 5 arms x 8 seeds of 32 images, 100 take ten seconds.
    """
    folder = Path(folder)
    title = f"Ablation: {ablation.folder.resolve().name}"
    blocks = [
        *_results(ablation, resamples),
        *_costs(ablation),
        *_charts(ablation),
        *_sizes(ablation),
        *_classes(ablation),
        *_gates(ablation),
        *_pictures(pictures),
        *_every_seed(ablation),
        *_how(ablation, command, environment),
    ]
    files = folder / "report.md", folder / "results.csv", folder / "report.html"
    texts = markdown(title, blocks, folder), _results_csv(ablation), page(title, blocks)
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(dict(zip(files, texts)))
    return files


def _results_csv(ablation: Ablation) -> str:
    """One row per cell, numbers unrounded."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    crossed = any(cell.split is not None for cell in _cells(ablation))
    table.writerow(["arm", *(["split"] if crossed else []), "seed", *METRICS, "seconds"])
    for cell in _cells(ablation):
        seconds = cell.seconds if math.isfinite(cell.seconds) else ""
        run = [cell.split, cell.seed] if crossed else [cell.seed]
        table.writerow([cell.arm, *run, *(cell.scores[name] for name in METRICS), seconds])
    return text.getvalue()


def _cells(ablation: Ablation) -> list[Cell]:
    return [cell for cells in ablation.cells.values() for cell in cells.values()]


# ------------------------------------------------------------------------------------------------------------- numbers


def _number(value: float, digits: int = 3, sign: str = "-") -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}" if math.isfinite(value) else MISSING


def _difference(value: float) -> str:
    return _number(value, sign="+")


def _interval(ends: tuple[float, float]) -> str:
    return f"{_difference(ends[0])} to {_difference(ends[1])}" if math.isfinite(ends[0]) else MISSING


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    if not values:
        return MISSING
    deviation = f" ± {_number(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return _number(float(np.mean(values))) + deviation


def _mean(values: Iterable[float]) -> float:
    """The mean of the finite ones, NaN for none."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def run_name(run: Run) -> str:
    """`3` for a seed, `split 2 seed 1` where they are crossed."""
    return f"split {run[0]} seed {run[1]}" if isinstance(run, tuple) else str(run)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _p(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-4 else "< 0.0001"


def _cost(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return MISSING if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _cost_and_interval(costs: Mapping[str, Any], key: str) -> str:
    """A cost, and its interval where `arms.json` has one."""
    low, high = costs.get(f"{key}_low"), costs.get(f"{key}_high")
    ends = f" ({_cost(low)} to {_cost(high)})" if low is not None and high is not None else ""
    return _cost(costs.get(key)) + ends


# ---------------------------------------------------------------------------------------------------- answer and tables


def _results(ablation: Ablation, resamples: int) -> list[Block]:
    """The answer in words, then the scores and the comparisons."""
    first, second = ablation.compare(PRIMARY), ablation.compare(SECOND)
    images, remembered = _judged_on(ablation)
    empty = _nothing_found(ablation)
    headline = NOTHING_FOUND if empty else _headline(first)
    blocks: list[Block] = [Text(headline, warning=empty or not first)]
    if remembered:
        blocks.append(Text(remembered, warning=True))
    blocks.append(Text(_recipe_in_words(ablation, images)))
    if first and not empty:
        blocks += [Items([c.sentence(PRIMARY) for c in first]), *_references_in_words(ablation)]
        blocks += [Text(f"And in {SECOND}, which does not decide:"), Items([c.sentence(SECOND) for c in second])]
    blocks += _caveats(ablation)
    rows = [
        [arm, str(len(cells)), *(_spread([cell.scores[name] for cell in cells.values()]) for name in METRICS)]
        for arm, cells in ablation.cells.items()
    ]
    caption = "Mean ± standard deviation over seeds. Precision and recall are at the confidence with the best mean F1."
    blocks += [Heading("Results"), Table(caption, ["arm", "seeds", *METRICS], rows)]
    if not empty:
        blocks += _tests(ablation, first, second, resamples)
    return blocks


def _tests(
    ablation: Ablation, first: Sequence[Comparison], second: Sequence[Comparison], resamples: int
) -> list[Block]:
    """The comparisons, what they could have found, and the arms that are only shown."""
    blocks: list[Block] = []
    if first:
        over_images = {} if ablation.fresh else {c.arm: image_interval(ablation, c.arm, resamples) for c in first}
        unit = first[0].unit
        images = (
            f"the one over images ({resamples} draws of the {len(ablation.images)} images) takes the {unit}s as given."
            if over_images
            else f"every {unit} has images of its own, so it covers their luck, too."
        )
        caption = (
            f"{PRIMARY}: arm minus the arm it is compared with, within each {unit}. {ablation.rule.in_words()}"
            f" Both p are corrected for all {_count(len(first), 'comparison')}. The intervals only describe: the one"
            f" over {unit}s inverts the sign-flip test; {images}"
        )
        caption_second = f"{SECOND}: the same, corrected within this table. It does not decide."
        blocks += [_comparisons(caption, first, over_images), _comparisons(caption_second, second, {})]
        blocks.append(_power(first))
    references = ablation.compare_references(PRIMARY)
    if references:
        caption = (
            f"{PRIMARY} of arms that are no comparison of this ablation, against '{ablation.baseline}': p is not"
            " corrected, and nothing is decided by it."
        )
        rows = [[c.arm, str(c.n), _difference(c.mean), _interval(c.interval), _wins(c), _p(c.p)] for c in references]
        header = ["arm", f"{references[0].unit}s", "difference", "95 % interval", "higher in", "p"]
        blocks.append(Table(caption, header, rows))
    return blocks


def _power(comparisons: Sequence[Comparison]) -> Table:
    """What the table could have found, from its own spread."""
    rule, unit = comparisons[0].rule, comparisons[0].unit
    caption = (
        f"What these {unit}s could show, if the spread of the differences is the true one and they are normal:"
        f" 'detectable' is the smallest true difference that is called better or worse in {POWER:.0%} of such"
        f" ablations, and the next column how often an arm that does not differ is called equivalent within"
        f" {rule.margin:g}. 'Chance to be higher' is that of one new {unit}, with its exact 95 % interval."
    )
    rows = []
    for c in comparisons:
        share, low, high = c.superiority
        chance = f"{share:.0%} ({low:.0%} to {high:.0%})" if c.n else MISSING
        power = f"{c.chance_of_equivalence:.0%}" if c.n > 1 else MISSING
        rows.append([c.arm, _number(c.spread), _number(c.detectable), power, _wins(c), chance])
    header = ["arm", "standard deviation", "detectable", "equivalence found", "higher in", "chance to be higher"]
    return Table(caption, header, rows)


def _wins(comparison: Comparison) -> str:
    return f"{comparison.wins} of {comparison.n}"


def _references_in_words(ablation: Ablation) -> list[Block]:
    """The arms that are only shown, in a sentence each."""
    sentences: list[str] = []
    blocks: list[Block] = []
    for c in ablation.compare_references(PRIMARY):
        if c.n:
            means = f"{_difference(c.mean)} against {c.baseline}"
            sentences.append(f"{c.arm}: {PRIMARY} {means}, higher in {_wins(c)} {c.unit}s; shown, not judged.")
        if c.arm == UNTOUCHED and c.mean >= ablation.rule.least:
            harm = f"the untouched checkpoint is {_difference(c.mean)} above '{c.baseline}' in {PRIMARY}"
            blocks.append(
                Text(f"This recipe harms what it starts from: {harm}, in {_wins(c)} {c.unit}s.", warning=True)
            )
    return [*([Items(sentences)] if sentences else []), *blocks]


def _caveats(ablation: Ablation) -> list[Block]:
    """What a reader has to hold against the numbers."""
    blocks: list[Block] = []
    diverged = [f"{cell.arm} {run_name(cell.run)}" for cell in _cells(ablation) if cell.diverged]
    if diverged:
        blocks.append(
            Text(f"The training diverged, which counts as a score of 0: {', '.join(diverged)}.", warning=True)
        )
    for look in ablation.looks:
        seen = f"{look.done} of {look.cells} cells done"
        blocks.append(Text(f"A report was made before the end: {look.time}, {seen}.", warning=True))
    if ablation.unfinished:
        blocks.append(Text(f"Begun, but not done, and left out: {', '.join(ablation.unfinished)}.", warning=True))
    added = {cell.seed for cell in _cells(ablation)} - set(ablation.planned)
    if ablation.planned and added:
        blocks.append(
            Text(
                f"Begun with {len(ablation.planned)} seeds, and {len(added)} were added later. The p are right only if"
                " that was decided before the first report was read: adding seeds until a difference shows finds one.",
                warning=True,
            )
        )
    return blocks


def _nothing_found(ablation: Ablation) -> bool:
    """Whether there are finished cells and all of their scores would be shown as 0.000."""
    cells = _cells(ablation)
    return bool(cells) and all(cell.scores[name] < SHOWN for cell in cells for name in (PRIMARY, SECOND))


def _headline(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "There is only one arm, so nothing is compared."
    needed, count, unit = seeds_needed(len(comparisons)), len(comparisons), comparisons[0].unit
    if not any(c.enough for c in comparisons):
        most = max(c.n for c in comparisons)
        return (
            f"Nothing can be claimed: an arm shares at most {_count(most, f'finished {unit}')} with its baseline, and"
            f" {_count(count, 'comparison')} would need at least {needed}."
        )
    bases = list(dict.fromkeys(c.baseline for c in comparisons))
    groups = {
        word: [
            c.arm if len(bases) == 1 else f"{c.arm} (against {c.baseline})" for c in comparisons if _verdict(c) == word
        ]
        for word in ("better", "worse", "equivalent", "undecided")
    }
    parts = [f"{word}: {', '.join(arms)}" for word, arms in groups.items() if arms]
    rest = [c.arm for c in comparisons if not c.enough]
    parts += [f"too few {unit}s to say: {', '.join(rest)}"] if rest else []
    against = f"Against '{bases[0]}', by" if len(bases) == 1 else "By"
    return f"{against} {PRIMARY}: {'; '.join(parts)}."


def _verdict(comparison: Comparison) -> str:
    if comparison.enough:
        return comparison.verdict
    needed = seeds_needed(comparison.comparisons, comparison.rule.alpha)
    return f"too few {comparison.unit}s ({needed} needed)"


def _judged_on(ablation: Ablation) -> tuple[str, str]:
    """Which images the numbers are of, and a warning where they are those of the training."""
    data, count = ablation.recipe.get("data"), len(ablation.images)
    if ablation.fresh:
        return f"images that were drawn anew for each split, {count} different ones so far, none of them trained on", ""
    if ablation.folds:
        others = f"each seed trains on {ablation.folds - 1} of {ablation.folds} parts of the training images of {data}"
        return f"images held out: {others} and is judged on the other part ({count} different images so far)", ""
    try:
        train = {str(file) for file in image_files(load_dataset(str(data)).train)}
    except UserError:
        return f"the {count} val images of {data}; whether it trains on others could not be looked up here", ""
    if train & ablation.images.keys():
        warning = (
            "Judged on images that were trained on: the numbers show how much is remembered and say nothing about new"
            " images. Repeat with --folds 4."
        )
        return f"the {count} val images of {data}, which are among its training images", warning
    return f"the {count} val images of {data}, none of which is trained on", ""


def _recipe_in_words(ablation: Ablation, images: str) -> str:
    recipe = ablation.recipe
    known = {"epochs": "epoch", "imgsz": "pixel"}
    shared = [_count(recipe[key], noun) for key, noun in known.items() if isinstance(recipe.get(key), int)]
    if "weights" in recipe:
        shared.append(f"starting from {recipe['weights'] or 'random weights'}")
    trainings = _count(len(_cells(ablation)), "finished training")
    return (
        f"{_count(len(ablation.arms), 'arm')}, {trainings} of one recipe ({', '.join(shared)})."
        f" The metric that decides is {PRIMARY} on {images}. The last epoch is judged, not the best one, which would"
        " have been chosen on the very images it is judged on."
    )


def image_interval(ablation: Ablation, arm: str, resamples: int) -> tuple[float, float]:
    """Of the difference between an arm and its baseline, if other images had been drawn."""
    numbers = ablation.images
    pairs = [(base.boxes.judged(numbers), cell.boxes.judged(numbers)) for base, cell in ablation.pairs(arm)]
    return image_bootstrap_seeds(pairs, average_precision, same_images=True, resamples=resamples)


def _comparisons(
    caption: str, comparisons: Sequence[Comparison], over_images: Mapping[str, tuple[float, float]]
) -> Table:
    unit = f"{comparisons[0].unit}s"
    header = ["arm", "against", unit, "difference", f"95 % interval over {unit}"]
    header += ["95 % interval over images"] if over_images else []
    header += ["p of a difference", "p of equivalence", "verdict"]
    rows = []
    for c in comparisons:
        images = [_interval(over_images[c.arm])] if over_images else []
        tests = [_p(c.p_holm), _p(c.p_equal_holm)] if c.n else [MISSING, MISSING]
        row = [c.arm, c.baseline, str(c.n), _difference(c.mean), _interval(c.interval)]
        rows.append([*row, *images, *tests, _verdict(c)])
    return Table(caption, header, rows)


def _costs(ablation: Ablation) -> list[Block]:
    known = {key: name for key, name in COSTS.items() if any(key in costs for costs in ablation.costs.values())}
    rows = []
    for arm, cells in ablation.cells.items():
        seconds = [cell.seconds for cell in cells.values() if math.isfinite(cell.seconds)]
        median = f"{np.median(seconds):,.0f}" if seconds else MISSING
        costs = ablation.costs.get(arm, {})
        rows.append([arm, *(_cost_and_interval(costs, key) for key in known), median])
    caption = "What an arm costs, and how much of it came from the checkpoint. Seconds: the median over cells."
    if any("latency_ms_low" in costs for costs in ablation.costs.values()):
        caption += (
            " Latency: the median of single images, the arms taking turns, with its 95 % interval; ratios are taken"
            " within a turn."
        )
    return [Heading("Cost"), Table(caption, ["arm", *known.values(), "seconds per cell"], rows)]


# -------------------------------------------------------------------------------------------------- charts and details


def _charts(ablation: Ablation) -> list[Block]:
    trained = {arm: [cell.curve for cell in cells.values() if len(cell.curve)] for arm, cells in ablation.cells.items()}
    curves = {arm: of_arm for arm, of_arm in trained.items() if of_arm}
    if not curves:
        return []
    everything = [curve for of_arm in curves.values() for curve in of_arm]
    highest = max((float(np.nanmax(curve)) for curve in everything if np.isfinite(curve).any()), default=0.0)
    extent, baseline = (max(map(len, everything)), max(highest, LEAST_HEIGHT)), ablation.baseline
    panels = [
        (
            f"{arm} ({_count(len(of_arm), 'seed')})",
            curve_panel(
                f"{SECOND} of {arm} over the epochs",
                of_arm,
                curves.get(baseline, []) if arm != baseline else [],
                extent,
            ),
        )
        for arm, of_arm in curves.items()
    ]
    caption = (
        f"{SECOND} on the val images after each epoch: mean over seeds, and a band from the lowest to the highest seed."
        f" Dashed: the mean of '{baseline}'. The bands include what differs between seeds for every arm alike."
    )
    rows: list[DifferenceRow] = []
    for c in [] if _nothing_found(ablation) else ablation.compare(PRIMARY):
        by_seed = paired_differences(ablation.values(PRIMARY), c.baseline, c.arm)
        rows.append(DifferenceRow(c.arm, by_seed, c.mean, c.interval))
    label = f"difference in {PRIMARY} to the arm compared with"
    against = "the arm it is compared with" if set(ablation.against.values()) - {baseline} else f"'{baseline}'"
    dots = f"A dot per seed: {PRIMARY} minus that of {against}. Diamond: their mean; bar: 95 % interval over seeds."
    curves_block: list[Block] = [Heading("Learning curves"), Charts(caption, panels)]
    if not any(row.by_seed for row in rows):
        return curves_block
    plot = Charts(dots, [(label, difference_plot(label, rows))])
    return [Heading("Differences within each seed"), plot, *curves_block]


def _sizes(ablation: Ablation) -> list[Block]:
    counts = in_areas(ablation.labels[:, 1:]).sum(1)
    header = [f"{SIZE_LIMITS[name]} ({_count(int(n), 'label')})" for name, n in zip(AREAS, counts)]
    of_baseline = [cell.boxes.per_size for cell in ablation.cells[ablation.baseline].values()]
    rows = [[ablation.baseline, *(_number(_mean(scores[name] for scores in of_baseline)) for name in AREAS)]]
    for arm in list(ablation.arms)[1:]:
        pairs = [(base.boxes.per_size, cell.boxes.per_size) for base, cell in ablation.pairs(arm)]
        rows.append([arm, *(_difference(_mean(ours[name] - theirs[name] for theirs, ours in pairs)) for name in AREAS)])
    caption = (
        f"{PRIMARY} by object size, area of the box in the original image. First row: the baseline; below: mean"
        " difference to the arm compared with, within each seed. As COCO's evaluation computes it: found objects of"
        " other sizes are neither hits nor false alarms, and precision is 0 above the highest recall. So the first"
        " column differs from the table above, and each size is the mean of the classes that have labels of that size."
        " Untested."
    )
    return [Heading("By object size"), Table(caption, ["arm", *header], rows)]


def _classes(ablation: Ablation) -> list[Block]:
    """The classes that changed most in any arm."""
    others = list(ablation.arms)[1:]
    names: dict[str, int] = {}  # to the class index
    for cell in _cells(ablation):
        names.update(zip(cell.per_class, cell.boxes.classes.tolist()))
    changes = {
        name: [
            _mean(
                cell.per_class[name] - base.per_class[name]
                for base, cell in ablation.pairs(arm)
                if name in cell.per_class and name in base.per_class
            )
            for arm in others
        ]
        for name in names
    }
    largest = {name: max(map(abs, filter(math.isfinite, row)), default=0.0) for name, row in changes.items()}
    top = sorted((name for name in names if largest[name] >= SHOWN), key=lambda name: -largest[name])[:CLASSES_SHOWN]
    rows = []
    for name in top:
        of_baseline = (
            cell.per_class[name] for cell in ablation.cells[ablation.baseline].values() if name in cell.per_class
        )
        count = int((ablation.labels[:, 0] == names[name]).sum())
        rows.append([name, f"{count:,}", _number(_mean(of_baseline)), *map(_difference, changes[name])])
    caption = (
        f"The {len(top)} of {len(names)} classes whose {PRIMARY} changed most in some arm, mean difference within each"
        " seed. They are here because they are extreme: single classes of a small set, of few labels, are mostly noise."
    )
    header = ["class", "labels", ablation.baseline, *others]
    return [Heading("By class"), Table(caption, header, rows)] if rows else []


def _gates(ablation: Ablation) -> list[Block]:
    """Tables of `models.gates.inspect`: rows of cells, the header first; and its pictures."""
    blocks: list[Block] = []
    for arm, costs in ablation.costs.items():
        if costs.get("gates"):
            header, *rows = costs["gates"]
            blocks.append(Table(arm, header, rows))
            picture = ablation.folder / Path(str(costs.get("gates_picture"))).name
            if picture.is_file():
                blocks.append(Picture(f"{arm}: what its first seed's gates multiply each channel by", picture))
    return [Heading("What the gates do"), *blocks] if blocks else []


def _pictures(pictures: Sequence[tuple[str, Path]]) -> list[Block]:
    there = [Picture(caption, Path(file)) for caption, file in pictures if Path(file).is_file()]
    return [Heading("Pictures"), *there] if there else []


def _every_seed(ablation: Ablation) -> list[Block]:
    rows = [
        [cell.arm, run_name(cell.run), *(_number(cell.scores[name], 4) for name in METRICS), _number(cell.seconds, 0)]
        for cell in sorted(_cells(ablation), key=lambda cell: cell.run)
    ]
    caption = "Every finished cell, seed by seed; results.csv has the same numbers unrounded."
    return [Heading("Every seed"), Table(caption, ["arm", "seed", *METRICS, "seconds"], rows)]


def _registration(ablation: Ablation) -> list[Block]:
    """What was settled before the first cell, and that it was."""
    if not ablation.registered:
        return []
    stated = {key: ablation.registered.get(key) for key in ("registered", "decides", "seeds", "split_seeds", "folds")}
    environment = ablation.registered.get("environment")
    where = {f"then: {key}": value for key, value in environment.items()} if isinstance(environment, dict) else {}
    compared = "; ".join(f"{arm} against {baseline}" for arm, baseline in ablation.against.items())
    rows = {
        **{k: v for k, v in stated.items() if v},
        "comparisons": compared,
        "rule": ablation.rule.in_words(),
        **where,
    }
    caption = "Written into preregistered.yaml before the first cell; every cell carries that file's checksum."
    table = Table(caption, ["what", "value"], [[name, str(value)] for name, value in rows.items()])
    return [Heading("Registered beforehand"), table]


def _how(ablation: Ablation, command: str, environment: Mapping[str, str]) -> list[Block]:
    arms = [
        [arm, " ".join(f"{key}={value}" for key, value in options.items())] for arm, options in ablation.arms.items()
    ]
    recipe = {"folds": ablation.folds, **ablation.recipe}
    return [
        *_registration(ablation),
        Heading("How to repeat it"),
        Code("The command", command),
        Table("In what the arms differ; the first is the baseline.", ["arm", "options"], arms),
        Table("Where it ran.", ["what", "value"], [[name, str(value)] for name, value in environment.items()]),
        Code("What all arms share", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), folded=True),
    ]
