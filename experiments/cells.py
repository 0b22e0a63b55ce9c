"""The cells of an ablation once they are trained: judged, measured, drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data import read_arms, read_json
from experiments.pools import LocalPool
from experiments.statistics import median_interval
from experiments.trials import RESULT, Cell
from models.backends import load
from models.backends.base import Backend
from models.base import Output
from models.checkpoints.files import load_model
from models.gates.inspect import HEADER, draw, inspect_gates
from models.gates.start import gates_in
from models.measure import gflops, image_memory, latencies
from models.yolo import DetectionModel
from utils import engine
from utils.data import prepare
from utils.downloads import find_weights
from utils.drawing import plot_batch
from utils.files import write_texts
from utils.images import read_image
from utils.inference import input_hw, round_up
from utils.labels import image_files
from utils.runtime import select_device


def weights_of(cell: Cell) -> Path:
    """The checkpoint that a cell is judged by: its last epoch's, or the one that the others start from."""
    return cell.folder / "weights/last.pt" if cell.trains else find_weights(cell.options["weights"])


def judge(weights: Path | None, cell: Cell) -> dict[str, Any]:
    """Precision, recall and mAP of a checkpoint on the cell's held-out images; `judged.npz` keeps every detection.

    Without a checkpoint it is the result of a network that finds nothing.
    """
    device, spec = select_device(cell.device), prepare(cell.options["data"])
    single = cell.options["single_cls"] and len(spec.names) > 1
    network = load(weights, device) if weights else _finding_nothing({0: "item"} if single else spec.names, device)
    found: list[Any] = []
    result = engine.judge(
        network,
        spec,
        "val",
        engine.EvalOptions(len(network.names), single_cls=cell.options["single_cls"], progress=False),
        imgsz=input_hw([cell.options["imgsz"]], network)[0],
        batch_size=16,
        workers=0,
        max_pixels=cell.options["max_megapixels"] * 1_000_000,
        skip_bad=cell.options["skip_bad"],
        prefix="",
        on_image=found.append,
    )
    numbers = [len(image.detections) for image in found]
    np.savez_compressed(
        cell.folder / "judged.npz",
        detections=torch.cat([image.detections[:, :6] for image in found]).numpy(),
        detection_image=np.repeat(np.arange(len(found)), numbers),
        truth=torch.cat([image.truth for image in found]).numpy(),
        truth_image=np.repeat(np.arange(len(found)), [len(image.truth) for image in found]),
        paths=np.array([image.path for image in found]),
    )
    scores = ("precision", "recall", "mAP50", "mAP50-95")
    names, classes = list(network.names.values()), [int(c) for c in result.ap.classes]
    called = {c: f"{names[c]} ({c})" if names.count(names[c]) > 1 else names[c] for c in classes}
    return {
        **dict(zip(scores, map(float, result.summary[:4]))),
        "per_class": {called[c]: float(result.maps[c]) for c in classes},
    }


def _finding_nothing(names: Mapping[int, str], device: torch.device) -> Backend:
    """A network whose objectness is 0 everywhere."""

    class Nothing(Backend):
        def forward(self, images: Tensor, augment: bool = False, visualize: Any = None) -> Output:
            return Output(images.new_zeros(len(images), 1, 5 + len(names)))

    network = Nothing()
    network.names, network.device, network.dtype = dict(names), device, torch.float32
    return network


def measure_arms(cells: Sequence[Cell], folder: Path) -> None:
    """Add to `arms.json` what each arm costs to run, and what its gates do on the held-out images of its first seed."""
    file = folder / "arms.json"
    arms = read_arms(file)
    first = {
        cell.arm: cell for cell in reversed(cells) if cell.done and "diverged" not in read_json(cell.folder / RESULT)
    }
    if not first:
        return
    device = select_device(next(iter(first.values())).device)
    loaded = {arm: _network(cell, device) for arm, cell in first.items()}
    models, images = zip(*loaded.values())
    times = dict(zip(loaded, latencies(models, images)))
    for arm, (model, image) in loaded.items():
        ratios = [own / base for own, base in zip(times[arm], times.get(cells[0].arm, ()))]
        stride, size = max(int(model.stride.max()), 32), image.shape[-1]
        costs = arms.setdefault(arm, {})
        costs["gflops"] = gflops(model, model.graph.ch, (size, size), stride)
        for key, values in (("latency_ms", times[arm]), ("latency_ratio", ratios)):
            if values:
                costs.update(zip((key, f"{key}_low", f"{key}_high"), median_interval(values)))
        with LocalPool(1, torch.get_num_threads(), []) as fresh:
            costs["memory_mb"] = fresh.submit(memory_of, first[arm]).result()
        if gates_in(model):
            paths = image_files(prepare(first[arm].options["data"]).split("val"))[:100]
            found = inspect_gates(model, (read_image(path) for path in paths), size)
            costs["gates"] = [list(HEADER), *(entry.cells() for entry in found)]
            costs["gates_picture"] = f"gates-{first[arm].folder.parent.name}.png"
            draw(found, folder / costs["gates_picture"])
    write_texts({file: json.dumps(arms, indent=1)})


def memory_of(cell: Cell) -> float | None:
    """MB that one image takes in a trained cell's network, to be asked of a process of its own."""
    return image_memory(*_network(cell, select_device(cell.device)))


def _network(cell: Cell, device: torch.device) -> tuple[DetectionModel, Tensor]:
    """The trained network of a cell, and an image of the size it was trained at."""
    model = load_model(weights_of(cell), device).to(memory_format=torch.channels_last)
    size = round_up(cell.options["imgsz"], max(int(model.stride.max()), 32))
    image = torch.zeros(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return model, image


def draw_samples(cells: Sequence[Cell], folder: Path, count: int = 2) -> list[tuple[str, Path]]:
    """Held-out images of the first seed with its labels and with what each arm found, side by side."""
    first = next((cell for cell in cells if cell.done), None)
    if first is None:
        return []
    shown = [cell for cell in cells if cell.done and (cell.seed, cell.split) == (first.seed, first.split)]
    names = prepare(first.options["data"]).names
    judged = [np.load(cell.folder / "judged.npz") for cell in shown]
    busiest = np.bincount(judged[0]["truth_image"], minlength=len(judged[0]["paths"])).argsort()[::-1]
    pictures = []
    for number in busiest[:count]:
        path = Path(str(judged[0]["paths"][number]))
        boxes = [judged[0]["truth"][judged[0]["truth_image"] == number]]
        for file in judged:
            found = file["detections"][file["detection_image"] == number]
            boxes.append(np.concatenate((found[:, 5:6], found[:, :5]), 1))
        image = torch.from_numpy(read_image(path)[..., ::-1].copy()).permute(2, 0, 1)
        titles, picture = ["labels", *(cell.arm for cell in shown)], folder / f"sample-{path.stem}.jpg"
        plot_batch(image.expand(len(titles), -1, -1, -1), boxes, titles, names, picture)
        pictures.append((f"{path.name}, held out by seed {first.seed}: the labels, then what each arm found", picture))
    return pictures
