"""Checkpoints: upstream's are read whole whatever classes they name; ours come back bit for bit and are never half."""

from __future__ import annotations

import copy
import random
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoints.archive import Archive
from models.checkpoints.files import FORMAT, load_model, network_yaml, read, save, state_dict, strip
from models.yolo import DetectionModel
from utils.boxes import box_iou
from utils.config import UserError
from utils.nms import non_max_suppression

NAMES = {0: "cat", 1: "dog", 2: "bird"}


def tiny_yaml(*, nc: int = 3, se: list[Any] | None = None) -> dict[str, Any]:
    """A network of two levels with the usual key patterns, small enough to write often."""
    backbone: list[Any] = [[-1, 1, "Conv", [8, 6, 2, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "C3", [16]]]
    backbone += [[-1, 1, "SE", se]] if se else []
    level = len(backbone) - 1
    head = [[-1, 1, "Conv", [32, 3, 2]], [[level, level + 1], 1, "Detect", ["nc", "anchors"]]]
    anchors = [[10, 13, 16, 30], [30, 61, 62, 45]]
    return {
        "nc": nc,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": anchors,
        "backbone": backbone,
        "head": head,
    }


@pytest.fixture
def model() -> DetectionModel:
    torch.manual_seed(0)
    network = DetectionModel(tiny_yaml())
    network.names = dict(NAMES)
    for key, buffer in network.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return network.eval()


def ours(network: DetectionModel) -> dict[str, Any]:
    """The content of a finished checkpoint of ours."""
    return {
        "epoch": 4,
        "best_fitness": 0.25,
        "model": network.state_dict(),
        "yaml": network.yaml,
        "names": network.names,
        "stride": network.stride,
        "opt": {"weights": Path("a/b.pt"), "epochs": 5},
        "hyp": {"lr0": np.float64(0.01)},
    }


def equal(a: Any, b: Any) -> bool:
    """Equal values and types all the way down; tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


# ----------------------------------------------------------------------------------------------------- upstream's files


def test_the_official_yolov5n_is_read_whole(weights_dir: Path) -> None:
    with Archive(weights_dir / "yolov5n.pt") as archive:
        assert len(state_dict(archive.content["model"])) == 350
    checkpoint = read(weights_dir / "yolov5n.pt")
    assert len(checkpoint.tensors) == 349, "without the anchor_grid buffer"
    assert {v.dtype for v in checkpoint.tensors.values()} == {torch.float32, torch.int64}
    assert (checkpoint.names[0], checkpoint.names[79], checkpoint.num_classes) == ("person", "toothbrush", 80)
    assert checkpoint.stride == (8.0, 16.0, 32.0) and checkpoint.task == "detect" and checkpoint.epoch == -1
    assert checkpoint.best_fitness == pytest.approx(0.26757, abs=1e-5), "a numpy array in the file"
    assert checkpoint.hyp["lr0"] == 0.01 and not checkpoint.ours and checkpoint.training is None
    assert torch.equal(checkpoint.tensors["model.24.anchors"][0, 0], torch.tensor([1.25, 1.625]))


def test_yolov5n_finds_what_is_in_a_photo(weights_dir: Path, datasets_dir: Path) -> None:
    network = load_model(weights_dir / "yolov5n.pt")
    image = cv2.imread(str(datasets_dir / "coco128/images/train2017/000000000192.jpg"))
    assert image.shape == (480, 640, 3), "no letterbox needed"
    batch = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        found = non_max_suppression(network(batch)[0], 0.5, 0.45)[0]
    expected = torch.tensor([[266.2, 183.0, 378.1, 425.0], [0.5, 266.8, 41.0, 479.7], [354.5, 246.9, 481.5, 480.1],
                             [437.1, 219.9, 521.0, 467.7], [346.7, 325.0, 385.1, 377.5]])  # fmt: skip
    assert [network.names[int(c)] for c in found[:, 5]] == ["person"] * 4 + ["baseball glove"]
    assert torch.allclose(found[:, 4], torch.tensor([0.878, 0.866, 0.822, 0.807, 0.586]), atol=0.01)
    assert box_iou(found[:, :4], expected).diagonal().min() > 0.98
    assert not network.training and found.dtype == torch.float32


def test_grids_cached_in_the_file_do_not_reach_the_network(weights_dir: Path) -> None:
    network = load_model(weights_dir / "yolov5n.pt")
    with torch.inference_mode():
        first = network(torch.zeros(1, 3, 640, 640))[0]
    assert first.shape == (1, 25200, 85) and (first[..., 2:4] > 0).all(), "upstream: all of P3 without size"
    xy = first[0, 0, :2]
    assert (xy > -4).all() and (xy < 12).all(), "the first cell is centred on 4, 4"


class Fork:
    """Upstream-like classes in a module that exists only while the file is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = types.ModuleType("my_fork.layers")
        self.monkeypatch = monkeypatch

    def disguise(self, network: nn.Module) -> nn.Module:
        """A copy whose classes are called MyX and lie in `my_fork.layers`."""
        network = copy.deepcopy(network)
        for name in ("my_fork", "my_fork.layers"):
            self.monkeypatch.setitem(sys.modules, name, self.module)
        for part in network.modules():
            name = f"My{type(part).__name__}"
            if not hasattr(self.module, name):
                fake = type(name, (nn.Module,), {"__module__": "my_fork.layers"})
                setattr(self.module, name, fake)
            part.__class__ = getattr(self.module, name)
        return network

    def vanish(self) -> None:
        for name in ("my_fork", "my_fork.layers"):
            self.monkeypatch.delitem(sys.modules, name)


def upstream(network: nn.Module, **changes: Any) -> dict[str, Any]:
    """What upstream saves: whole modules in fp16."""
    half = copy.deepcopy(network).half()
    content = {"epoch": -1, "best_fitness": None, "model": half, "ema": None, "updates": None, "optimizer": None}
    return {**content, "opt": {}, "date": "2023-01-01", **changes}


def same_as(tensors: dict[str, torch.Tensor], network: nn.Module) -> bool:
    wanted = {k: v.half().float() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    return equal(wanted, tensors)


def test_the_users_class_names_do_not_matter(
    tmp_path: Path, model: DetectionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = Fork(monkeypatch)
    torch.save(upstream(fork.disguise(model)), tmp_path / "a.pt")
    fork.vanish()
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "a.pt", weights_only=False)
    checkpoint = read(tmp_path / "a.pt")
    assert same_as(checkpoint.tensors, model) and checkpoint.names == NAMES
    loaded = load_model(checkpoint, fuse=False)
    assert same_as(loaded.state_dict(), model) and loaded.names == NAMES


def test_names_as_list_or_dict_give_the_same(tmp_path: Path, model: DetectionModel) -> None:
    model.names = list(NAMES.values())  # type: ignore[assignment]
    torch.save(upstream(model), tmp_path / "list.pt")
    assert read(tmp_path / "list.pt").names == NAMES


def test_the_ema_is_preferred_and_a_run_in_training_is_read(tmp_path: Path, model: DetectionModel) -> None:
    ema = copy.deepcopy(model)
    for parameter in ema.parameters():
        parameter.data += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content = upstream(
        model,
        ema=copy.deepcopy(ema).half(),
        epoch=7,
        best_fitness=np.array([0.125]),
        optimizer=optimizer.state_dict() | {"lr": np.float64(0.1)},
        opt={"evolve_population": Path("data/hyps"), "hyp": {"lr0": 0.02}, "lr": np.float32(0.5), "save_dir": "runs"},
    )
    torch.save(content, tmp_path / "last.pt")
    checkpoint = read(tmp_path / "last.pt")
    assert same_as(checkpoint.tensors, ema) and checkpoint.epoch == 7 and checkpoint.best_fitness == 0.125
    assert checkpoint.opt["evolve_population"] == "data/hyps" and checkpoint.opt["lr"] == 0.5
    assert checkpoint.hyp == {"lr0": 0.02} and checkpoint.training is None, "only our files can be resumed"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_wrappers_are_looked_through(tmp_path: Path, model: DetectionModel, protocol: int) -> None:
    wrapped = nn.DataParallel(model)
    torch.save({"model": wrapped}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert list(read(tmp_path / "a.pt").tensors) == list(model.state_dict())


def test_a_module_saved_by_itself_is_read(tmp_path: Path, model: DetectionModel) -> None:
    torch.save(model, tmp_path / "a.pt")
    assert load_model(tmp_path / "a.pt").names == NAMES


def test_tensors_with_attributes_of_their_own_are_read(tmp_path: Path) -> None:
    parameter, tensor = nn.Parameter(torch.arange(3.0)), torch.arange(4.0)
    parameter.note, tensor.note = "kept by nobody", Path("x")  # type: ignore[attr-defined]
    torch.save({"model": {"a": parameter, "b": tensor, "c": tensor[1:3]}}, tmp_path / "a.pt")
    tensors = read(tmp_path / "a.pt").tensors
    assert [tensors[key].tolist() for key in "abc"] == [[0, 1, 2], [0, 1, 2, 3], [1, 2]]


def test_sync_batch_norm_is_batch_norm(tmp_path: Path, model: DetectionModel) -> None:
    torch.save(upstream(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))), tmp_path / "a.pt")
    assert same_as(load_model(tmp_path / "a.pt", fuse=False).state_dict(), model)


def test_a_file_saved_after_fusing_loads_fused(tmp_path: Path, model: DetectionModel) -> None:
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(image)[0]
    torch.save({"model": copy.deepcopy(model).fuse()}, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert checkpoint.fused and not read(save(tmp_path / "b.pt", ours(model))).fused
    with torch.inference_mode():
        assert torch.allclose(load_model(checkpoint)(image)[0], expected, rtol=1e-3, atol=1e-3)


def test_fusing_does_not_change_what_is_found(tmp_path: Path, model: DetectionModel) -> None:
    path = save(tmp_path / "a.pt", ours(model))
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        plain, fused = load_model(path, fuse=False)(image)[0], load_model(path)(image)[0]
    assert torch.allclose(plain, fused, rtol=1e-3, atol=1e-3)


def test_a_classification_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Module()
    network.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2))  # type: ignore[assignment]
    fake = type("ClassificationModel", (nn.Module,), {"__module__": "models.yolo"})
    monkeypatch.setattr("models.yolo.ClassificationModel", fake)
    network.__class__ = fake
    torch.save(upstream(network), tmp_path / "yolov5s-cls.pt")
    assert read(tmp_path / "yolov5s-cls.pt").task == "classify"
    with pytest.raises(UserError, match=r"yolov5s-cls\.pt: a classification network.* Use yolov5s\.pt"):
        load_model(tmp_path / "yolov5s-cls.pt")


def test_a_file_of_the_ultralytics_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("ultralytics.nn.tasks")
    fake = type("DetectionModel", (nn.Module,), {"__module__": "ultralytics.nn.tasks"})
    module.DetectionModel = fake  # type: ignore[attr-defined]
    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"model": fake()}, tmp_path / "yolov8n.pt")
    with pytest.raises(UserError, match="YOLOv8 or later"):
        read(tmp_path / "yolov8n.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_a_state_dict_is_read_and_asks_for_its_network(
    tmp_path: Path, model: DetectionModel, prefix: str, key: str | None
) -> None:
    tensors = OrderedDict((prefix + k, v) for k, v in model.state_dict().items())
    torch.save({key: tensors, "epoch": 3} if key else tensors, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert equal(dict(model.state_dict()), checkpoint.tensors) and checkpoint.yaml is None
    with pytest.raises(UserError, match="--cfg"):
        load_model(checkpoint)


def test_an_unknown_layer_is_named_with_its_place(tmp_path: Path, model: DetectionModel) -> None:
    content = ours(model)
    content["yaml"] = copy.deepcopy(model.yaml)
    content["yaml"]["backbone"][2][2] = "SEx"
    path = save(tmp_path / "best.pt", content)
    with pytest.raises(
        UserError, match=r"best\.pt: its network uses a layer named SEx, .*Did you mean 'SE'\? Add the cl"
    ):
        load_model(path)


@pytest.mark.parametrize("written", [[16], [16, 16], [16, 8]])
def test_the_shape_of_l1_decides_the_reduction(tmp_path: Path, written: list[int]) -> None:
    network = DetectionModel(tiny_yaml(se=[16, 4]))
    network.names = dict(NAMES)
    content = {**ours(network), "yaml": tiny_yaml(se=written)}
    checkpoint = read(save(tmp_path / "a.pt", content))
    loaded = load_model(checkpoint, fuse=False)
    assert loaded.model[3].l1.weight.shape == (4, 16)
    assert equal(dict(network.state_dict()), dict(loaded.state_dict()))
    assert network_yaml(checkpoint)["backbone"][3][3] == [16, 4] and checkpoint.yaml["backbone"][3][3] == written


def test_tensors_that_do_not_fit_the_yaml_are_named(tmp_path: Path, model: DetectionModel) -> None:
    content = {**ours(model), "yaml": tiny_yaml(nc=5)}
    with pytest.raises(UserError, match=r"4 of another shape \(first model\.4\.m\.0\.weight\)"):
        load_model(save(tmp_path / "a.pt", content))


# ------------------------------------------------------------------------------------------------------------ our files


def training_content(network: DetectionModel) -> dict[str, Any]:
    """Everything a run needs to go on."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.937, 0.999))
    sum(p.square().sum() for p in network.parameters()).backward()
    optimizer.step()
    ema = {k: v + 0.5 if v.is_floating_point() else v.clone() for k, v in network.state_dict().items()}
    numpy_state = np.random.default_rng(3).bit_generator.state
    rng = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy_state, "cuda": []}
    return {
        **ours(network),
        "ema": ema,
        "updates": 12,
        "optimizer": optimizer.state_dict(),
        "schedule": {"iteration": 17, "fitness": [0.1, 0.25]},
        "rng": rng,
    }


def test_what_a_run_needs_comes_back_bit_for_bit(tmp_path: Path, model: DetectionModel) -> None:
    content = training_content(model)
    checkpoint = read(save(tmp_path / "last.pt", content))
    kept = checkpoint.training
    assert checkpoint.ours and kept is not None and kept["format"] == FORMAT
    for key in ("ema", "updates", "optimizer", "schedule", "rng", "epoch", "best_fitness", "names"):
        assert equal(content[key], kept[key]), key
    assert equal(dict(content["model"]), kept["model"])
    assert equal(content["ema"], checkpoint.tensors), "the EMA is what the network is"
    assert checkpoint.opt["weights"] == str(Path("a/b.pt")) and checkpoint.hyp == {"lr0": 0.01}
    assert checkpoint.stride == tuple(model.stride.tolist()) and checkpoint.yaml == model.yaml
    torch.set_rng_state(kept["rng"]["torch"])
    random.setstate(kept["rng"]["python"])
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(kept["optimizer"])
    assert read(tmp_path / "last.pt", training=False).training is None


def test_our_files_open_with_torchs_own_safe_loader(tmp_path: Path, model: DetectionModel) -> None:
    path = save(tmp_path / "last.pt", training_content(model))
    content = torch.load(path, weights_only=True)
    assert content["format"] == FORMAT and equal(dict(model.state_dict()), content["model"]) and content["date"]


def test_stripping_keeps_the_ema_in_half_precision_and_drops_the_rest(tmp_path: Path, model: DetectionModel) -> None:
    content = training_content(model)
    last = save(tmp_path / "last.pt", content)
    best = strip(last, tmp_path / "best.pt")
    assert best.stat().st_size < last.stat().st_size / 3
    raw = torch.load(best, weights_only=True)
    assert {"optimizer", "ema", "updates", "rng", "schedule"}.isdisjoint(raw)
    assert {v.dtype for v in raw["model"].values()} == {torch.float16, torch.int64}
    checkpoint = read(best)
    assert checkpoint.training is None and checkpoint.names == NAMES and checkpoint.opt["epochs"] == 5
    for key, value in content["ema"].items():
        wanted = value.half().float() if value.is_floating_point() else value
        assert torch.equal(checkpoint.tensors[key], wanted)
    strip(last)
    assert equal(read(last).tensors, checkpoint.tensors), "in place"


def test_a_fused_file_is_still_fused_after_stripping(tmp_path: Path, model: DetectionModel) -> None:
    torch.save({"model": copy.deepcopy(model).fuse()}, tmp_path / "a.pt")
    assert load_model(strip(tmp_path / "a.pt")).names == NAMES


def test_the_official_file_strips_to_one_of_ours(tmp_path: Path, weights_dir: Path) -> None:
    out = strip(weights_dir / "yolov5n.pt", tmp_path / "n.pt")
    before, after = read(weights_dir / "yolov5n.pt"), read(out)
    assert after.ours and equal(before.tensors, after.tensors) and before.yaml == after.yaml
    assert out.stat().st_size < (weights_dir / "yolov5n.pt").stat().st_size


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, model: DetectionModel) -> None:
    resource = pytest.importorskip("resource", reason="the limit on file sizes is a POSIX one")
    path = save(tmp_path / "last.pt", {"model": {"w": torch.zeros(3)}})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError) as caught:
            save(path, ours(model))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "last.pt: cannot be written" in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_that_is_a_file_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "weights" / "last.pt", {"model": {"w": torch.zeros(3)}})


def test_what_torchs_safe_loader_would_refuse_is_refused_when_writing(tmp_path: Path, model: DetectionModel) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\['model'\] is a DetectionModel"):
        save(tmp_path / "a.pt", {"model": model})
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_newer_format_says_so(tmp_path: Path) -> None:
    torch.save({"format": FORMAT, "version": 99, "model": {"w": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="newer version"):
        read(tmp_path / "a.pt")
