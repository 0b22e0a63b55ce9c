"""A report's blocks as one HTML page without scripts or anything from outside, as Markdown, and its charts as SVG.

Colours are CSS variables, so that charts follow light and dark; every text is escaped here and nowhere else.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from utils.config import UserError, display_path

IMAGE_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}
PANEL_WH, ROW_WIDTH, ROW_HEIGHT = (300, 190), 400, 58  # user units; about CSS pixels on a phone
LONG_CELL = 32  # characters from which the cells of a column are broken into lines
PHONE = 328  # width of a small phone's page in CSS pixels
CHARACTER, CELL_PADDING, LONGEST_NAME = 7.8, 22.4, 20  # of tables, as STYLE has it; a name's letters
LEAST_SPAN = 0.001  # of an axis of differences, to either side of 0
LONGEST_LABEL = 50  # characters that fit into ROW_WIDTH
EDGES_LRTB = (52, 10, 8, 34)  # room around a panel for its axes: left, right, top, bottom

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --muted: #59636e; --line: #d1d9e0; --soft: #f3f5f7;
  --accent: #0063a6; --warn: #8a3b00; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --fg: #e6e9ec; --muted: #9aa5b1; --line: #38414b;
  --soft: #1d232a; --accent: #62b7f0; --warn: #f2ab6d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--bg); color: var(--fg);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.25; text-wrap: balance; }
h2 { margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: 1.3rem; }
p, ul { max-width: 44rem; }
h1 + p { font-size: 1.15rem; font-weight: 600; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.warning { border-left: .25rem solid var(--warn); padding-left: .75rem; color: var(--warn); font-weight: 600; }
figure { margin: 1.25rem 0; }
figcaption { max-width: 44rem; margin-bottom: .5rem; color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; line-height: 1.25rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3125rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; background: var(--soft); }
th:first-child { position: sticky; left: 0; text-align: left; background: var(--bg); max-width: 11rem;
  white-space: normal; overflow-wrap: break-word; }
thead th:first-child { background: var(--soft); }
@media (min-width: 48rem) { th:first-child { max-width: 18rem; } }
.words, .long { text-align: left; }
td.words { white-space: normal; min-width: 6rem; }
td.long { white-space: normal; min-width: 14rem; }
@media (max-width: 40rem) {
  .stack, .stack tbody { display: block; width: 100%; }
  .stack thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stack tr { display: grid; grid-template-columns: 1fr 1fr; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .stack tbody th { grid-column: 1 / -1; position: static; max-width: none; }
  .stack tbody th, .stack td { border: 0; padding: .15rem .5rem; }
  .stack td { text-align: left; white-space: normal; }
  .stack td::before { content: attr(data-label); display: block; color: var(--muted); font-size: .8rem; }
  .stack td.words { min-width: 0; }
  .stack td.long { grid-column: 1 / -1; min-width: 0; } }
pre { margin: 0; padding: .75rem; background: var(--soft); font-size: .85rem; }
summary { cursor: pointer; margin: 1rem 0 .5rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.panels figure { margin: 0; }
.panels figcaption { margin: 0; color: var(--fg); font-weight: 600; }
.wide { max-width: 36rem; }
svg, img { display: block; max-width: 100%; height: auto; }
svg { width: 100%; }
svg { fill: currentColor; font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); }
svg .zero { stroke: var(--fg); }
svg .tick { fill: var(--muted); }
svg .name { stroke: var(--bg); stroke-width: 3; paint-order: stroke; }
svg .band { fill: var(--accent); fill-opacity: .22; }
svg .mean { fill: none; stroke: var(--accent); stroke-width: 2.2; }
svg .base { fill: none; stroke: var(--fg); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .dot { fill: var(--accent); fill-opacity: .6; stroke: var(--bg); stroke-width: .7; }
svg .point { fill: var(--accent); }
svg .span { stroke: var(--accent); stroke-opacity: .4; stroke-width: 6; }
svg .whisker { stroke: var(--fg); stroke-width: 2; }
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The first column names the row; columns of numbers are set to the right, those with words to the left."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Charts:
    """SVG drawings made here, each under its label; the only strings that are not escaped."""

    caption: str
    panels: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    caption: str
    file: Path


@dataclass(frozen=True)
class Code:
    caption: str
    text: str
    folded: bool = False


Block = Heading | Text | Items | Table | Charts | Picture | Code


# ------------------------------------------------------------------------------------------------------------ the page


def page(title: str, blocks: Sequence[Block]) -> str:
    """The whole HTML file."""
    body = "\n".join(_block(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Text(text, warning):
            return f'<p class="warning">{escape(text)}</p>' if warning else f"<p>{escape(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
        case Table():
            return _table(block)
        case Charts(caption, panels):
            return f"<figure><figcaption>{escape(caption)}</figcaption>{_panels(panels)}</figure>"
        case Picture(caption, file):
            return f"<figure><figcaption>{escape(caption)}</figcaption>{_image(file, caption)}</figure>"
        case Code(caption, text, folded):
            code = _scroll(caption, f"<pre>{escape(text)}</pre>")
            if folded:
                return f"<details><summary>{escape(caption)}</summary>{code}</details>"
            return f"<figure><figcaption>{escape(caption)}</figcaption>{code}</figure>"


def _scroll(label: str, inside: str) -> str:
    """Scrolls sideways on its own; with a tab stop, so that a keyboard can do it, too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{inside}</div>'


def _table(table: Table) -> str:
    """A table that a phone can hold, or one whose rows become blocks there, each value under its column's name."""
    css = [_alignment(column) for column in zip(table.header, *table.rows)]
    stacked = _width(table) > PHONE
    head = "".join(f'<th scope="col"{c}>{_breakable(name)}</th>' for c, name in zip(css, table.header))
    labels = [f' data-label="{escape(name)}"' if stacked else "" for name in table.header]
    rows = []
    for name, *cells in table.rows:
        shown = "".join(f"<td{c}{label}>{escape(cell)}</td>" for c, label, cell in zip(css[1:], labels[1:], cells))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>')
    start = '<table class="stack">' if stacked else "<table>"
    inside = f"{start}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<figure><figcaption>{escape(table.caption)}</figcaption>{_scroll(table.caption, inside)}</figure>"


def _breakable(name: str) -> str:
    """A column's name as HTML, in which a line may also end after the signs that arms' names are made of."""
    return "<wbr>".join(escape(part) for part in _parts(name))


def _parts(name: str) -> list[str]:
    return re.split(r"(?<=[+@:/_])", name)


def _width(table: Table) -> float:
    """About how many CSS pixels the table needs: cells stay on one line, headers and the names of rows break."""
    columns = list(zip(table.header, *table.rows))[1:]
    names = min(max((len(row[0]) for row in table.rows), default=0), LONGEST_NAME)
    widths = [max(len(text) for text in (*" ".join(_parts(name)).split(" "), *cells)) for name, *cells in columns]
    return sum(width * CHARACTER + CELL_PADDING for width in [names, *widths])


def _alignment(column: Sequence[str]) -> str:
    """The class attribute of a column, its header first."""
    if any(len(cell) > LONG_CELL for cell in column[1:]):
        return ' class="long"'
    return ' class="words"' if any(cell[:1].isalpha() for cell in column[1:]) else ""


def _panels(panels: Sequence[tuple[str, str]]) -> str:
    if len(panels) == 1:
        return f'<div class="wide">{panels[0][1]}</div>'
    figures = (f"<figure><figcaption>{escape(label)}</figcaption>{svg}</figure>" for label, svg in panels)
    return f'<div class="panels">{"".join(figures)}</div>'


def _image(file: Path, caption: str) -> str:
    kind = IMAGE_TYPES.get(file.suffix.lower())
    if kind is None:
        raise UserError(f"{display_path(file)}: a report shows {', '.join(IMAGE_TYPES)} only.")
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<img alt="{escape(caption)}" src="data:{kind};base64,{data}">'


# ------------------------------------------------------------------------------------------------------------- Markdown


def markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as GitHub's Markdown; charts are left to the HTML page. Links start at `folder`."""
    return "\n\n".join([f"# {_plain(title)}", *(_markdown(block, folder) for block in blocks)]) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Text(text, warning):
            return f"**{_plain(text)}**" if warning else _plain(text)
        case Items(texts):
            return "\n".join(f"- {_plain(text)}" for text in texts)
        case Table(caption, header, rows):
            return f"{_plain(caption)}\n\n{table_markdown(header, rows)}"
        case Charts(caption):
            return f"{_plain(caption)} Drawn in [report.html](report.html)."
        case Picture(caption, file):
            return f"![{_plain(caption)}]({quote(Path(os.path.relpath(file, folder)).as_posix())})"
        case Code(caption, text):
            code = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
            return f"{_plain(caption)}:\n\n{code}"


def table_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as GitHub's Markdown, without its caption."""
    head, *body = ("| " + " | ".join(map(_plain, row)) + " |" for row in (header, *rows))
    return "\n".join([head, "| --- |" + " ---: |" * (len(header) - 1), *body])


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


# ---------------------------------------------------------------------------------------------------------- the charts


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within low..high, at most `most` steps apart; at least one."""
    rough = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _svg(size_wh: tuple[float, float], label: str, parts: Sequence[str]) -> str:
    width, height = size_wh
    title = escape(label)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _stack(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs (e,), from 1, that have any finite value, and the values (curves, e), NaN where a curve has ended."""
    table = np.full((len(curves), max(map(len, curves), default=0)), np.nan)
    for row, curve in zip(table, curves):
        row[: len(curve)] = curve
    table[~np.isfinite(table)] = np.nan
    some = np.isfinite(table).any(0)
    return np.flatnonzero(some) + 1, table[:, some]


def curve_panel(
    label: str, curves: Sequence[np.ndarray], baseline: Sequence[np.ndarray], extent: tuple[int, float]
) -> str:
    """Mean of the curves over epochs, a band from the lowest to the highest, and the baseline's mean dashed.

    Of a single epoch there are a point, a bar and a dashed line across.

    Args:
        extent: last epoch and highest value, the same for all panels that are to be compared.
    """
    (width, height), (left, right, top, bottom) = PANEL_WH, EDGES_LRTB
    last, highest = extent[0], max(extent[1], 1e-9)

    def x(epoch: float) -> float:
        along = (epoch - 1) / (last - 1) if last > 1 else 0.5
        return left + along * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - value / highest * (height - top - bottom)

    def path(epochs: np.ndarray, values: np.ndarray) -> str:
        return " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in zip(epochs, values))

    parts = []
    for value in ticks(0, highest, 4):
        parts += [
            _line("axis", left, y(value), width - right, y(value)),
            _text(left - 5, y(value) + 4, f"{value:g}", "end"),
        ]
    whole = [1, *(int(tick) for tick in ticks(1, last) if tick == int(tick) and tick > 1 + 0.1 * last)]
    parts += [_text(x(epoch), height - bottom + 15, str(epoch), "middle") for epoch in whole]
    parts.append(_text((left + width - right) / 2, height - 4, "epoch", "middle"))
    epochs, table = _stack(curves)
    if len(epochs) > 1 and len(curves) > 1:
        band = path(epochs, np.nanmax(table, 0)) + " " + path(epochs[::-1], np.nanmin(table, 0)[::-1])
        parts.append(f'<polygon class="band" points="{band}"/>')
    elif len(epochs) and len(curves) > 1:
        parts.append(_line("span", x(epochs[0]), y(np.nanmin(table)), x(epochs[0]), y(np.nanmax(table))))
    for css, group in (("base", baseline), ("mean", curves)):
        epochs, table = _stack(group)
        if not len(epochs):
            continue
        mean = np.nanmean(table, 0)
        if len(epochs) > 1:
            parts.append(f'<polyline class="{css}" points="{path(epochs, mean)}"/>')
        elif css == "base":
            parts.append(_line(css, left, y(mean[0]), width - right, y(mean[0])))
        else:
            parts.append(f'<circle class="point" cx="{x(epochs[0]):.1f}" cy="{y(mean[0]):.1f}" r="4"/>')
    return _svg(PANEL_WH, label, parts)


@dataclass(frozen=True)
class DifferenceRow:
    """One arm in the plot of differences: a value per seed, their mean and its interval (NaN where there is none)."""

    label: str
    by_seed: Mapping[int, float]
    mean: float
    interval: tuple[float, float]


def difference_plot(label: str, rows: Sequence[DifferenceRow]) -> str:
    """A dot per seed, a diamond at the mean, a bar over its interval, and a line at no difference."""
    values = [v for row in rows for v in (*row.by_seed.values(), *row.interval) if math.isfinite(v)]
    low, high = min([0.0, *values]), max([0.0, *values])
    if high - low < LEAST_SPAN:  # differences of nothing stay near the line
        low, high = -LEAST_SPAN, LEAST_SPAN
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    bottom = len(rows) * ROW_HEIGHT + 6

    def x(value: float) -> float:
        return 12 + (value - low) / (high - low) * (ROW_WIDTH - 24)

    parts = [_text(x(tick), bottom + 14, f"{tick:+g}" if tick else "0", "middle") for tick in ticks(low, high)]
    parts.append(_text(ROW_WIDTH / 2, bottom + 30, label, "middle"))
    for index, row in enumerate(rows):
        top = index * ROW_HEIGHT
        middle, below_name, end = top + 38, top + 22, bottom if row is rows[-1] else top + ROW_HEIGHT
        parts += [_line("axis", x(tick), below_name, x(tick), end) for tick in ticks(low, high) if tick]
        parts.append(_line("zero", x(0), below_name, x(0), end))
        short = row.label if len(row.label) <= LONGEST_LABEL else row.label[: LONGEST_LABEL - 1] + "…"
        parts.append(_text(12, top + 16, short, css="name"))
        for place, (seed, value) in enumerate(row.by_seed.items()):
            shift = 6 * (place % 3 - 1)  # dots of equal values stay visible
            about = f"<title>{escape(row.label)}, seed {seed}: {value:+.4f}</title>"
            parts.append(f'<circle class="dot" cx="{x(value):.1f}" cy="{middle + shift}" r="4">{about}</circle>')
        if math.isfinite(row.interval[0]):
            parts.append(_line("whisker", x(row.interval[0]), middle, x(row.interval[1]), middle))
        if math.isfinite(row.mean):
            corner = x(row.mean)
            parts.append(
                f'<path d="M{corner - 6:.1f} {middle}l6 -6 6 6 -6 6z"><title>mean {row.mean:+.4f}</title></path>'
            )
    return _svg((ROW_WIDTH, bottom + 38), label, parts)
