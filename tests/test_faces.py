"""The names that other people's programs import have YOLOv5's arguments, their order, results and side effects."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from models import common
from models.base import Output
from models.checkpoints.files import load_model, read, save
from models.experimental import Ensemble, attempt_load
from models.yolo import DetectionModel
from tests.conftest import TinyDataset
from tests.house import ROOT, ROWS, imported_names, sources
from utils import activations, autoanchor, autobatch, dataloaders, datasets, general, metrics, nms, optim, torch_utils
from utils.augmentations import letterbox, letterboxed
from utils.config import UserError
from utils.data import coco_categories
from utils.downloads import attempt_download
from utils.metrics import AveragePrecision, ConfusionMatrix, ap_per_class, bbox_iou, box_iou
from utils.plots import Annotator, colors, feature_visualization, plot_one_box, save_one_box

SHAPES = ROOT / "yolov5n-shapes.pt"
PICTURE = ROOT / "data" / "images" / "shapes1.jpg"
Kind = Callable[[np.ndarray], Any]


@pytest.fixture(params=[np.array, torch.tensor], ids=["numpy", "torch"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def shapes() -> DetectionModel:
    return attempt_load(SHAPES)


@pytest.fixture(scope="module")
def nano() -> DetectionModel:
    """A tiny network of its own, in training mode."""
    return DetectionModel({**read(SHAPES, training=False).yaml, "width_multiple": 0.125}, nc=3)


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 600, (count, 2))
    return np.concatenate((corners, corners + rng.uniform(5, 200, (count, 2))), 1)


# ----------------------------------------------------------------------------------------------------- the house's rule


def test_nothing_of_ours_imports_a_face() -> None:
    faces = set(ROWS["faces"])
    users = {
        (source.module, name)
        for source in sources()
        for _, name in imported_names(source)
        if name in faces - {"hubconf"}
    }
    assert {user for user, _ in users} <= faces


def test_signatures_are_those_that_are_called_by_position() -> None:
    expected = {
        general.non_max_suppression: "prediction conf_thres iou_thres classes agnostic multi_label labels max_det nm",
        general.scale_boxes: "img1_shape boxes img0_shape ratio_pad",
        general.increment_path: "path exist_ok sep mkdir",
        general.check_img_size: "imgsz s floor",
        letterbox: "im new_shape color auto scaleFill scaleup stride",
        attempt_load: "weights device inplace fuse map_location",
        torch_utils.select_device: "device batch_size newline",
        save_one_box: "xyxy im file gain pad square BGR save",
        Annotator: "im line_width font_size font pil example",
        bbox_iou: "box1 box2 xywh GIoU DIoU CIoU eps",
        ap_per_class: "tp conf pred_cls target_cls plot save_dir names eps prefix",
        ConfusionMatrix: "nc conf iou_thres",
        autoanchor.check_anchors: "dataset model thr imgsz",
        datasets.LoadImages: "path img_size stride auto transforms vid_stride",
        datasets.create_dataloader: "path imgsz batch_size stride single_cls hyp augment cache pad rect rank workers "
        "image_weights quad prefix shuffle seed",
    }
    for function, names in expected.items():
        assert " ".join(inspect.signature(function).parameters) == names


def test_names_from_rooms_to_the_right_are_found_when_asked_for() -> None:
    assert common.AutoShape.__module__ == common.Detections.__module__ == "models.predictor"
    assert dataloaders.LoadImages is datasets.LoadImages and dataloaders.letterbox is datasets.letterbox is letterbox
    assert dataloaders.create_dataloader is datasets.create_dataloader
    for module in (common, dataloaders, metrics, general):
        with pytest.raises(AttributeError, match=f"{module.__name__}.*no attribute 'LoadNothing'"):
            _ = module.LoadNothing


# --------------------------------------------------------------------------------------------------------------- boxes


def test_nms_by_position_is_ours_by_keyword() -> None:
    torch.manual_seed(0)
    boxes = torch.from_numpy(general.xyxy2xywh(random_boxes(400))).float()
    prediction = torch.cat((boxes, torch.rand(400, 1 + 4 + 2)), 1)[None]
    found = general.non_max_suppression(prediction, 0.3, 0.5, [0, 2], True, True, (), 50, 2)
    expected = nms.non_max_suppression(
        prediction, 0.3, 0.5, classes=[0, 2], agnostic=True, multi_label=True, max_det=50, num_masks=2
    )
    assert found[0].shape[1] == 8 and set(found[0][:, 5].tolist()) == {0, 2}
    assert torch.equal(found[0], expected[0])
    alone = general.non_max_suppression((prediction, None), 0.3, 0.5, None, False, False, nm=2)
    kept = torchvision.ops.batched_nms(alone[0][:, :4], alone[0][:, 4], alone[0][:, 5], 0.5)
    assert len(kept) == len(alone[0])


def test_scaled_boxes_are_written_in_place_and_returned(kind: Kind) -> None:
    rows = np.array([[100, 200, 300, 400, 0.9, 1], [-50, 0, 700, 640, 0.8, 2]], np.float32)
    boxes = kind(rows)
    result = general.scale_boxes((640, 640), boxes, (720, 1280, 3))  # half, and 140 pixels above and below
    assert result is boxes
    expected = [[200, 120, 600, 520, 0.9, 1], [0, 0, 1280, 720, 0.8, 2]]
    np.testing.assert_allclose(np.asarray(boxes), np.array(expected), rtol=1e-6)
    assert general.scale_boxes((640, 640), boxes[:0], (720, 1280)).shape == (0, 6)
    view = kind(rows)
    view[:, :4] = general.scale_coords((640, 640), view[:, :4], (720, 1280), ((0.5, 0.5), (0.0, 140.0)))
    np.testing.assert_allclose(np.asarray(view), np.array(expected), rtol=1e-6)


def test_clipping_is_in_place(kind: Kind) -> None:
    boxes = kind(np.array([[-3.0, 5, 900, 700, 0.5]]))
    general.clip_coords(boxes, (480, 640, 3))
    assert boxes.tolist() == [[0, 5, 640, 480, 0.5]]


def test_conversions_agree_with_torchvision(kind: Kind) -> None:
    corners = random_boxes(20)
    before = kind(corners)
    centres = general.xyxy2xywh(before)
    reference = torchvision.ops.box_convert(torch.from_numpy(corners), "xyxy", "cxcywh")
    np.testing.assert_allclose(np.asarray(centres), reference)
    np.testing.assert_allclose(np.asarray(general.xywh2xyxy(centres)), corners)
    fractions = general.xyxy2xywhn(before, 800, 700)
    np.testing.assert_allclose(np.asarray(fractions), reference / torch.tensor([800, 700, 800, 700]))
    np.testing.assert_allclose(np.asarray(general.xywhn2xyxy(fractions, 800, 700, 3, 4)), corners + np.tile([3, 4], 2))
    assert (np.asarray(before) == corners).all()
    np.testing.assert_allclose(np.asarray(general.xyn2xy(kind(np.array([[0.5, 0.25]])), 100, 80, 1, 2)), [[51, 22]])


def test_outlines_become_boxes_and_points() -> None:
    square = np.array([(0.0, 0), (10, 0), (10, 20), (0, 20)])
    assert general.segments2boxes([square]).tolist() == [[5, 10, 10, 20]]
    assert general.segment2box(square + np.array([0, 100]), 5, 110).tolist() == [0, 100, 0, 100]
    assert general.segment2box(square + 1000).tolist() == [0, 0, 0, 0]
    (points,) = general.resample_segments([square], 9)
    assert points.shape == (9, 2) and points[[0, 2, 4, 6, 8]].tolist() == [[0, 0], [10, 0], [10, 20], [0, 20], [0, 0]]


@pytest.mark.parametrize("shape", [(480, 640), (427, 639)])
def test_letterbox_gives_image_ratio_and_half_pads(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    padded, ratio, pads = letterbox(image, 320, (1, 2, 3), False)
    ours, fitted = letterboxed(image, 320, fill=(1, 2, 3))
    assert (padded == ours).all() and padded.shape == (320, 320, 3)
    assert ratio == (fitted.scale, fitted.scale) and pads == fitted.pad_xy
    assert letterbox(image, np.int64(320), stride=64)[0].shape == (256, 320, 3)
    stretched, ratio, pads = letterbox(image, (96, 64), auto=False, scaleFill=True)
    assert stretched.shape == (96, 64, 3) and pads == (0, 0)
    assert ratio == (64 / shape[1], 96 / shape[0])


# -------------------------------------------------------------------------------------------------------------- checks


def test_image_sizes_are_raised_to_the_stride(said: list[str]) -> None:
    assert general.make_divisible(33, torch.tensor([8.0, 32])) == 64 and general.make_divisible(64, 32) == 64
    assert general.check_img_size(np.int64(640), s=32) == 640 and not said
    assert general.check_img_size(650, torch.tensor([8, 16, 32])) == 672 and "672" in said[0]
    assert general.check_img_size((100, 64), 32, floor=96) == [128, 96]


def test_files_are_found_by_bare_names(tmp_path: Path) -> None:
    assert Path(general.check_file("hyp.scratch-low.yaml")).is_file() and general.check_file("") == ""
    assert Path(general.check_yaml("yolov5s.yaml")).parent.name == "models"
    for call in (lambda: general.check_yaml("a.txt"), lambda: general.check_suffix(["a.pt", "b.onnx"], ".pt")):
        with pytest.raises(UserError, match="expected a file ending in"):
            call()
    general.check_suffix("yolov5s", ".pt", "--weights ")
    general.yaml_save(tmp_path / "a.yaml", {"b": 1, "a": Path("c")})
    assert general.yaml_load(tmp_path / "a.yaml") == {"b": 1, "a": "c"}
    assert general.url2file("https://a.b/c.jpg?d=e/f") == "c.jpg" and general.clean_str("a&b=c") == "a_b_c"
    assert attempt_download("yolov5n-shapes.pt").endswith("yolov5n-shapes.pt")
    with pytest.raises(UserError, match="someone/else"):
        attempt_download("nowhere.pt", "someone/else")


def test_a_dataset_is_a_dict(tiny_dataset: TinyDataset) -> None:
    data = general.check_dataset(tiny_dataset.yaml)
    assert data["names"] == {0: "square", 1: "disc"} and data["nc"] == 2 and "test" not in data
    assert data["val"] == str(tiny_dataset.root / "images/val") and Path(data["path"]) == tiny_dataset.root


def test_requirements_are_named_and_never_installed(said: list[str], tmp_path: Path) -> None:
    assert general.check_requirements(("torch>=1.0", "numpy")) and not said
    assert not general.check_requirements(["torch>=999", "no-such-package"])
    assert "pip install 'torch>=999' 'no-such-package'" in said[0]
    (tmp_path / "needs.txt").write_text("# these\n--extra-index-url x\nno-such-package>=1  # why\nnumpy\n")
    assert not general.check_requirements(tmp_path / "needs.txt")
    assert general.check_requirements(tmp_path / "needs.txt", exclude=("no-such-package",))
    assert general.check_requirements("no-such-package; python_version < '3'")


def test_versions(said: list[str]) -> None:
    assert general.check_version("1.10.0", "1.9.0") and not general.check_version("1.9", "1.10", "torch ", verbose=True)
    assert said == ["torch 1.9: expected 1.10 or newer."]
    assert not general.check_version("2.0", "1.0", pinned=True) and general.check_python("3.8")
    with pytest.raises(UserError, match=r"1\.9"):
        general.check_version("1.9", "1.10", hard=True)
    assert isinstance(general.check_imshow(), bool)


def test_paths_are_numbered_without_being_made(tmp_path: Path) -> None:
    assert general.increment_path(tmp_path / "exp") == tmp_path / "exp"
    assert general.increment_path(tmp_path / "exp", mkdir=True).is_dir()
    assert general.increment_path(tmp_path / "exp", sep="_") == tmp_path / "exp_2"
    assert general.increment_path(str(tmp_path / "exp"), True) == tmp_path / "exp"
    (tmp_path / "a.jpg").touch()
    assert general.increment_path(tmp_path / "a.jpg") == tmp_path / "a2.jpg" and not (tmp_path / "a2.jpg").exists()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "last.pt").touch()
    assert general.get_latest_run(str(tmp_path)) == str(tmp_path / "deep/last.pt")
    assert general.get_latest_run(str(tmp_path / "exp")) == "" and general.file_size(tmp_path) == 0


@pytest.mark.slow
def test_a_program_that_asks_for_the_logger_is_heard() -> None:
    code = "from utils.general import LOGGER, colorstr; LOGGER.info(colorstr('red', 'seen'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "\033[31mseen\033[0m\n", done.stderr


def test_arguments_are_printed_in_both_ways(said: list[str]) -> None:
    def run(weights: str = "a.pt", size: int = 3) -> None:
        general.print_args()
        general.print_args(show_file=False, show_func=True)

    run()
    general.print_args("train", argparse.Namespace(epochs=3))
    general.print_args({"a": 1}, False)
    plain = [line.replace("\033[34m", "").replace("\033[1m", "").replace("\033[0m", "") for line in said]
    assert plain == ["test_faces: weights=a.pt, size=3", "run: weights=a.pt, size=3", "train: epochs=3", "a=1"]


def test_a_profile_adds_up() -> None:
    profile = general.Profile()
    with profile as same:
        pass
    first = profile.dt
    with profile:
        sum(range(10_000))
    assert same is profile and profile.dt > first > 0 and profile.t == first + profile.dt
    assert general.Profile(1.0)(lambda: 3)() == 3 and profile.time() <= profile.time()


def test_small_arithmetic() -> None:
    assert general.one_cycle(1, 0.1, 10)(0) == 1 and general.one_cycle(1, 0.1, 10)(10) == pytest.approx(0.1)
    ours, theirs = (
        {"a": torch.ones(2), "b.x": torch.ones(1), "c": torch.ones(3)},
        {"a": torch.ones(2), "c": torch.ones(1)},
    )
    assert list(general.intersect_dicts(ours, theirs)) == ["a"] and not general.intersect_dicts(
        ours, ours, ["a", "b", "c"]
    )
    assert torch_utils.intersect_dicts is general.intersect_dicts
    labels = [np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [2, 0, 0, 0, 0]]), np.zeros((0, 5))]
    weights = general.labels_to_class_weights(labels, 3)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1, 1]) / 2.5)
    assert general.labels_to_image_weights(labels, 3, np.array([1, 5, 10])).tolist() == [12, 0]
    assert general.coco80_to_coco91_class() == coco_categories()
    assert general.is_ascii("a") and not general.is_ascii({0: "猫"}) and general.is_chinese("a猫")
    assert "time" in general.methods(general.Profile())
    general.init_seeds(3)
    drawn = torch.rand(1), np.random.rand()
    general.init_seeds(3)
    assert (torch.rand(1), np.random.rand()) == drawn


def test_strip_optimizer_writes_in_place_and_elsewhere(nano: DetectionModel, tmp_path: Path, said: list[str]) -> None:
    content = {"model": nano.state_dict(), "yaml": nano.yaml, "names": nano.names, "stride": nano.stride}
    file = save(tmp_path / "a.pt", {**content, "optimizer": {"state": {}}, "epoch": 3})
    before = file.stat().st_size
    general.strip_optimizer(file, tmp_path / "b.pt")
    assert file.stat().st_size == before > (tmp_path / "b.pt").stat().st_size
    general.strip_optimizer(str(file))
    assert read(file).training is None and "MB" in said[-1]
    assert load_model(file).names == nano.names


def test_a_classifier_keeps_the_detections_it_agrees_with() -> None:
    class Reddest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1:] == (3, 224, 224) and x.max() <= 1
            return x.mean((2, 3))

    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :100, 2] = image[:, 100:, 0] = 255  # red on the left, blue on the right
    found = torch.tensor([[10.0, 40, 20, 50, 0.9, 0], [180, 40, 190, 50, 0.8, 2], [180, 40, 190, 50, 0.7, 0]])
    (kept,) = general.apply_classifier([found], Reddest(), torch.zeros(1, 3, 100, 200), image)
    assert kept[:, 4].tolist() == pytest.approx([0.9, 0.8])


# ------------------------------------------------------------------------------------------------------------ networks


def test_attempt_load_gives_what_programs_ask_of_it(shapes: DetectionModel) -> None:
    assert not shapes.training and shapes.names[0] and int(shapes.stride.max()) == 32
    assert next(shapes.parameters()).device == torch.device("cpu") and not hasattr(shapes, "module")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = load_model(SHAPES)(images)[0]
        assert torch.equal(shapes(images, augment=False, visualize=False)[0], expected)
    assert shapes.model[-1].inplace and shapes.yaml["nc"] == len(shapes.names)
    other = attempt_load([str(SHAPES)], torch.device("cpu"), False, False)
    assert not other.model[-1].inplace and other.model[0].bn is not None
    assert attempt_load(SHAPES, map_location="cpu").model[0].bn is None


def test_several_weights_are_an_ensemble(shapes: DetectionModel) -> None:
    both = attempt_load([SHAPES, SHAPES])
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        output, rest = both(images, augment=False)
        one = shapes(images)[0]
    assert isinstance(both, nn.ModuleList) and rest is None and torch.equal(output, torch.cat((one, one), 1))
    assert both.names == shapes.names and both.nc == shapes.yaml["nc"] and int(both.stride.max()) == 32
    other = DetectionModel({**shapes.yaml, "width_multiple": 0.125}, nc=2)
    with pytest.raises(UserError, match="classes"):
        Ensemble([shapes, other])


def test_batch_norms_fold_into_a_new_convolution() -> None:
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6).eval()
    bn.running_mean, bn.running_var = torch.rand(6), torch.rand(6) + 0.5
    weight = conv.weight.clone()
    fused = torch_utils.fuse_conv_and_bn(conv, bn)
    x = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(fused(x), bn(conv(x)))
    assert torch.equal(conv.weight, weight) and not fused.weight.requires_grad


def test_networks_are_described_and_changed(nano: DetectionModel, said: list[str]) -> None:
    torch_utils.model_info(nn.DataParallel(nano))
    torch_utils.model_info(nn.Sequential(nn.Conv2d(1, 2, 1)), verbose=True)
    assert "GFLOPs" in said[0] and "0.weight" in said[2] and "4 parameters" in said[-1]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
    torch_utils.initialize_weights(net)
    assert (net[1].eps, net[1].momentum, net[2].inplace) == (1e-3, 0.03, True)
    assert torch_utils.sparsity(nn.Linear(2, 2)) == 0
    torch_utils.prune(net, 0.5)
    assert float((net[0].weight == 0).float().mean()) == 0.5 and isinstance(net[0].weight, nn.Parameter)
    assert torch_utils.is_parallel(nn.DataParallel(net)) and torch_utils.de_parallel(nn.DataParallel(net)) is net
    assert torch_utils.de_parallel(net) is net
    net.module_list = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.ReLU()])
    assert torch_utils.find_modules(net) == [0]


def test_images_are_scaled_and_padded() -> None:
    images = torch.rand(1, 3, 64, 96)
    assert torch_utils.scale_img(images, 0.83, gs=32).shape == (1, 3, 64, 96)
    assert torch_utils.scale_img(images, 0.5, same_shape=True).shape == (1, 3, 32, 48)
    assert torch_utils.scale_img(images, 1.0) is images


def test_the_average_is_ours_told_the_network(nano: DetectionModel) -> None:
    theirs, ours = torch_utils.ModelEMA(nano, 0.9, 20), optim.ModelEMA(nano, decay=0.9, tau=20)
    with torch.no_grad():
        nano.head.m[0].bias += 1
    for _ in range(3):
        theirs.update(nn.DataParallel(nano))
        ours.update()
    assert theirs.updates == 3
    for a, b in zip(theirs.ema.state_dict().values(), ours.ema.state_dict().values()):
        assert torch.equal(a, b)
    copied = DetectionModel(nano.yaml)
    copied.load_state_dict(nano.state_dict())
    theirs.update(copied)
    ours.update()
    assert torch.equal(theirs.ema.head.m[0].bias, ours.ema.head.m[0].bias)
    nano.hyp = {"box": 1}
    theirs.update_attr(nano, include=["hyp", "names"])
    assert theirs.ema.hyp == {"box": 1}


def test_early_stopping_is_called(said: list[str]) -> None:
    stopper = torch_utils.EarlyStopping(patience=2)
    assert [stopper(epoch=e, fitness=f) for e, f in enumerate([0.1, 0.3, 0.2, 0.2])] == [False, False, False, True]
    assert stopper.best_epoch == 1 and stopper.possible_stop and said
    assert not any(torch_utils.EarlyStopping(0)(epoch, 0.0) for epoch in range(5))


def test_devices_clocks_and_decorators(said: list[str]) -> None:
    assert torch_utils.select_device("cpu", None) == torch_utils.select_device("cpu", 16, False) == torch.device("cpu")
    assert len(said) == 2 and "torch" in said[0]
    assert torch_utils.time_sync() <= torch_utils.time_synchronized()

    @torch_utils.smart_inference_mode()
    def run() -> bool:
        return torch.is_inference_mode_enabled()

    assert run()
    with torch_utils.torch_distributed_zero_first(-1):
        pass
    a, b = argparse.Namespace(), argparse.Namespace(x=1, _y=2, z=3)
    torch_utils.copy_attr(a, b, exclude=("z",))
    assert vars(a) == {"x": 1}


def test_the_optimizer_decays_weights_only(nano: DetectionModel) -> None:
    optimizer = torch_utils.smart_optimizer(nano, "SGD", 0.01, 0.9, 5e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 5e-4, 0]
    assert [len(group["params"]) for group in optimizer.param_groups] == list(map(len, optim.parameter_groups(nano)))
    assert isinstance(torch_utils.smart_optimizer(nano, "AdamW"), torch.optim.AdamW)


def test_other_small_faces(nano: DetectionModel, said: list[str]) -> None:
    assert autobatch.check_train_batch_size(nano, 64) == 16 and autobatch.autobatch(nano, 64, 0.5, 4) == 4
    frelu, x = activations.FReLU(2).eval(), torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(frelu(x), torch.maximum(x, frelu.bn(frelu.conv(x))))
    assert activations.SiLU is nn.SiLU and isinstance(nano.eval()(torch.rand(1, 3, 64, 64)), Output)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_ious_agree_with_torchvision() -> None:
    a, b = (torch.from_numpy(random_boxes(12, seed)).float() for seed in (1, 2))
    torch.testing.assert_close(box_iou(a, b), torchvision.ops.box_iou(a, b))
    assert bbox_iou(general.xyxy2xywh(a[:1]), general.xyxy2xywh(b)).shape == (12, 1)
    ops = torchvision.ops
    for options, reference in (
        ({}, ops.box_iou),
        ({"GIoU": True}, ops.generalized_box_iou),
        ({"DIoU": True}, ops.distance_box_iou),
        ({"CIoU": True}, ops.complete_box_iou),
    ):
        found = bbox_iou(a, b, False, **options)
        torch.testing.assert_close(found[:, 0], reference(a, b).diagonal(), atol=1e-5, rtol=1e-4)


def test_ap_per_class_has_seven_results_and_draws(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    correct, confidence = rng.random((50, 10)) < 0.5, rng.random(50)
    predicted, labels = rng.integers(0, 3, 50).astype(float), rng.integers(0, 4, 40).astype(float)
    average = AveragePrecision(4)
    average.update(correct, confidence, predicted, labels)
    expected = average.compute()
    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    tp, fp, p, r, f1, ap, classes = ap_per_class(
        correct, confidence, predicted, labels, True, tmp_path, names, prefix="x"
    )
    assert ap.shape == (4, 10) and classes.tolist() == [0, 1, 2, 3] and classes.dtype.kind == "i"
    for found, ours in zip(
        (tp, fp, p, r, f1, ap), ("true_positives", "false_positives", "precision", "recall", "f1", "ap")
    ):
        np.testing.assert_array_equal(found, getattr(expected, ours))
    assert {file.name for file in tmp_path.iterdir()} == {f"x{kind}_curve.png" for kind in ("PR", "F1", "P", "R")}


def test_the_confusion_matrix_takes_batches_and_draws(tmp_path: Path) -> None:
    confusion = ConfusionMatrix(nc=2, conf=0.3, iou_thres=0.5)
    labels = torch.tensor([[0.0, 0, 0, 10, 10], [1, 50, 50, 60, 60]])
    confusion.process_batch(torch.tensor([[0.0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.2, 1]]), labels)
    confusion.process_batch(None, labels)
    assert confusion.matrix.tolist() == [[1, 0, 0], [0, 0, 0], [1, 2, 0]]
    confusion.process_batch(torch.tensor([[0.0, 0, 10, 10, 0.9, 1]]), labels[:0])
    tp, fp = confusion.tp_fp()
    assert tp.tolist() == [1, 0] and fp.tolist() == [0, 1]
    confusion.plot(save_dir=tmp_path, names=["a", "b"])
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 1000


def test_check_anchors_writes_into_the_head(nano: DetectionModel, tiny_dataset: TinyDataset, said: list[str]) -> None:
    dataset = datasets.LoadImagesAndLabels(tiny_dataset.root / "images", 640)
    before = nano.head.anchors.clone()
    autoanchor.check_anchors(dataset, nano, 4.0, 640)
    assert "AutoAnchor" in said[-1] and torch.equal(nano.head.anchors, before)  # they fit
    nano.head.anchors.mul_(100)
    autoanchor.check_anchors(dataset, model=nn.DataParallel(nano), thr=4.0, imgsz=640)
    sizes = nano.head.anchors * nano.head.stride.view(-1, 1, 1)
    assert "replaced" in said[-1] and float(sizes.max()) < 640
    head = argparse.Namespace(anchors=torch.tensor([[[90.0, 90]], [[10, 10]]]), stride=torch.tensor([8.0, 16]))
    autoanchor.check_anchor_order(head)
    autoanchor.check_anchor_order(head)  # in order already
    assert head.anchors.flatten().tolist() == [10, 10, 90, 90]
    nano.head.anchors.copy_(before)


# -------------------------------------------------------------------------------------------------------------- drawing


def test_boxes_are_drawn_into_the_image_itself() -> None:
    image = np.zeros((120, 160, 3), np.uint8)
    annotator = Annotator(image, 3, example="{0: 'a'}")
    annotator.box_label(torch.tensor([40.0, 50, 100, 100]), "cat 0.9", color=(0, 0, 255))
    assert (image.min(2) > 150).any()  # the label, white
    assert annotator.result() is annotator.im is image and image[75, 40].tolist() == [0, 0, 255]
    annotator.rectangle([0, 0, 10, 10], fill=(9, 9, 9), outline=(7, 7, 7))
    annotator.text((60, 5), "hello", txt_color=(255, 0, 0))
    assert image[5, 5].tolist() == [9, 9, 9] and image[0, 0].tolist() == [7, 7, 7]
    assert (image[:30, :, 0] > 150).any()  # OpenCV 4 draws thin letters without a pixel of full colour
    frozen = image[..., ::-1]
    other = Annotator(frozen)
    other.box_label([1, 1, 50, 50], color=colors(0))
    assert other.result() is not frozen and (other.result() != frozen).any()
    picture = Annotator(Image.new("RGB", (60, 50)), pil=True)
    picture.box_label([5, 5, 40, 40], color=(255, 0, 0))
    assert picture.result()[20, 5].tolist() == [255, 0, 0]


def test_colours_are_rgb_or_bgr() -> None:
    assert (
        colors(3) == colors(3, True)[::-1] == colors(torch.tensor(23.0)) and len({colors(i) for i in range(20)}) == 20
    )


def test_plot_one_box_draws_in_place() -> None:
    image = np.zeros((80, 80, 3), np.uint8)
    assert plot_one_box(torch.tensor([10.0, 10, 60, 60]), image, (1, 2, 3), "x", 2) is None
    assert image[30, 10].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="ascontiguousarray"):
        plot_one_box([1, 1, 5, 5], image[:, ::-1])


def test_crops_are_bgr_and_numbered(tmp_path: Path) -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[..., 0] = 200  # blue, read as BGR
    box = torch.tensor([20.0, 30, 40, 80])
    file = tmp_path / "crops" / "a.png"
    crop = save_one_box(box, image, file, BGR=True)
    save_one_box(box, image, file=file, BGR=True)
    assert crop.shape == (61, 31, 3) and crop[0, 0].tolist() == [200, 0, 0]
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.jpg", "a2.jpg"]
    assert cv2.imread(str(file.with_suffix(".jpg")))[5, 5, 0] > 190
    square = save_one_box(box, image, gain=1.0, pad=0, square=True, save=False)
    assert square.shape == (50, 50, 3) and square[0, 0].tolist() == [0, 0, 200]  # an RGB image's red is last now
    assert not Path("im.jpg").exists()


def test_feature_maps_by_yolov5s_arguments(tmp_path: Path) -> None:
    feature_visualization(torch.rand(1, 4, 8, 8), "models.common.Conv", 3, n=2, save_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"stage3_Conv_features.png", "stage3_Conv_features.npy"}
