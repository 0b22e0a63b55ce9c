"""YOLOv5's `utils.autobatch`, for other people's code."""

from __future__ import annotations

from torch import nn

from utils.runtime import LOGGER
from utils.training import fit_batch_size


def check_train_batch_size(model: nn.Module, imgsz: int = 640, amp: bool = True) -> int:
    """The batch size that fills 80 % of the free CUDA memory in training; see `autobatch`. Measured with `amp` only."""
    return autobatch(model, imgsz)


def autobatch(model: nn.Module, imgsz: int = 640, fraction: float = 0.8, batch_size: int = 16) -> int:
    """The batch size that fills `fraction` of the free CUDA memory in training; `batch_size` on other devices."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        LOGGER.info(f"AutoBatch needs a CUDA device: using batch size {batch_size}.")
        return batch_size
    return fit_batch_size(model, imgsz, device, fraction=fraction)
