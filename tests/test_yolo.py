"""The networks: state dicts, decoding, strides, anchors, biases, fusing, augmentation, and the command line."""

from __future__ import annotations

import copy
import logging
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from models.common import Conv
from models.graph import read
from models.yolo import (
    ClassificationModel,
    Detect,
    DetectionModel,
    Model,
    Segment,
    SegmentationModel,
    build_model,
    parse_model,
    run,
)
from utils.config import ROOT, UserError


@pytest.fixture(scope="module")
def nano() -> DetectionModel:
    """One yolov5n in inference mode with settled batch norms; copy it before changing it."""
    torch.manual_seed(0)
    return settle(DetectionModel("yolov5n.yaml"))


def settle(model: Any) -> Any:
    """Random batch-norm statistics and detection biases near zero, so that outputs differ from cell to cell."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
        elif isinstance(layer, Detect):
            for conv in layer.m:
                nn.init.uniform_(conv.bias, -1, 1)
    return model.eval()


# --- building ---------------------------------------------------------------------------------------------------------


def test_state_dict_keys_and_their_order_are_the_file_format(nano: DetectionModel) -> None:
    found = list(nano.state_dict())
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    block = ["conv.weight", *(f"bn.{key}" for key in statistics)]
    expected = []
    bottlenecks = {2: 1, 4: 2, 6: 3, 8: 1, 13: 1, 17: 1, 20: 1, 23: 1}
    for i in range(24):
        names = []
        if i in (0, 1, 3, 5, 7, 10, 14, 18, 21):
            names = [f"model.{i}."]
        elif i in bottlenecks:
            names = [f"model.{i}.cv{k}." for k in (1, 2, 3)]
            names += [f"model.{i}.m.{n}.cv{k}." for n in range(bottlenecks[i]) for k in (1, 2)]
        elif i == 9:
            names = ["model.9.cv1.", "model.9.cv2."]
        expected += [name + key for name in names for key in block]
    expected += ["model.24.anchors", *(f"model.24.m.{i}.{k}" for i in range(3) for k in ("weight", "bias"))]
    assert found == expected


def test_layers_carry_their_place_in_the_network(nano: DetectionModel) -> None:
    assert [layer.i for layer in nano.model] == list(range(25))
    assert [layer.f for layer in nano.model if layer.f != -1] == [[-1, 6], [-1, 4], [-1, 14], [-1, 10], [17, 20, 23]]
    assert nano.model[0].type == "models.common.Conv" and nano.model[24].type == "models.yolo.Detect"
    assert nano.model[11].type == "torch.nn.modules.upsampling.Upsample"
    assert sum(layer.np for layer in nano.model) == sum(p.numel() for p in nano.parameters())
    assert nano.save == [4, 6, 10, 14, 17, 20, 23]
    assert nano.names == {i: str(i) for i in range(80)} and Model is DetectionModel
    assert read("yolov5-bifpn.yaml").save == [4, 6, 6, 10, 14, 17, 20, 23]


def test_a_network_is_rebuilt_from_its_own_yaml(nano: DetectionModel) -> None:
    data = yaml.safe_load(yaml.safe_dump(nano.yaml))
    again = DetectionModel(data)
    again.load_state_dict(nano.state_dict())
    assert again.yaml == nano.yaml == data and again.yaml_file is None
    derived = DetectionModel("yolov5n-se-last.yaml", ch=1, nc=3)
    rebuilt = build_model(yaml.safe_load(yaml.safe_dump(derived.yaml)))
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (rebuilt, derived)]
    assert shapes[0] == shapes[1]
    assert rebuilt.model[0].conv.in_channels == 1 and rebuilt.head.nc == 3


def test_a_dict_is_left_as_it_was(nano: DetectionModel) -> None:
    data = copy.deepcopy(nano.yaml)
    del data["ch"]
    before = copy.deepcopy(data)
    assert DetectionModel(data, ch=4, nc=5, anchors=4).head.na == 4
    assert data == before


def test_building_leaves_batch_norm_statistics_untouched() -> None:
    for layer in DetectionModel("yolov5n.yaml").modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_batches_tracked == 0 and layer.training
            assert (layer.eps, layer.momentum) == (1e-3, 0.03)
            assert bool((layer.running_mean == 0).all() and (layer.running_var == 1).all())


def test_an_activation_stays_with_its_network() -> None:
    leaky = DetectionModel("yolov5s-LeakyReLU.yaml")
    plain = DetectionModel("yolov5n.yaml")
    for model, kind in ((leaky, nn.LeakyReLU), (plain, nn.SiLU)):
        acts = {id(m.act): m.act for m in model.modules() if isinstance(m, Conv)}
        assert [type(act) for act in acts.values()] == [kind]  # one object for all
    other = DetectionModel("yolov5n.yaml")
    assert other.model[0].act is not plain.model[0].act


def test_a_row_that_cannot_be_built_or_run_names_its_line(tmp_path: Path) -> None:
    text = (ROOT / "models/yolov5n.yaml").read_text(encoding="utf-8")
    file = tmp_path / "broken.yaml"
    for row, message in (
        ("[-1, 1, Conv, [128, 3, 2, None, 5]]", "layer 1 Conv: cannot be built from"),
        ("[-1, 1, nn.Linear, [9, 9]]", "layer 1 nn.Linear: cannot take what it reads"),
        ("[-1, 1, nn.Module, []]", "layer 1 nn.Module: cannot take what it reads"),
    ):
        file.write_text(text.replace("[-1, 1, Conv, [128, 3, 2]]", row), encoding="utf-8")
        with pytest.raises(UserError) as caught:
            DetectionModel(file)
        assert str(caught.value).startswith(f"{file}:14: {message}")


def test_a_network_must_end_in_a_head(nano: DetectionModel) -> None:
    data = copy.deepcopy(nano.yaml)
    data["head"].pop()
    with pytest.raises(UserError, match="layer 23 C3: the last row must be Detect or Segment"):
        build_model(data)
    with pytest.raises(UserError, match="ends in Segment"):
        SegmentationModel("yolov5n.yaml")


def test_warnings_of_the_yaml_are_logged(nano: DetectionModel, caplog: pytest.LogCaptureFixture) -> None:
    data = copy.deepcopy(nano.yaml)
    data["head"][-1][0] = [16, 19, 22]
    with caplog.at_level(logging.WARNING, logger="yolov5"):
        model = DetectionModel(data)
    assert [record.getMessage() for record in caplog.records] == list(model.graph.warnings)
    assert "layer 24 Detect reads layer 16, a Concat" in caplog.text


def test_parse_model_takes_a_plain_dict_too(nano: DetectionModel) -> None:
    layers, save = parse_model({**nano.yaml, "ch": 1}, [1])
    assert layers[0].conv.in_channels == 1 and save == nano.save and len(layers) == 25


# --- head -------------------------------------------------------------------------------------------------------------


def test_training_returns_raw_levels_and_inference_predictions_too(nano: DetectionModel) -> None:
    x = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        predictions, raw = nano(x)
        model = copy.deepcopy(nano).train()
        trained = model(x)
    shapes = [(2, 3, 12, 16, 85), (2, 3, 6, 8, 85), (2, 3, 3, 4, 85)]
    assert [tuple(level.shape) for level in raw] == [tuple(level.shape) for level in trained] == shapes
    assert predictions.shape == (2, 756, 85)


def decode_by_hand(raw: list[Tensor], anchors: Tensor, strides: list[float], num_classes: int) -> Tensor:
    """Row by row, in double precision, from the formula in words."""
    rows = []
    for i, level in enumerate(raw):
        for a in range(level.shape[1]):
            for y in range(level.shape[2]):
                for x in range(level.shape[3]):
                    t = level[0, a, y, x].double()
                    s = 1 / (1 + torch.exp(-t))
                    w, h = (anchors[i, a].double() * strides[i]).tolist()
                    box = [
                        (2 * s[0] + x - 0.5) * strides[i],
                        (2 * s[1] + y - 0.5) * strides[i],
                        (2 * s[2]) ** 2 * w,
                        (2 * s[3]) ** 2 * h,
                    ]
                    rows.append(torch.cat((torch.stack(box), s[4 : 5 + num_classes], t[5 + num_classes :])))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [Detect, Segment])
def test_decoding_is_the_formula_in_every_mode(kind: type[Detect]) -> None:
    torch.manual_seed(0)
    anchors = [[10, 13, 16, 30], [30, 61, 62, 45]]
    head = kind(3, anchors, ch=(8, 16)) if kind is Detect else Segment(3, anchors, 4, 8, (8, 16))
    head.stride = torch.tensor([8.0, 16.0])
    head.anchors /= head.stride.view(-1, 1, 1)
    head.eval()
    maps = [torch.randn(1, 8, 4, 6), torch.randn(1, 16, 2, 3)]
    with torch.no_grad():
        out = head(maps)
        found, raw = out[0], out[-1]
        expected = decode_by_hand(raw, head.anchors, [8, 16], 3)
        torch.testing.assert_close(found[0].double(), expected, atol=1e-4, rtol=1e-5)
        head.inplace = False
        torch.testing.assert_close(head(maps)[0], found)
        head.inplace, head.export = True, True
        torch.testing.assert_close(head(maps)[0], found)
        assert len(head(maps)) == len(out) - 1
    head.export = False
    with_gradient = head(maps)[0]
    torch.testing.assert_close(with_gradient, found)
    with_gradient.sum().backward()
    assert all(conv.weight.grad is not None for conv in head.m)


def test_raw_levels_are_not_changed_by_decoding(nano: DetectionModel) -> None:
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        _, raw = nano(x)
        trained = nano.head.train()(head_inputs(nano, x))
        nano.head.eval()
    for level, expected in zip(raw, trained):
        torch.testing.assert_close(level, expected)


def head_inputs(model: DetectionModel, x: Tensor) -> list[Tensor]:
    seen: dict[int, Tensor] = {}
    model(x, visualize=lambda index, kind, tensor: seen.update({index: tensor}))
    return [seen[i] for i in (17, 20, 23)]


def test_channels_of_a_level_are_anchor_major_then_x_y_w_h_objectness_classes() -> None:
    head = Detect(1, [[1, 1, 1, 1]], ch=(2,)).train()
    with torch.no_grad():
        head.m[0].weight.zero_()
        head.m[0].bias.copy_(torch.arange(12.0))
    raw = head([torch.zeros(1, 2, 3, 5)])[0]
    assert raw.shape == (1, 2, 3, 5, 6)
    assert torch.equal(raw[0, :, 1, 4], torch.arange(12.0).view(2, 6))


def fresh_grid(model: DetectionModel, x: Tensor) -> Tensor:
    model(x)
    return model.head.grid[0]


def test_grids_are_never_stale(nano: DetectionModel) -> None:
    fresh = copy.deepcopy(nano)
    with torch.no_grad():
        for size in ((64, 96), (96, 64), (64, 64), (64, 96)):
            x = torch.rand(1, 3, *size)
            torch.testing.assert_close(nano(x)[0], copy.deepcopy(fresh)(x)[0])
        moved = copy.deepcopy(nano).to(torch.bfloat16)
        x = torch.rand(1, 3, 64, 96)
        y = moved(x.bfloat16())[0]
        assert y.dtype == torch.bfloat16 and moved.head.stride.dtype == torch.bfloat16
        assert moved.head.grid[0].dtype == torch.bfloat16 and moved.stride.dtype == torch.float32
        back = moved.float()
        assert back(x)[0].dtype == back.head.grid[0].dtype == torch.float32
        torch.testing.assert_close(back.head.grid[0], fresh_grid(nano, x), atol=0, rtol=0)
        poisoned = copy.deepcopy(nano)
        poisoned.head.grid = [grid[:, :, :1] for grid in nano.head.grid]
        torch.testing.assert_close(poisoned(x)[0], nano(x)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_moves_to_cuda_and_back(nano: DetectionModel) -> None:
    x = torch.rand(2, 3, 64, 96)
    model = copy.deepcopy(nano)
    with torch.no_grad():
        expected = model(x)[0]
        on_gpu = model.cuda()(x.cuda())[0]
        assert model.head.stride.is_cuda and model.head.grid[0].is_cuda
        torch.testing.assert_close(on_gpu.cpu(), expected, atol=0.05, rtol=1e-3)
        torch.testing.assert_close(model.cpu()(x)[0], expected, atol=1e-4, rtol=1e-4)
        assert model.half().cuda()(x.cuda().half())[0].dtype == torch.float16
    with torch.device("cuda"):
        assert DetectionModel("yolov5n.yaml").head.stride.is_cuda


def test_anchors_are_kept_in_cells_and_ordered_like_the_strides(nano: DetectionModel) -> None:
    pixels = nano.head.anchors * nano.stride.view(-1, 1, 1)
    torch.testing.assert_close(pixels.flatten(1), torch.tensor(nano.yaml["anchors"]).float())
    data = copy.deepcopy(nano.yaml)
    data["anchors"] = data["anchors"][::-1]
    assert torch.equal(DetectionModel(data).head.anchors, nano.head.anchors)
    placeholder = DetectionModel("yolov5n.yaml", anchors=2).head
    assert (placeholder.anchors * placeholder.stride.view(-1, 1, 1)).tolist() == [[[0, 1], [2, 3]]] * 3


def test_biases_expect_eight_objects_and_rare_classes() -> None:
    torch.manual_seed(0)
    head = Detect(80, [[1] * 6] * 3, ch=(8, 8, 8))
    before = [conv.bias.clone().view(3, -1) for conv in head.m]
    head.stride = torch.tensor([8.0, 16.0, 32.0])
    head.bias_init_()
    for conv, old, expected in zip(head.m, before, (-6.6846, -5.2983, -3.9120)):
        change = conv.bias.view(3, -1) - old
        assert change[:, 4].tolist() == pytest.approx([expected] * 3, abs=1e-4)
        assert change[:, 5:].flatten().tolist() == pytest.approx([-4.8803] * 240, abs=1e-4)
        assert not change[:, :4].any()


def test_biases_start_from_class_frequencies_and_stay_finite() -> None:
    head = Detect(3, [[1, 1]], ch=(8,))
    head.stride = torch.tensor([8.0])
    before = head.m[0].bias.clone()
    head.bias_init_(torch.tensor([30.0, 10.0, 0.0]))
    change = (head.m[0].bias - before)[5:].tolist()
    assert change == pytest.approx([math.log(0.75), math.log(0.25), math.log(1e-6)], abs=1e-5)


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolov5n", "yolov5n-se-last", "yolov5n-seg", "yolov5n-ghost", "yolov3-tiny"])
def test_fusing_changes_no_output(name: str) -> None:
    torch.manual_seed(0)
    model = settle(build_model(f"{name}.yaml", nc=3))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[0]
        fused = copy.deepcopy(model).fuse()
        torch.testing.assert_close(fused(x)[0], expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(fused.fuse()(x)[0], expected, atol=1e-3, rtol=1e-3)
    assert not any(p.requires_grad for p in fused.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_memory_layout_does_not_matter(nano: DetectionModel) -> None:
    x = torch.rand(2, 3, 64, 64)
    model = copy.deepcopy(nano).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last))[0], nano(x)[0], atol=1e-3, rtol=1e-3)


def test_every_layer_shows_its_map(nano: DetectionModel) -> None:
    seen: list[tuple[int, str, tuple[int, ...]]] = []
    with torch.no_grad():
        nano(torch.rand(1, 3, 64, 64), visualize=lambda i, kind, x: seen.append((i, kind, tuple(x.shape))))
    assert [i for i, _, _ in seen] == list(range(24))  # the head has no map
    assert seen[9] == (9, "models.common.SPPF", (1, 256, 2, 2))
    for (i, _, shape), row in zip(seen, nano.graph.rows):
        assert shape[1] == row.channels and shape[2] == 64 / row.stride, i


def test_outputs_nobody_needs_any_more_are_freed(nano: DetectionModel) -> None:
    import weakref

    alive: dict[int, Any] = {}
    at_head: list[int] = []

    def watch(index: int, kind: str, x: Tensor) -> None:
        alive[index] = weakref.ref(x)
        if index == 23:
            at_head.extend(i for i, reference in alive.items() if reference() is not None)

    with torch.no_grad():
        nano(torch.rand(1, 3, 64, 64), visualize=watch)
    assert at_head == [17, 20, 23]


def test_augmented_inference_keeps_the_documented_rows(nano: DetectionModel) -> None:
    with torch.no_grad():
        predictions, nothing = nano(torch.rand(1, 3, 640, 640), augment=True)
    assert predictions.shape == (1, 45147, 85) and nothing is None


def test_augmented_views_are_mapped_back_to_the_image(nano: DetectionModel) -> None:
    x = torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        predictions = nano(x, augment=True)[0]
        plain = nano(x)[0]
    rows = plain.shape[1]
    cut = rows - rows // 21
    torch.testing.assert_close(predictions[:, :cut], plain[:, :cut])  # the full view, without its coarsest level
    small = torch.nn.functional.interpolate(x, size=(64, 107), mode="bilinear", align_corners=False)
    small = torch.nn.functional.pad(small, (0, 128 - 107, 0, 96 - 64), value=0.447)
    with torch.no_grad():
        last = nano(small)[0]
    last = last[:, last.shape[1] // 21 * 16 :]
    last = torch.cat((last[..., :4] / 0.67, last[..., 4:]), 2)
    torch.testing.assert_close(predictions[:, -last.shape[1] :], last, atol=1e-3, rtol=1e-4)
    middle = torch.nn.functional.interpolate(x.flip(3), size=(79, 132), mode="bilinear", align_corners=False)
    middle = torch.nn.functional.pad(middle, (0, 160 - 132, 0, 96 - 79), value=0.447)
    with torch.no_grad():
        mirrored = nano(middle)[0]
    mirrored = torch.cat((mirrored[..., :4] / 0.83, mirrored[..., 4:]), 2)
    mirrored[..., 0] = 160 - mirrored[..., 0]
    torch.testing.assert_close(predictions[:, cut : cut + rows], mirrored, atol=1e-3, rtol=1e-4)


def test_segmentation_returns_masks_and_refuses_augmentation() -> None:
    model = settle(SegmentationModel("yolov5n-seg.yaml", nc=2))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        predictions, prototypes, raw = model(x)
        assert predictions.shape == (1, 252, 2 + 5 + 32) and prototypes.shape == (1, 32, 16, 16) and len(raw) == 3
        levels, prototypes = copy.deepcopy(model).train()(x)
        assert [level.shape[-1] for level in levels] == [39] * 3
        with pytest.raises(UserError, match="--augment"):
            model(x, augment=True)
    assert (model.head.nm, model.head.npr) == (32, 64)  # prototype channels follow the width
    assert isinstance(build_model(model.yaml), SegmentationModel)


def test_classification_is_cut_from_a_detection_network(nano: DetectionModel) -> None:
    model = ClassificationModel(copy.deepcopy(nano), nc=7).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert len(model.model) == 10 and model.save == [] and model.names[6] == "6"
    assert list(model.state_dict())[-2:] == ["model.9.linear.weight", "model.9.linear.bias"]
    deeper = ClassificationModel(copy.deepcopy(nano), nc=7, cutoff=18).eval()
    assert deeper(torch.rand(1, 3, 64, 64)).shape == (1, 7) and deeper.save == [4, 6]
    for wrong in (1, 25):
        with pytest.raises(UserError, match="cutoff"):
            ClassificationModel(nano, cutoff=wrong)


def test_a_network_learns_through_se() -> None:
    torch.manual_seed(0)
    model = DetectionModel("yolov5n-se-last.yaml", nc=1)
    sum(level.square().mean() for level in model(torch.rand(2, 3, 64, 64))).backward()
    gate = model.model[10]
    assert gate.l1.weight.grad.abs().sum() > 0 and gate.l2.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_network_can_be_traced_for_export(nano: DetectionModel) -> None:
    model = copy.deepcopy(nano).fuse()
    model.head.export = model.head.dynamic = True
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, strict=False)
        torch.testing.assert_close(traced(x)[0], nano(x)[0], atol=1e-3, rtol=1e-3)


# --- command line -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "models/yolo.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("name", ["yolov5s-se-last", pytest.param("yolov5s-se-presppf", marks=pytest.mark.slow)])
def test_the_command_prints_layers_and_both_summaries(name: str) -> None:
    done = command("--cfg", f"models/{name}.yaml", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert ["from", "n", "params", "module", "arguments"] in [line.split() for line in lines]
    index = 10 if name.endswith("last") else 9
    assert f"{index:>3}                -1  1     32768  models.common.SE                        [512, 512, 16]" in [
        line.rstrip() for line in lines
    ]
    title = name.replace("yolov5", "YOLOv5")
    assert f"{title} summary: 127 layers, 7,268,157 parameters, 7,268,157 gradients, 16.6 GFLOPs" in lines
    assert f"{title} summary: 70 layers, 7,258,653 parameters, 0 gradients, 16.4 GFLOPs" in lines


@pytest.mark.slow
def test_the_command_answers_a_wrong_name_with_one_line_and_code_2() -> None:
    done = command("--cfg", "yolov5s-se-lasst.yaml", "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.startswith("error: yolov5s-se-lasst.yaml: no such file") and len(done.stderr.splitlines()) == 1
    with pytest.raises(UserError, match="--batch-size 0"):
        run(Namespace(test=False, batch_size=0, device="cpu", cfg="yolov5n.yaml"))


def test_help_needs_no_torch() -> None:
    probe = (
        "import runpy, sys\nsys.argv = ['models/yolo.py', '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--line-profile" in done.stdout and done.stdout.rstrip().endswith("False"), done.stderr


@pytest.mark.slow
def test_the_command_times_layers_and_steps() -> None:
    done = command("--cfg", "yolov5n.yaml", "--line-profile", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("time (ms)") :].splitlines()
    assert len(table) == 27 and table[-1].endswith("total")
    assert table[1].split()[1:] == ["0.37", "1760", "models.common.Conv"]
    done = command("--cfg", "yolov5n.yaml", "--profile", "--batch", "1", "--device", "cpu")
    assert done.returncode == 0 and "backward" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_builds_every_network() -> None:
    done = command("--test")
    assert done.returncode == 0, done.stderr
    assert sum("parameters" in line for line in done.stdout.splitlines()) == len(
        list((ROOT / "models").rglob("yolo*.yaml"))
    )


# ---------------------------------------------------------------------------------------------------------------- seeds


def test_new_weights_of_a_row_do_not_depend_on_the_rows_before_it() -> None:
    plain, gated = DetectionModel("yolov5n.yaml", nc=3, seed=5), DetectionModel("yolov5n-se-last.yaml", nc=3, seed=5)
    other = DetectionModel("yolov5n.yaml", nc=3, seed=6)
    state, moved = plain.state_dict(), gated.state_dict()
    for key, value in state.items():
        _, index, rest = key.split(".", 2)
        assert torch.equal(value, moved[f"model.{int(index) + (int(index) >= 10)}.{rest}"]), key
    convolutions = [key for key in state if key.endswith("conv.weight")]
    assert not any(torch.equal(state[key], other.state_dict()[key]) for key in convolutions)
    assert len({float(state[key].flatten()[0]) for key in convolutions}) == len(convolutions), "no two rows are alike"


def test_a_seeded_network_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    DetectionModel("yolov5n.yaml", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
