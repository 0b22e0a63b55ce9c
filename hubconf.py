"""Networks for `torch.hub`, and from Python by plain import.

    import torch

    model = torch.hub.load("path/to/this/folder", "custom", "best.pt", source="local")
    results = model("https://ultralytics.com/images/zidane.jpg")  # or a path, a PIL image, an array, a list of these
    results.print()

`yolov5n`, `yolov5s`, `yolov5m`, `yolov5l`, `yolov5x` and the same with a 6 at the end are the official networks; their
weights are looked for here and fetched from YOLOv5's releases.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

dependencies = ["torch", "torchvision", "yaml", "numpy", "cv2", "tqdm"]


def custom(
    path: str | Path = "path/to/model.pt",
    autoshape: bool = True,
    _verbose: bool = True,
    device: str | torch.device | None = None,
    half: bool = False,
) -> nn.Module:
    """A network from a file: a checkpoint of ours or of YOLOv5, or an exported one.

    Args:
        path: the file; without a suffix `.pt` is meant.
        autoshape: wrap it in `AutoShape`, which takes images as people have them. Without, the bare network is given,
            batch norms not folded, which takes tensors and can be trained.
        _verbose: log what happens.
        device: where it runs; the first GPU, or the CPU, unless given.
        half: compute in fp16 on CUDA, in bf16 on a CPU that has it; for a wrapped network.

    Raises:
        UserError: no such file, `half` where it does not help, or nothing that finds boxes.
    """
    from models.backends import load
    from models.checkpoints.files import load_model
    from models.predictor import AutoShape
    from utils.downloads import find_weights
    from utils.runtime import check_half, select_device

    with _logging(_verbose):
        path = Path(path) if Path(path).suffix or Path(path).is_dir() else Path(f"{path}.pt")
        where = select_device("" if device is None else device)
        if not autoshape:
            return load_model(find_weights(path), where, fuse=False)
        if half:
            check_half(where)
        return AutoShape(load(path, where, half=half), verbose=_verbose)


def _create(
    name: str,
    pretrained: bool,
    channels: int,
    classes: int,
    autoshape: bool,
    verbose: bool,
    device: str | torch.device | None,
) -> nn.Module:
    """An official network; with other channels or classes, or without weights, it is new in part and not wrapped."""
    if pretrained and channels == 3 and classes == 80:
        return custom(f"{name}.pt", autoshape, verbose, device)
    from models.checkpoints.files import read
    from models.gates.transfer import transfer
    from models.yolo import build_model
    from utils.downloads import find_weights
    from utils.runtime import LOGGER, select_device

    with _logging(verbose):
        where = select_device("" if device is None else device)
        model = build_model(f"{name}.yaml", ch=channels, nc=classes)
        if pretrained:
            LOGGER.info(transfer(model, read(find_weights(f"{name}.pt"), training=False)).summary())
        return model.to(where)


@contextlib.contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """The log on stdout; only warnings where it is not to be verbose."""
    from utils.runtime import LOGGER, setup_logging

    setup_logging()
    before = LOGGER.level
    if not verbose:
        LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(before)


def _official(name: str) -> Callable[..., nn.Module]:
    """The entry point of an official network."""

    def network(
        pretrained: bool = True,
        channels: int = 3,
        classes: int = 80,
        autoshape: bool = True,
        _verbose: bool = True,
        device: str | torch.device | None = None,
    ) -> nn.Module:
        """An official network; the options are those of `custom`.

        With `pretrained`, 3 channels and 80 classes it is the official checkpoint. Otherwise it is built with these
        channels and classes, takes over the weights that fit where `pretrained` is set, and is not wrapped.
        """
        return _create(name, pretrained, channels, classes, autoshape, _verbose, device)

    network.__name__ = network.__qualname__ = name
    return network


yolov5n, yolov5n6 = _official("yolov5n"), _official("yolov5n6")
yolov5s, yolov5s6 = _official("yolov5s"), _official("yolov5s6")
yolov5m, yolov5m6 = _official("yolov5m"), _official("yolov5m6")
yolov5l, yolov5l6 = _official("yolov5l"), _official("yolov5l6")
yolov5x, yolov5x6 = _official("yolov5x"), _official("yolov5x6")
