"""Validation and detection: whole passes over files, against decoding and the bare network, and against plain code.

    python benchmarks/inference.py --data coco128.yaml --weights yolov5n.pt --img 640

The bare limit is decoding every file, plus the folded network alone on images in memory (for detection also encoding
every picture). Plain code takes one image after the other: OpenCV, fp32, channels first, the network as it was trained,
torchvision's NMS class by class.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import Row, compared, in_turns, main_of


def measure(options: argparse.Namespace) -> list[Row]:
    """Milliseconds per image of `engine.judge` and of detect.py, and their ratios to both."""
    import cv2
    import torch

    from models.backends import load
    from utils.data import prepare
    from utils.dataloaders import build_validation_loader
    from utils.engine import EvalOptions, judge

    spec, network = prepare(options.data), load(options.weights)
    model = _unfused(options.weights)
    protocol = EvalOptions(spec.num_classes, progress=False)
    size = {"imgsz": options.imgsz, "batch_size": 32}
    loader = build_validation_loader(spec, "val", workers=0, stride=32, **size)
    paths = [Path(sample.path) for sample in loader.dataset.samples][: options.images]
    shapes = loader.dataset.batch_shapes  # each file in the shape that validation gives it
    images = {shape: torch.rand(4, 3, *shape).to(memory_format=torch.channels_last) for shape in shapes}
    pictures = [cv2.imread(str(path)) for path in paths]

    def forward() -> None:
        with torch.inference_mode():
            for start in range(0, len(paths), 4):
                network(images[shapes[start // size["batch_size"]]])

    def decode() -> None:
        for path in paths:
            cv2.imread(str(path))

    def encode() -> None:
        for picture in pictures:
            cv2.imencode(".jpg", picture)

    variants = {
        "val": lambda: judge(network, spec, "val", protocol, **size),
        "detect": lambda: _detect(options, paths),
        "plain": lambda: _plain(model, paths, options.imgsz, 0.001, None),
        "plain detect": lambda: _plain(model, paths, options.imgsz, 0.25, pictures),
        "forward": forward,
        "decode": decode,
        "encode": encode,
    }
    seconds = in_turns(variants, options.rounds)
    count = {"val": len(loader.dataset)}
    each = {name: [1000 * s / count.get(name, len(paths)) for s in values] for name, values in seconds.items()}
    limit = [a + b for a, b in zip(each["forward"], each["decode"])]
    with_files = [a + b for a, b in zip(limit, each["encode"])]
    val, found = (f"{name}, {options.imgsz} px, per image" for name in ("validation", "detection with pictures"))
    return [
        compared(val, each["val"], "decoding + network alone", limit, 1, "ms"),
        compared(val, each["val"], "plain code", each["plain"], 1, "ms"),
        compared(found, each["detect"], "decoding + network alone + encoding", with_files, 1, "ms"),
        compared(found, each["detect"], "plain code", each["plain detect"], 1, "ms"),
    ]


def _unfused(weights: str) -> Any:
    from models.checkpoints.files import load_model
    from utils.downloads import find_weights

    return load_model(find_weights(weights), fuse=False)


def _detect(options: argparse.Namespace, paths: list[Path]) -> None:
    """detect.py over the files, loading of the network included."""
    import logging

    import detect

    logging.getLogger("yolov5").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        detect.run(weights=options.weights, source=[str(p) for p in paths], imgsz=options.imgsz, project=folder)


def _plain(model: Any, paths: list[Path], size: int, confidence: float, pictures: list[Any] | None) -> None:
    """One image after the other; with `pictures` boxes are drawn on them and written."""
    import cv2
    import numpy as np
    import torch
    from torchvision.ops import batched_nms

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            image = cv2.imread(str(path))
            scale = size / max(image.shape[:2])
            small = cv2.resize(image, None, fx=scale, fy=scale)
            canvas = np.full((size, size, 3), 114, np.uint8)
            canvas[: small.shape[0], : small.shape[1]] = small[:size, :size]
            batch = torch.from_numpy(np.ascontiguousarray(canvas[..., ::-1].transpose(2, 0, 1))).float()[None] / 255
            rows = model(batch)[0][0]
            rows = rows[rows[:, 4] > confidence]
            scores, classes = (rows[:, 5:] * rows[:, 4:5]).max(1)
            keep = scores > confidence
            rows, scores, classes = rows[keep], scores[keep], classes[keep]
            corners = torch.cat((rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2), 1)
            found = corners[batched_nms(corners, scores, classes, 0.6 if pictures is None else 0.45)[:300]] / scale
            if pictures is not None:
                for x1, y1, x2, y2 in found.int().tolist():
                    cv2.rectangle(image, (x1, y1), (x2, y2), (0, 0, 255), 2)
                cv2.imwrite(f"{folder}/{number}.jpg", image)


if __name__ == "__main__":
    main_of("inference", measure)
