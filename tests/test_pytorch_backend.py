"""Checkpoints run by PyTorch on a CPU in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.backends import load
from tests.test_val import micro_checkpoint
from utils.config import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro") / "micro.pt", ("cat", "dog"))


def images(*shape: int, nhwc: bool = True) -> Tensor:
    x = torch.rand(*shape)
    return x.to(memory_format=torch.channels_last) if nhwc else x


def test_in_bf16_boxes_and_scores_stay_fp32(checkpoint: Path) -> None:
    half, full = load(checkpoint, half=True), load(checkpoint)
    head: Any = half.networks[0].head
    assert half.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert torch.equal(head.anchors, full.networks[0].head.anchors)
    x = images(2, 3, 96, 128)
    with torch.inference_mode():
        found, wanted = half(x.bfloat16()).predictions, full(x).predictions
    assert found.dtype is torch.float32
    fractions = found[..., :2] * 256
    assert not torch.equal(fractions, fractions.round()), "bf16 has no such positions"
    assert (found - wanted)[..., 4:].abs().max() < 0.05


def test_bf16_is_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "best.torchscript").touch()
    with pytest.raises(UserError, match=r"--half on a CPU is for \.pt checkpoints"):
        load(tmp_path / "best.torchscript", half=True)
