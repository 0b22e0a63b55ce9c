"""What a run leaves behind: options, results.csv, and TensorBoard where it is installed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.config import UserError, display_path
from utils.files import write_texts

COLUMNS = (
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",  # biases
    "x/lr1",
    "x/lr2",
)
NAMES = ("epoch", *COLUMNS)
MAX_BYTES = 2**26  # a row has 294: 200,000 epochs


class Recorder:
    """Writes one row per epoch to `results.csv`, in upstream's format, and the same numbers to TensorBoard.

    `start_epoch` above 0 continues a file: rows of that epoch and later, which an interrupted run may have written
    after its last checkpoint, are cut. The file is whole at any time: each epoch replaces it in one step.

    Raises:
        UserError: an old file that is not what was written here before `start_epoch`, or one that cannot be written.
    """

    def __init__(self, save_dir: Path, *, start_epoch: int = 0) -> None:
        self.file = save_dir / "results.csv"
        rows = _rows_before(self.file, start_epoch) if start_epoch and self.file.exists() else []
        self._lines = [",".join(f"{name:>20}" for name in NAMES), *rows]
        self._write()
        self._board = _summary_writer(save_dir, start_epoch)

    def log(self, epoch: int, values: Sequence[float]) -> None:
        """Append one epoch; `values` in the order of COLUMNS."""
        assert len(values) == len(COLUMNS)
        self._lines.append(",".join(f"{value:20.5g}" for value in (epoch, *values)))
        self._write()
        if self._board is not None:
            for name, value in zip(COLUMNS, values):
                self._board.add_scalar(name, value, epoch)

    def _write(self) -> None:
        write_texts({self.file: "\n".join(self._lines) + "\n"})

    def show_images(self, files: Sequence[Path], epoch: int) -> None:
        """Add pictures that exist to TensorBoard."""
        if self._board is None:
            return
        import cv2

        for file in files:
            image = cv2.imread(str(file)) if file.is_file() else None
            if image is not None:
                self._board.add_image(file.stem, image[..., ::-1].copy(), epoch, dataformats="HWC")

    @property
    def tensorboard(self) -> str:
        """The log's line on TensorBoard: how to look at this run and its neighbours."""
        look = f"tensorboard --logdir {shlex.quote(display_path(self.file.parent.parent))}"
        return (
            f"TensorBoard: {look}"
            if self._board is not None
            else (
                f"TensorBoard: not installed, so only results.csv is written. `pip install tensorboard`, then: {look}"
            )
        )

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _rows_before(file: Path, epoch: int) -> list[str]:
    """The rows before an epoch as they stand in the file, one for each; a history that began late may lack the first.

    What follows them is not looked at: an interrupted run may have left anything there.
    """
    advice = "Move the file away to resume without its history."
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            raise UserError(f"{display_path(file)}: expected a text file of at most {MAX_BYTES:,} bytes. {advice}")
        header, *lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{display_path(file)}: cannot be read ({error}). {advice}") from None
    if tuple(name.strip() for name in header.split(",")) != NAMES:
        raise UserError(f"{display_path(file)}:1: expected the columns {', '.join(NAMES)}. {advice}")
    rows: list[str] = []
    first: int | None = None
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        found = _epoch_of(line)
        first = found if first is None else first
        expected = (first or 0) + len(rows)
        if first is not None and expected >= epoch:
            break
        if found != expected:
            wanted = f"the {len(NAMES)} numbers of epoch {expected}"
            raise UserError(f"{display_path(file)}:{number}: expected {wanted}, found {line[:40]!r}. {advice}")
        rows.append(line.rstrip())
    if rows and (last := (first or 0) + len(rows) - 1) < epoch - 1:
        raise UserError(f"{display_path(file)}: ends with epoch {last}, the checkpoint with {epoch - 1}. {advice}")
    return rows


def _epoch_of(line: str) -> int | None:
    """The epoch of a row of results.csv, None where it is no row of numbers."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(NAMES) or not (cells[0].isdecimal() and len(cells[0]) < 10):
        return None
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None
    return int(values[0])


def _summary_writer(save_dir: Path, start_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # optional: pip install tensorboard
        return None
    return SummaryWriter(str(save_dir), purge_step=start_epoch or None)


def newest_checkpoint(folders: Sequence[Path]) -> Path:
    """The `last.pt` anywhere below `folders` that was written last; UserError where there is none."""
    files = {file.resolve() for folder in folders for file in folder.rglob("last.pt")}
    if not files:
        looked = " or ".join(dict.fromkeys(display_path(folder) for folder in folders))
        raise UserError(f"--resume: no last.pt below {looked}. Give the path of a run's weights/last.pt.")
    return max(files, key=lambda file: file.stat().st_mtime)
