"""Training batches alone: made on the host, against made on the device (`--cache device`); no network.

    python benchmarks/loading.py --data coco128.yaml --img 640

Both have their images in memory; the host's path has as many loader processes as train.py gives it. A batch is done
when it is on the device, as floats. The device is the first GPU, else the CPU, for which the second path is not made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measuring import Row, compared, in_turns, main_of

BATCH = 16


def measure(options: argparse.Namespace) -> list[Row]:
    """Milliseconds per image on the device, and the ratio to the host's."""
    import torch

    from utils.config import ROOT, read_hyp
    from utils.data import prepare
    from utils.dataloaders import LoaderOptions, build_loader
    from utils.device_cache import DeviceLoader
    from utils.inference import to_float

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec, hyp = prepare(options.data, task="train"), read_hyp(ROOT / "data/hyps/hyp.scratch-low.yaml")
    common: dict[str, Any] = dict(imgsz=options.imgsz, batch_size=BATCH, augment=True, shuffle=True, hyp=hyp)
    host, dataset = build_loader(spec, spec.split("train"), LoaderOptions(**common, cache="ram"))
    ours = DeviceLoader(dataset, LoaderOptions(**common), device)

    def epoch_of(loader: Any) -> Callable[[], None]:
        def run() -> None:
            for batch in loader:
                to_float(batch.images, device)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    seconds = in_turns({"ours": epoch_of(ours), "host": epoch_of(host)}, options.rounds)
    host.close()
    each = {name: [1000 * value / len(dataset) for value in values] for name, values in seconds.items()}
    what = f"training batches on {device.type}, {options.imgsz} px, batch {BATCH}, per image"
    return [compared(what, each["ours"], f"--cache ram, {host.num_workers} processes", each["host"], 1, "ms")]


if __name__ == "__main__":
    main_of("loading", measure)
