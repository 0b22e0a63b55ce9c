"""A few training steps by one process, or by several under torchrun; each writes what it ended with.

    torchrun --nproc_per_node 2 tests/distributed_steps.py FOLDER

Batch-norm statistics are frozen: otherwise every process would normalise with those of its own images. All images have
equal boxes, so that every process has as many assigned predictions as the others: the box and class losses are means
over them, and a mean of two means is the mean only where both count equally many.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from models.yolo import DetectionModel
from utils.config import ROOT
from utils.dataloaders import Batch
from utils.distributed import agreed, process_group, rank, world_size
from utils.engine import train_one_epoch
from utils.training import build_trainer

CPU = torch.device("cpu")
SIZE, CLASSES, BATCH, BATCHES = 64, 3, 4, 4
BOXES = ((0.0, 0.3, 0.4, 0.3, 0.25), (1.0, 0.7, 0.6, 0.2, 0.35))  # class, cx, cy, w, h


def batches() -> list[Batch]:
    """This process's part of every batch: images of noise, the n-th process has every n-th."""
    generator = torch.Generator().manual_seed(0)
    mine = slice(max(rank(), 0), None, world_size())
    found = []
    for _ in range(BATCHES):
        images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)[mine]
        targets = torch.tensor([[index, *box] for index in range(len(images)) for box in BOXES])
        found.append(Batch(images, targets, [None] * len(images), ["noise"] * len(images), [*range(len(images))]))
    return found


def train_some_steps() -> dict[str, Any]:
    """The weights, the average and the mean losses after two optimizer steps of two batches each."""
    torch.manual_seed(0)
    data = yaml.safe_load((ROOT / "models/yolov5n.yaml").read_text(encoding="utf-8"))
    model = DetectionModel({**data, "width_multiple": 0.03, "nc": CLASSES})
    options = argparse.Namespace(
        imgsz=SIZE, epochs=1, batch_size=BATCH, optimizer="SGD", cos_lr=False, seed=0, multi_scale=False, compile=False
    )
    hyp = {"warmup_epochs": 0.0, "nominal_batch": 2 * BATCH}
    loader: Any = batches()
    trainer = build_trainer(model, loader, options, hyp, frozen=[model.model])
    trainer.dtype = None  # bf16 would round the two sums differently
    losses = train_one_epoch(trainer, loader, 0)
    ema = trainer.ema.ema.state_dict() if trainer.ema else {}
    return {"losses": torch.from_numpy(losses), "weights": model.state_dict(), "ema": ema}


def main(folder: Path) -> None:
    with process_group(CPU, BATCH):
        decisions = [agreed(rank() == 0, CPU), agreed(rank() == 1, CPU)]
        torch.save({"decisions": decisions, **train_some_steps()}, folder / f"{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
