"""Training: images through a whole epoch, against the bare network and against plain code.

    python benchmarks/train.py --data coco128.yaml --weights yolov5n.pt --img 640

The bare limit is forward and backward alone, channels last, in the precision that training uses, on images and
gradients in memory, in the fastest eager form that was found.
Plain code decodes and fits one image after the other in the main process and trains in fp32, channels first, with the
same loss and torch's own optimizer; it does without mosaics, so it has less to do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import Row, compared, in_turns, main_of

BATCH = 16


def measure(options: argparse.Namespace) -> list[Row]:
    """Seconds per image of an epoch, and its ratio to both."""
    import torch

    from utils.runtime import keep_freed_memory

    parts, dataset = _parts(options)
    network, model, loader = parts.model, _network(options), parts.loader
    count = min(len(dataset), options.images) // BATCH * BATCH
    keep_freed_memory(parts.device)
    dtype = parts.trainer.dtype
    images = torch.rand(BATCH, 3, options.imgsz, options.imgsz).to(dtype, memory_format=torch.channels_last)
    paths, labels = [sample.path for sample in dataset.samples], dataset.labels_list
    epochs = iter(range(10**6))

    def ours() -> None:
        from utils.engine import train_one_epoch

        epoch = next(epochs)
        loader.set_epoch(epoch)
        train_one_epoch(parts.trainer, loader, 0)

    def bare() -> None:
        for _ in range(count // BATCH):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                levels = network(images)
            torch.autograd.backward(levels, gradients)
            network.zero_grad(set_to_none=True)

    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        gradients = [torch.randn_like(level) for level in network(images)]  # what a loss would send back

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def plain() -> None:
        from utils.loss import ComputeLoss

        loss = ComputeLoss(model)
        for start in range(0, count, BATCH):
            batch, targets = _plain_batch(paths, labels, range(start, start + BATCH), options.imgsz)
            total, _ = loss(model(batch), targets)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = in_turns({"ours": ours, "bare": bare, "plain": plain}, options.rounds)
    per_image = {"ours": len(dataset) / 1000, "bare": count / 1000, "plain": count / 1000}
    each = {name: [value / per_image[name] for value in values] for name, values in seconds.items()}
    loader.close()
    what = f"training, {options.imgsz} px, batch {BATCH}, per image"
    return [
        compared(what, each["ours"], "forward and backward alone", each["bare"], 1, "ms"),
        compared(what, each["ours"], "plain code", each["plain"], 1, "ms"),
    ]


def _parts(options: argparse.Namespace) -> tuple[Any, Any]:
    """The trainer, network and loader of a run as train.py builds them."""
    import tempfile

    import torch

    import train
    from utils.config import options_from

    given = dict(
        weights=options.weights,
        data=options.data,
        imgsz=options.imgsz,
        batch_size=BATCH,
        noplots=True,
        noautoanchor=True,
    )
    folder = tempfile.mkdtemp(prefix="benchmark-")
    parts = train.Training(options_from(train.build_parser(), {**given, "project": folder}), torch.device("cpu"), None)
    return parts, parts.dataset


def _network(options: argparse.Namespace) -> Any:
    """The network for plain code."""
    from models.checkpoints.files import load_model
    from utils.downloads import find_weights

    model = load_model(find_weights(options.weights), fuse=False).train().requires_grad_(True)
    model.hyp = {"box": 0.05, "cls": 0.5, "obj": 1.0, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}
    return model


def _plain_batch(paths: Any, labels: Any, numbers: range, size: int) -> tuple[Any, Any]:
    """Images fp32 (B, 3, size, size) and targets, one after the other, as tutorials write it."""
    import cv2
    import numpy as np
    import torch

    batch, targets = [], []
    for place, number in enumerate(numbers):
        image = cv2.imread(str(paths[number]))
        scale = size / max(image.shape[:2])
        small = cv2.resize(image, None, fx=scale, fy=scale)
        canvas = np.full((size, size, 3), 114, np.uint8)
        canvas[: small.shape[0], : small.shape[1]] = small[:size, :size]
        batch.append(torch.from_numpy(np.ascontiguousarray(canvas[..., ::-1].transpose(2, 0, 1))).float() / 255)
        for row in labels[number]:
            share = np.array((small.shape[1], small.shape[0]) * 2) / size
            targets.append([place, row[0], *(row[1:] * share)])
    return torch.stack(batch), torch.tensor(np.array(targets, np.float32).reshape(-1, 6))


if __name__ == "__main__":
    main_of("train", measure)
