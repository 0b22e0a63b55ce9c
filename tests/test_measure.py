"""How large networks are: parameters, state-dict items, layers and GFLOPs, and the line that says so."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.measure import gflops, image_memory
from models.yolo import DetectionModel, build_model
from utils.config import ROOT

# name: parameters, state-dict items
SIZES = {
    "yolov5n": (1_872_157, 349),
    "yolov5s": (7_235_389, 349),
    "yolov5m": (21_190_557, 481),
    "yolov5l": (46_563_709, 613),
    "yolov5x": (86_749_405, 745),
    "yolov5n6": (3_246_940, 459),
    "yolov5s6": (12_626_620, 459),
    "yolov5m6": (35_731_932, 627),
    "yolov5l6": (76_770_172, 795),
    "yolov5x6": (140_794_780, 963),
    "yolov3": (61_949_149, 439),
    "yolov3-spp": (62_998_749, 445),
    "yolov3-tiny": (8_852_366, 71),
    "yolov5-bifpn": (46_825_853, 613),
    "yolov5-fpn": (41_117_565, 547),
    "yolov5-p2": (47_493_372, 711),
    "yolov5-p34": (5_331_518, 311),
    "yolov5-p6": (76_770_172, 795),  # yolov5l6 with other anchors
    "yolov5-p7": (144_281_723, 977),
    "yolov5-panet": (46_563_709, 613),  # yolov5l by another name
    "yolov5s-ghost": (3_897_605, 529),
    "yolov5s-transformer": (7_235_645, 348),
    "yolov5s-LeakyReLU": (7_235_389, 349),
    "yolov5s-c3se": (7_263_677, 371),
    "yolov5s-se-last": (7_268_157, 351),
    "yolov5s-se-presppf": (7_268_157, 351),
    "yolov5n-se-last": (1_880_349, 351),
    "yolov5n-se-presppf": (1_880_349, 351),
    # the head of its detector, with 32 more predictions per anchor, and the prototypes
    "yolov5n-seg": (1_991_549, 367),
    "yolov5s-seg": (7_621_277, 367),
    "yolov5m-seg": (21_990_397, 499),
    "yolov5l-seg": (47_924_957, 631),
    "yolov5x-seg": (88_819_517, 763),
}
# fused parameters, fused items, parameter tensors, modules, leaf modules, leaf modules fused, GFLOPs, GFLOPs fused
DETAILS = {
    "yolov5n": (1_867_405, 121, 177, 214, 125, 68, 4.6, 4.5),
    "yolov5s": (7_225_885, 121, 177, 214, 125, 68, 16.6, 16.4),
    "yolov5m": (21_172_173, 165, 243, 291, 169, 90, 49.2, 48.9),
    "yolov5l": (46_533_693, 209, 309, 368, 213, 112, 109.6, 109.0),
    "yolov5x": (86_705_005, 253, 375, 445, 257, 134, 206.3, 205.4),
    "yolov5n6": (3_239_884, 159, 233, 281, 165, 90, 4.7, 4.6),
    "yolov5s6": (12_612_508, 159, 233, 281, 165, 90, 17.0, 16.8),
    "yolov5m6": (35_704_908, 215, 317, 379, 221, 118, 50.3, 49.9),
    "yolov5l6": (76_726_332, 271, 401, 477, 277, 146, 111.8, 111.2),
    "yolov5x6": (140_730_220, 327, 485, 575, 333, 174, 210.4, 209.6),
}
BIG = {name for name, (parameters, _) in SIZES.items() if parameters > 10_000_000}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def leaves(model: nn.Module) -> int:
    return sum(1 for m in model.modules() if not list(m.children()))


def slow_when_big(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in BIG else []) for name in names]


@pytest.mark.parametrize("name", slow_when_big(SIZES))
def test_a_network_has_its_parameters_and_state_dict_items(name: str) -> None:
    with torch.device("meta" if name in BIG else "cpu"):
        model = build_model(f"{name}.yaml")
    assert (count(model), len(model.state_dict())) == SIZES[name]
    assert model.yaml_file == f"{name}.yaml"
    assert model.stride.device.type == "cpu"
    assert model.stride.tolist() == [model.graph.rows[s].stride for s in model.graph.head.sources]


def test_every_shipped_network_has_its_figures() -> None:
    shipped = {path.stem for path in (ROOT / "models").rglob("yolo*.yaml")}
    assert shipped <= set(SIZES)


@pytest.mark.parametrize("name", slow_when_big(DETAILS))
def test_counts_and_gflops_before_and_after_fusing(name: str) -> None:
    model = build_model(f"{name}.yaml")
    parameters, items, tensors, modules, leaf, leaf_fused, operations, operations_fused = DETAILS[name]
    assert len(list(model.parameters())) == tensors
    assert (len(list(model.modules())), leaves(model)) == (modules, leaf)
    stride = int(model.stride.max())
    # 205.454 is printed as 205.4 in the table: it was rounded twice
    assert gflops(model, 3, (640, 640), stride) == pytest.approx(operations, abs=0.055)
    model.fuse()
    assert (count(model), len(model.state_dict()), leaves(model)) == (parameters, items, leaf_fused)
    assert gflops(model, 3, (640, 640), stride) == pytest.approx(operations_fused, abs=0.055)


def test_gflops_from_two_small_images_equal_a_whole_one() -> None:
    from thop import profile

    model = DetectionModel("yolov5n-se-last.yaml")
    macs, _ = profile(copy.deepcopy(model), inputs=(torch.zeros(1, 3, 320, 256),), verbose=False)
    before = set(dict(model.named_buffers()))
    assert gflops(model, 3, (320, 256), 32) == pytest.approx(2 * macs / 1e9, rel=1e-9)
    assert set(dict(model.named_buffers())) == before


def test_number_of_classes_changes_the_head_only() -> None:
    assert count(DetectionModel("yolov5n.yaml", nc=2)) == 1_766_623
    assert count(DetectionModel("yolov5n.yaml", nc=4)) == 1_769_329


def test_the_summary_names_the_network(caplog: pytest.LogCaptureFixture) -> None:
    nano = DetectionModel("yolov5n.yaml")
    with caplog.at_level(logging.INFO, logger="yolov5"):
        line = nano.info()
    assert line == "YOLOv5n summary: 125 layers, 1,872,157 parameters, 1,872,157 gradients, 4.6 GFLOPs"
    assert line in caplog.text
    assert DetectionModel(nano.yaml).info().startswith("Model summary: 125 layers")


class Spread(nn.Module):
    """Needs so many MB in between, and returns little."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.megabytes = megabytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_ones(self.megabytes, 2**18).sum()


def memory_of_spread(megabytes: int) -> float | None:
    return image_memory(Spread(megabytes), torch.zeros(1))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells how far a process grew")
def test_memory_is_what_a_forward_pass_needs_in_between() -> None:
    for megabytes in (100, 20):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            measured = fresh.submit(memory_of_spread, megabytes).result()
        assert measured == pytest.approx(megabytes, abs=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_memory_on_cuda_is_what_the_allocator_handed_out() -> None:
    assert image_memory(Spread(100), torch.zeros(1, device="cuda")) == pytest.approx(100, abs=1)


def test_memory_of_another_accelerator_is_not_read_off_the_process() -> None:
    assert image_memory(Spread(1), torch.zeros(1, device="meta")) is None
