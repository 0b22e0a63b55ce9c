"""Single steps: the loss, the average of the weights, and NMS at the confidence of validation.

python benchmarks/steps.py --data coco128.yaml --weights yolov5n.pt --img 640
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import Row, in_turns, main_of

BATCH = 16


def measure(options: argparse.Namespace) -> list[Row]:
    """Milliseconds of each step."""
    import torch

    from models.checkpoints.files import load_model
    from utils.data import prepare
    from utils.dataloaders import build_validation_loader
    from utils.downloads import find_weights
    from utils.inference import to_float
    from utils.loss import ComputeLoss
    from utils.nms import non_max_suppression
    from utils.optim import ModelEMA

    model = load_model(find_weights(options.weights), fuse=False)
    model.hyp = {"box": 0.05, "cls": 0.5, "obj": 1.0, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}
    loader = build_validation_loader(
        prepare(options.data), "val", imgsz=options.imgsz, batch_size=BATCH, workers=0, stride=32, rect=False
    )
    batch = next(iter(loader))
    images = to_float(batch.images, torch.device("cpu"))
    with torch.no_grad():
        predictions = torch.cat([model(part).predictions for part in images.split(4)])
        levels = [level.requires_grad_() for level in model.train()(images)]
    loss, average = ComputeLoss(model), ModelEMA(model)
    variants = {
        f"loss and its gradient, batch of {len(images)}": lambda: loss(levels, batch.targets)[0].backward(),
        "average of the weights": average.update,
        f"NMS at confidence 0.001, batch of {len(images)}": lambda: non_max_suppression(
            predictions, 0.001, 0.6, multi_label=True
        ),
    }
    seconds = in_turns(variants, max(options.rounds, 5))
    rows = []
    for name, values in seconds.items():
        share = len(images) if name.startswith("NMS") else 1
        unit = "ms per image" if share > 1 else "ms"
        low, high = (1000 * each(values) / share for each in (min, max))
        rows.append(Row(name, f"{1000 * statistics.median(values) / share:.3g} {unit}", f"{low:.3g} to {high:.3g}"))
    return rows


if __name__ == "__main__":
    main_of("steps", measure)
