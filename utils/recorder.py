"""What a run leaves behind: options, results.csv, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

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


class Recorder:
    """Writes one row per epoch to `results.csv`, in upstream's format, and the same numbers to TensorBoard.

    `start_epoch` above 0 continues a file: rows of that epoch and later, which an interrupted run may have written
    after its last checkpoint, are cut. `images` are shown in TensorBoard at the end where they exist.
    """

    def __init__(self, save_dir: Path, *, start_epoch: int = 0) -> None:
        self.file = save_dir / "results.csv"
        rows = _rows_before(self.file, start_epoch) if start_epoch and self.file.exists() else []
        header = ",".join(f"{name:>20}" for name in ("epoch", *COLUMNS))
        write_texts({self.file: "\n".join([header, *rows]) + "\n"})
        self._board = _summary_writer(save_dir, start_epoch)

    def log(self, epoch: int, values: Sequence[float]) -> None:
        """Append one epoch; `values` in the order of COLUMNS."""
        assert len(values) == len(COLUMNS)
        row = ",".join(f"{value:20.5g}" for value in (epoch, *values))
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(row + "\n")
        if self._board is not None:
            for name, value in zip(COLUMNS, values):
                self._board.add_scalar(name, value, epoch)

    def show_images(self, files: Sequence[Path], epoch: int) -> None:
        """Add pictures that exist to TensorBoard."""
        if self._board is None:
            return
        import cv2

        for file in files:
            image = cv2.imread(str(file)) if file.is_file() else None
            if image is not None:
                self._board.add_image(file.stem, image[..., ::-1].copy(), epoch, dataformats="HWC")

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _rows_before(file: Path, epoch: int) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    kept = []
    for number, line in enumerate(lines, 2):
        first = next(csv.reader([line]), [""])[0].strip()
        if not first.isdigit():
            raise UserError(
                f"{display_path(file)}:{number}: expected a row that starts with an epoch, found {line[:40]!r}. "
                "Move the file away to resume without its history."
            )
        if int(first) < epoch:
            kept.append(line)
    return kept


def _summary_writer(save_dir: Path, start_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # optional: pip install tensorboard
        return None
    return SummaryWriter(str(save_dir), purge_step=start_epoch or None)


def write_yaml(file: Path, values: Mapping[str, Any]) -> None:
    """Options or hyper-parameters as YAML, in their order; paths as text."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    write_texts({file: yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)})


def newest_checkpoint(folders: Sequence[Path]) -> Path:
    """The `last.pt` anywhere below `folders` that was written last; UserError where there is none."""
    files = {file.resolve() for folder in folders for file in folder.rglob("last.pt")}
    if not files:
        looked = " or ".join(dict.fromkeys(display_path(folder) for folder in folders))
        raise UserError(f"--resume: no last.pt below {looked}. Give the path of a run's weights/last.pt.")
    return max(files, key=lambda file: file.stat().st_mtime)
