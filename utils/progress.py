"""Progress on a terminal of any width: bars, the rows of the training table, and the table of a validation.

A bar is shown on a terminal only. In a file or a pipe its updates would be hundreds of lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

DEFAULT_WIDTH = 80  # of a terminal that does not tell its own
# What a bar says after its title, the most informative first; the first that fits is shown.
TAILS = (
    "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
    "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {remaining} left",
    "{percentage:3.0f}%|{bar:9}| {remaining} left",
    "{percentage:3.0f}%|{bar:5}| {remaining}",
    "{percentage:3.0f}%",
)
TITLE_ROOM = 30  # columns that a title leaves for the rest
TRAIN_COLUMNS = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size")
TABLE_NAME_WIDTH, TABLE_CELL_WIDTH, TABLE_CELLS = 22, 11, 6


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that a stream (the standard output) writes to; None where it is a file or a pipe.

    `COLUMNS` can only make it narrower: an exported value may be older than the window's size.
    """
    stream = sys.stdout if stream is None else stream
    try:
        if not stream.isatty():
            return None
        real = os.get_terminal_size(stream.fileno()).columns
    except (AttributeError, OSError, ValueError):  # a stand-in for a stream, closed, or a console without a size
        return None
    named = os.environ.get("COLUMNS", "")
    wanted = int(named) if named.isascii() and named.isdigit() else 0
    return min(filter(None, (real, wanted)), default=DEFAULT_WIDTH)


class Bar(tqdm):  # type: ignore[type-arg]
    """Iterates over `items` and shows how far it is on the standard error, in one line that fits the terminal.

    Nothing is shown where `show` is false or the standard error is not a terminal. The bar is removed at the end.

        for batch in Bar(loader, "Validating"):
    """

    def __init__(
        self, items: Iterable[Any], title: str | EpochRow, *, total: int | None = None, show: bool = True
    ) -> None:
        self.title = title
        hidden = not show or terminal_width(sys.stderr) is None
        super().__init__(items, total=total, leave=False, disable=hidden, file=sys.stderr)

    def __str__(self) -> str:
        # The last column stays free: a terminal may begin a new line once it is written.
        return self.line((terminal_width(self.fp) or DEFAULT_WIDTH) - 1)

    def line(self, width: int) -> str:
        """The bar in at most `width` columns."""
        row = self.title
        title = f"{row.text(width)} " if isinstance(row, EpochRow) else f"{_shortened(row, width - TITLE_ROOM)}: "
        meter = {**self.format_dict, "ncols": None, "prefix": ""}
        lines = (title + self.format_meter(**{**meter, "bar_format": tail}) for tail in TAILS)
        fitting = next((line for line in lines if disp_len(line) <= width), title)
        return str(disp_trim(fitting, width))


def _shortened(text: str, room: int) -> str:
    """The text without its middle where it is wider than `room` columns; a Chinese character takes two."""
    half = max((room - 3) // 2, 1)
    while half > 1 and disp_len(f"{text[:half]}...{text[-half:]}") > room:
        half -= 1
    return text if disp_len(text) <= room else f"{text[:half]}...{text[-half:]}"


# ----------------------------------------------------------------------------------------------------- training's table


@dataclass(frozen=True)
class Layout:
    """Which columns of the training table are shown from a width on, under which headings, and how wide each is."""

    least: int
    columns: tuple[int, ...]  # places in TRAIN_COLUMNS
    headings: tuple[str, ...]
    widths: tuple[int, ...]
    digits: int = 3  # of a loss

    def loss(self, value: float) -> str:
        """A loss with as many digits as there is room for: `0.0412`, `1.2e-05`."""
        text = f"{value:.{self.digits}g}"
        return text if len(text) < 8 else f"{value:.2g}"

    def line(self, cells: Sequence[str]) -> str:
        """The cells of all columns as one line of those that are shown."""
        return "".join(f" {cells[i]:>{width - 1}}" for i, width in zip(self.columns, self.widths))


EVERY = tuple(range(len(TRAIN_COLUMNS)))
LAYOUTS = (
    Layout(129, EVERY, TRAIN_COLUMNS, (11,) * 7, digits=4),  # YOLOv5's
    Layout(112, EVERY, TRAIN_COLUMNS, (9, 8, 9, 9, 9, 10, 6)),
    Layout(79, EVERY, ("Epoch", "GPU_mem", "box", "obj", "cls", "Inst", "Size"), (8, 8, 8, 8, 8, 6, 6)),
    Layout(59, (0, 2, 3, 4), ("Epoch", "GPU_mem", "box", "obj", "cls", "Inst", "Size"), (8, 8, 8, 8)),
    Layout(0, (0,), TRAIN_COLUMNS, (8,)),
)


def train_layout(width: int | None) -> Layout:
    """The layout of the training table for `width` columns; all of it where nothing limits the width."""
    return next(layout for layout in LAYOUTS if width is None or width >= layout.least)


@dataclass(frozen=True)
class EpochRow:
    """One row of the training table: mean losses so far, then labels and image width of the last batch."""

    epoch: int
    epochs: int
    memory: float = 0.0  # GB that torch holds on the GPU
    losses: tuple[float, ...] = ()
    instances: int | None = None
    size: int | None = None

    def text(self, width: int | None = None) -> str:
        """The row in the layout for `width` columns."""
        layout = train_layout(width)
        losses = [layout.loss(loss) for loss in self.losses] or [""] * 3
        ends = ["" if value is None else str(value) for value in (self.instances, self.size)]
        return layout.line([f"{self.epoch}/{self.epochs - 1}", f"{self.memory:.3g}G", *losses, *ends])


def train_header(width: int | None = None) -> str:
    """The headings above the rows of a width."""
    layout = train_layout(width)
    return layout.line(layout.headings)


# ----------------------------------------------------------------------------------------------- tables of a validation


def fit_table(lines: Sequence[str], width: int | None) -> list[str]:
    """The lines of a validation's table in at most `width` columns: names cut at their end, numbers closer together.

    A line is a name in 22 columns and six numbers in 11 columns each; names may contain spaces.
    """
    if width is None or all(len(line) <= width for line in lines):
        return list(lines)
    rows = [line.strip().rsplit(maxsplit=TABLE_CELLS) for line in lines]
    columns = range(1, TABLE_CELLS + 1)
    least = [max(len(row[i]) for row in rows) + 1 for i in columns]
    name = max(len(row[0]) for row in rows)
    spare = max(width - sum(least) - name, 0) // TABLE_CELLS  # a name is cut only where the numbers stand close
    widths = [min(cell + spare, TABLE_CELL_WIDTH) for cell in least]
    name = max(min(name, TABLE_NAME_WIDTH, width - sum(widths)), 1)
    return [f"{row[0][:name]:>{name}}" + "".join(f"{row[i]:>{widths[i - 1]}}" for i in columns) for row in rows]


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any: `1:05`, `2:00:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---------------------------------------------------------------------------------------------------- the log of epochs


class EpochLog:
    """What the log says of each epoch: headings, a row and the validation's table on a terminal, elsewhere one line.

    log.begin(); log.trained(row, batches); log.finished(row, scores, table)
    """

    scores = ("P", "R", "mAP50", "mAP50-95", "Time")

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.width, self.headed, self.begun = say, terminal_width(), False, time.monotonic()

    def begin(self) -> None:
        """An epoch begins."""
        self.width, self.begun = terminal_width(), time.monotonic()
        if self.width is not None:
            self.say(f"\n{train_header(self.width - 1)}")
        elif not self.headed:
            self.say(f"\n{train_header()}{''.join(f'{name:>11}' for name in self.scores)}")
            self.headed = True

    def trained(self, row: EpochRow, batches: int) -> None:
        """All batches of the epoch were trained on."""
        if self.width is not None:
            line = f"{row.text(self.width - 1)}  {batches} batches in {clock(time.monotonic() - self.begun)}"
            self.say(line[: self.width - 1])

    def finished(self, row: EpochRow, scores: Sequence[float], table: Sequence[str]) -> None:
        """The epoch was judged: precision, recall, mAP50 and mAP50-95, and the same as a table; both may be empty."""
        if self.width is None:
            cells = [f"{score:.3g}" for score in scores] or ["-"] * 4
            time_taken = clock(time.monotonic() - self.begun)
            self.say(row.text() + "".join(f"{cell:>11}" for cell in (*cells, time_taken)))
        elif table:
            self.say("\n".join(fit_table(table, self.width - 1)))
