"""The table of formats, and `load`, which takes a file of any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from models.backends.base import Backend, Exported
from models.backends.coreml import CoreML
from models.backends.onnx import ONNX
from models.backends.openvino import OpenVINO
from models.backends.pytorch import PyTorch, to_bf16_
from models.backends.tensorrt import TensorRT
from models.backends.torchscript import TorchScript
from models.backends.yolov5 import YOLOv5
from models.checkpoints.files import load_model
from utils.config import UserError
from utils.downloads import find_weights

READERS: tuple[type[Exported], ...] = (TorchScript, ONNX, OpenVINO, TensorRT, CoreML)
WRITERS: tuple[type[Exported], ...] = (*READERS, YOLOv5)
FORMATS: dict[str, type[Exported]] = {kind.include: kind for kind in WRITERS}


def load(
    weights: str | Path | Sequence[str | Path],
    device: str | torch.device = "cpu",
    *,
    half: bool = False,
    fuse: bool = True,
) -> Backend:
    """The network of a file, or of several checkpoints together, in evaluation mode on the device.

    Args:
        weights: a path, or a name such as `yolov5s.pt` that is looked for and fetched; or an exported file.
        device: where it runs.
        half: in fp16; a checkpoint on a CPU in bf16, see `to_bf16_`.
        fuse: fold the batch norms of a checkpoint into its convolutions.

    Raises:
        UserError: no such file, not a network for boxes, a package that is not installed, or an ensemble whose parts do
            not go together.

    >>> load("best.onnx").names[0]
    'person'
    """
    names = [weights] if isinstance(weights, str | Path) else list(weights)
    kinds = [reader_of(name) for name in names]
    for name, kind in zip(names, kinds):
        if kind is not None:
            if len(names) > 1:
                raise UserError(f"--weights {name}: an ensemble is made of .pt checkpoints, not of exported files.")
            if half and torch.device(device).type == "cpu":
                raise UserError(
                    f"--weights {name}: --half on a CPU is for .pt checkpoints. Leave it out, or export so."
                )
            return kind(_exported_path(name), device, half=half).eval()
    networks = [
        load_model(find_weights(name), device, fuse=fuse).to(memory_format=torch.channels_last) for name in names
    ]
    for network in networks:
        if half and network.head.stride.device.type == "cpu":
            to_bf16_(network)
        elif half:
            network.half()
    return PyTorch(networks)


def reader_of(name: str | Path) -> type[Exported] | None:
    """The class that reads a file, by the end of its name; None for a checkpoint.

    Raises:
        UserError: a file that nothing here reads.
    """
    text = str(name).rstrip("/\\")
    if Path(text).suffix.lower() == ".xml":
        return OpenVINO
    for kind in READERS:
        if text.lower().endswith(kind.suffix):
            return kind
    if Path(text).suffix.lower() in (".pt", ""):
        return None
    known = ", ".join((".pt", *(kind.suffix for kind in READERS)))
    raise UserError(
        f"--weights {name}: a file that cannot be run here; expected {known}. Export the .pt to one of them."
    )


def _exported_path(name: str | Path) -> Path:
    """The exported file or folder, which must be there."""
    path = Path(str(name)).expanduser()
    path = path.parent if path.suffix.lower() == ".xml" else path
    if not path.exists():
        raise UserError(f"--weights {name}: no such file. Write it with: python export.py --weights best.pt")
    return path
