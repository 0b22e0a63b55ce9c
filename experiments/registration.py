"""What was settled before the first run of an ablation, and who looked at its results before the last one."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from utils.config import UserError, display_path, read_yaml
from utils.files import write_yaml

FILE, LOOKS = "preregistered.yaml", "looks.csv"
MAX_LOOKS_BYTES = 2**20
MOVE_AWAY = "Put the old file back, or start anew under another --name."


@dataclass(frozen=True)
class Look:
    """A report that was asked for before all cells were done."""

    time: str  # ISO 8601, UTC
    done: int
    cells: int


def now() -> str:
    """The time as ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def register(folder: Path, fixed: Mapping[str, Any], environment: Mapping[str, str], command: str) -> None:
    """Write down the recipe, comparisons and rule before the first cell; what is registered stays as it is.

    The recipe of an ablation is written after this, and a cell begins after that: without a recipe nothing has begun.
    """
    file = folder / FILE
    if file.exists() and (folder / "recipe.yaml").exists():
        return
    stated = {"decides": "mAP50-95 of the last epoch", **fixed}
    write_yaml(file, {"registered": now(), "command": command, "environment": dict(environment), **stated})


def digest(folder: Path) -> str:
    """The name of what is registered, which every cell carries; empty where nothing is."""
    file = folder / FILE
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


def registered(folder: Path, recipe: Mapping[str, Any], cells: Mapping[Path, str]) -> dict[str, Any]:
    """What is registered for an ablation; empty for one begun before registrations were written.

    Args:
        folder: of the ablation.
        recipe: its recipe.yaml.
        cells: by its file, the digest that each finished cell carries.

    Raises:
        UserError: the registration is not that of a cell, or its comparisons, rule or arms are not the recipe's.
    """
    present = digest(folder)
    for file, carried in cells.items():
        if carried != present:
            raise UserError(
                f"{display_path(folder / FILE)}: was changed after {display_path(file.parent)} was trained under it."
                f" {MOVE_AWAY}"
            )
    if not present:
        return {}
    data = dict(read_yaml(folder / FILE).data)
    changed = [key for key in ("against", "rule", "arms") if data.get(key) != recipe.get(key)]
    if changed:
        raise UserError(f"{display_path(folder / 'recipe.yaml')}: {', '.join(changed)}: not as in {FILE}. {MOVE_AWAY}")
    return data


def note_look(folder: Path, done: int, cells: int) -> None:
    """Remember that a report was made with so many of the cells done; nothing where all are."""
    if done >= cells:
        return
    file = folder / LOOKS
    new = not file.exists()
    with file.open("a", encoding="utf-8") as lines:
        lines.write(("time,done,cells\n" if new else "") + f"{now()},{done},{cells}\n")


def looks(folder: Path) -> list[Look]:
    """Every report before the end, oldest first.

    Raises:
        UserError: the file is not as it was written.
    """
    file = folder / LOOKS
    if not file.exists():
        return []
    try:
        if file.stat().st_size > MAX_LOOKS_BYTES:
            raise ValueError(f"more than {MAX_LOOKS_BYTES:,} bytes")
        with file.open(encoding="utf-8", newline="") as lines:
            return [Look(row["time"][:40], int(row["done"]), int(row["cells"])) for row in csv.DictReader(lines)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{display_path(file)}: not as ablate.py writes it ({error}). {MOVE_AWAY}") from None
