"""val.py from the outside: the reference numbers, what it prints and writes, and what bad input gets."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TinyDataset

import detect
import hubconf
import val
from models.checkpoints.files import save
from models.yolo import build_model
from tests.test_dataloaders import spoil
from utils import runtime
from utils.config import UserError
from utils.data import coco_categories


def micro_checkpoint(file: Path, names: tuple[str, ...], *, cfg: str = "yolov5n.yaml", seed: int = 0) -> Path:
    """An untrained network of yolov5n's rows with 8 to 32 channels, sure enough of itself to detect something."""
    torch.manual_seed(seed)
    data = copy.deepcopy(build_model(cfg).yaml)
    data["width_multiple"] = 0.03
    model = build_model(data, nc=len(names))
    with torch.no_grad():
        for level in model.head.m:
            level.bias.view(model.head.na, -1)[:, 4:].fill_(1.0)
    return save(
        file,
        {
            "model": model.state_dict(),
            "yaml": model.yaml,
            "names": dict(enumerate(names)),
            "stride": model.stride.tolist(),
            "epoch": -1,
            "best_fitness": 0.0,
        },
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: TinyDataset) -> Path:
    return micro_checkpoint(tmp_path_factory.mktemp("micro") / "micro.pt", tiny_dataset.names)


def quick(checkpoint: Path, dataset: TinyDataset, folder: Path, **changes: Any) -> val.Summary:
    options = dict(
        weights=str(checkpoint),
        data=str(dataset.yaml),
        imgsz=64,
        batch_size=2,
        workers=0,
        noplots=True,
        project=str(folder / "runs"),
        device="cpu",
    )
    return val.run(**{**options, **changes})


# --------------------------------------------------------------------------------------------------- reference numbers


def script(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "val.py"), *map(str, arguments)], text=True, capture_output=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def row_of(output: str, name: str = "all") -> list[float]:
    line = next(line for line in output.splitlines() if line.split() and line.split()[0] == name)
    return [float(value) for value in line.split()[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 8])
def test_yolov5n_gets_the_reference_numbers_on_coco128(
    weights_dir: Path, datasets_dir: Path, tmp_path: Path, workers: int
) -> None:
    """Issue 2, acceptance 3; measured with upstream on the same files."""
    output = script(
        "--weights", weights_dir / "yolov5n.pt", "--data", "coco128.yaml", "--img", 640, "--batch", 32,
        "--workers", workers, "--project", tmp_path, "--noplots",
    )  # fmt: skip
    images, instances, *metrics = row_of(output)
    assert (images, instances) == (128, 929)
    assert metrics == pytest.approx([0.616, 0.409, 0.463, 0.309], abs=0.002)


@pytest.mark.slow
def test_bf16_keeps_map_within_what_help_says(weights_dir: Path, datasets_dir: Path, tmp_path: Path) -> None:
    if not runtime.native_bf16():
        pytest.skip("this CPU has no bf16 of its own")
    common = ("--weights", weights_dir / "yolov5n.pt", "--data", "coco128.yaml", "--project", tmp_path, "--noplots")
    *_, map50, map5095 = row_of(script(*common, "--half"))
    assert (map50, map5095) == pytest.approx((0.4636, 0.3103), abs=0.0025)  # 0.002, printed to three digits


# -------------------------------------------------------------------------------------------- what it prints and writes


def test_the_summary_has_metrics_losses_maps_and_times(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    summary, maps, times = quick(checkpoint, tiny_dataset, tmp_path)
    assert len(summary) == 7 and summary[4:] == (0.0, 0.0, 0.0)
    assert maps.shape == (2,) and len(times) == 3 and all(time > 0 for time in times)
    assert (tmp_path / "runs/exp").is_dir()


@pytest.mark.parametrize("changes", [{"batch_size": 4}, {"workers": 2}], ids=str)
def test_numbers_do_not_depend_on_workers_or_on_images_of_one_shape_per_batch(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # task speed: square images without padding, so that a batch's other images cannot change an image's shape
    wanted = quick(checkpoint, tiny_dataset, tmp_path, task="speed")[0]
    assert quick(checkpoint, tiny_dataset, tmp_path, task="speed", **changes)[0] == pytest.approx(wanted, abs=1e-6)


def test_label_files_hold_class_centre_size_and_confidence_in_0_to_1(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    quick(checkpoint, tiny_dataset, tmp_path, save_txt=True, save_conf=True)
    files = sorted((tmp_path / "runs/exp/labels").iterdir())
    assert [file.name for file in files] == [f"val{i}.txt" for i in range(4)]
    rows = np.concatenate([np.loadtxt(file, ndmin=2) for file in files])
    assert rows.shape[1] == 6 and len(rows) > 20
    assert set(rows[:, 0]) <= {0, 1} and rows[:, 1:].min() >= 0 and rows[:, 1:].max() <= 1
    assert all(np.diff(np.loadtxt(file, ndmin=2)[:, 5]).max() <= 0 for file in files)


def test_hybrid_labels_contain_the_labels_and_score_full_marks(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    summary = quick(checkpoint, tiny_dataset, tmp_path, save_hybrid=True)[0]
    assert summary[2] > 0.9
    for image in tiny_dataset.val:
        label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
        truth = np.loadtxt(label, ndmin=2)
        found = np.loadtxt(tmp_path / "runs/exp/labels" / label.name, ndmin=2)
        distance = np.abs(truth[:, None] - found[None]).max(2).min(1)
        assert distance.max() < 0.01


def test_json_holds_boxes_from_the_top_left_in_pixels(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    quick(checkpoint, tiny_dataset, tmp_path, save_json=True)
    rows = json.loads((tmp_path / "runs/exp/micro_predictions.json").read_text(encoding="utf-8"))
    assert {row["image_id"] for row in rows} == {f"val{i}" for i in range(4)}
    for row in rows:
        x, y, w, h = row["bbox"]
        assert x >= 0 and y >= 0 and x + w <= 128.01 and y + h <= 128.01 and row["category_id"] in (0, 1)
        assert row["score"] == round(row["score"], 5) and x == round(x, 3)


def test_coco_categories_skip_the_ten_ids_that_were_never_used() -> None:
    categories = coco_categories()
    assert len(categories) == 80 and categories[:12] == [*range(1, 12), 13] and categories[-1] == 90


def test_predictions_are_scored_with_pycocotools_where_annotations_lie(
    checkpoint: Path, own_tiny_dataset: TinyDataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools", reason="pycocotools is an optional extra")
    images, annotations = [], []
    for number, image in enumerate(own_tiny_dataset.val):  # COCO's ids are numbers, and so are its file names
        renamed = image.with_name(f"{number + 1:012d}.png")
        label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
        height, width = (96, 128) if number % 2 == 0 else (128, 96)
        for c, cx, cy, w, h in np.loadtxt(label, ndmin=2).tolist():
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, "category_id": int(c)})
            annotations[-1].update({"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        image.rename(renamed)
        label.rename(label.with_name(renamed.with_suffix(".txt").name))
        images.append({"id": number + 1, "file_name": renamed.name, "height": height, "width": width})
    content = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in (0, 1)]}
    folder = own_tiny_dataset.root / "annotations"
    folder.mkdir()
    (folder / "instances_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    ours = quick(checkpoint, own_tiny_dataset, tmp_path, save_hybrid=True)[0]
    official = quick(checkpoint, own_tiny_dataset, tmp_path, save_hybrid=True, save_json=True)[0]
    assert official[2] != ours[2] and official[2] == pytest.approx(ours[2], abs=0.05)
    assert "Average Precision" in capfd.readouterr().out


def test_several_checkpoints_are_judged_together(checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    other = micro_checkpoint(tmp_path / "other.pt", tiny_dataset.names, seed=1)
    counts = []
    for weights in (str(checkpoint), [str(checkpoint), str(other)]):
        folder = tmp_path / str(len(counts))
        quick(checkpoint, tiny_dataset, folder, weights=weights, save_txt=True, max_det=100_000, iou_thres=0.99)
        counts.append(sum(len(f.read_text().splitlines()) for f in (folder / "runs/exp/labels").iterdir()))
    assert counts[1] > 1.5 * counts[0]


def detections_of(folder: Path) -> np.ndarray:
    """All rows of a run's label files."""
    return np.concatenate([np.loadtxt(file, ndmin=2) for file in sorted((folder / "runs/exp/labels").iterdir())])


def test_several_segmentation_networks_give_classes_and_no_mask_coefficients(
    tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    file = micro_checkpoint(tmp_path / "seg.pt", tiny_dataset.names, cfg="yolov5n-seg.yaml")
    one = quick(file, tiny_dataset, tmp_path / "one", save_txt=True, save_conf=True)[0]
    two = quick(file, tiny_dataset, tmp_path / "two", weights=[str(file)] * 2, save_txt=True, save_conf=True)[0]
    assert two == pytest.approx(one, abs=1e-6)  # a copy adds nothing that NMS keeps
    np.testing.assert_allclose(detections_of(tmp_path / "two"), detections_of(tmp_path / "one"), atol=1e-5)
    assert set(detections_of(tmp_path / "two")[:, 0]) == {0, 1}


@pytest.mark.parametrize("changes", [{}, {"single_cls": True}], ids=str)
@pytest.mark.parametrize(
    ("cfg", "names", "message"),
    [
        ("yolov5n-seg.yaml", ("a", "b"), "file 2 predicts 2 classes and 32 mask coefficients per box, file 1 2 and 0"),
        ("yolov5n.yaml", ("a", "b", "c"), "file 2 predicts 3 classes and 0 mask coefficients|knows 3 classes"),
    ],
)
def test_networks_whose_boxes_differ_are_no_ensemble(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path, cfg: str, names: tuple[str, ...], message: str,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    other = micro_checkpoint(tmp_path / "other.pt", names, cfg=cfg)
    with pytest.raises(UserError, match=message):
        quick(checkpoint, tiny_dataset, tmp_path, weights=[str(checkpoint), str(other)], **changes)
    assert not (tmp_path / "runs").exists()


def test_with_one_class_the_files_say_that_class(checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    quick(checkpoint, tiny_dataset, tmp_path, save_txt=True, save_json=True)
    assert set(detections_of(tmp_path)[:, 0]) == {0, 1}
    quick(checkpoint, tiny_dataset, tmp_path, save_txt=True, save_json=True, single_cls=True, exist_ok=True, name="one")
    rows = [np.loadtxt(file, ndmin=2) for file in (tmp_path / "runs/one/labels").iterdir()]
    assert {row[0] for file in rows for row in file} == {0}
    written = json.loads((tmp_path / "runs/one/micro_predictions.json").read_text(encoding="utf-8"))
    assert {row["category_id"] for row in written} == {0} and len(written) == sum(map(len, rows))


def test_with_one_class_coco_gets_its_first_category(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    from utils.data import load_dataset
    from utils.engine import ImageResult

    root = own_tiny_dataset.root / "coco"
    spec = load_dataset({"path": str(root), "train": "x", "val": "val2017.txt", "names": ["a", "b"]})
    options = val.build_parser().parse_args(["--save-json", "--noplots"])
    writer = val.ResultWriter(options, spec, {0: "item"}, tmp_path, plots=False)
    writer.image(ImageResult("1.jpg", (10, 10), torch.tensor([[1.0, 1, 5, 5, 0.5, 0]]), torch.zeros(0, 5)))
    assert [row["category_id"] for row in writer.predictions] == [1]


def test_keywords_are_converted_as_on_the_command_line(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    wanted = quick(checkpoint, tiny_dataset, tmp_path)[0]
    words = dict(
        weights=checkpoint, data=tiny_dataset.yaml, imgsz="64", batch_size="2", conf_thres="0.001", workers="0"
    )
    assert quick(checkpoint, tiny_dataset, tmp_path, **words, project=tmp_path, device=torch.device("cpu"))[0] == wanted


def test_augmentation_single_class_and_verbose_rows_work(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path, said: list[str]
) -> None:
    quick(checkpoint, tiny_dataset, tmp_path, augment=True, verbose=True)
    assert {"square", "disc"} <= set(" ".join(said).split())
    summary, maps, _ = quick(checkpoint, tiny_dataset, tmp_path, single_cls=True)
    assert maps.shape == (1,) and len(summary) == 7


@pytest.mark.slow
def test_a_study_writes_a_row_per_size(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(val, "STUDY_SIZES", range(32, 129, 32))
    quick(checkpoint, tiny_dataset, tmp_path, task="study", noplots=False)
    rows = np.loadtxt(tmp_path / "runs/exp/study_tiny_micro.txt")
    assert rows.shape == (4, 10)
    assert (tmp_path / "runs/exp/study.png").stat().st_size > 1000


@pytest.mark.slow
def test_pictures_are_written(checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    quick(checkpoint, tiny_dataset, tmp_path, noplots=False)
    names = {file.name for file in (tmp_path / "runs/exp").iterdir()}
    curves = {f"{name}_curve.png" for name in ("PR", "F1", "P", "R")}
    batches = {f"val_batch{i}_{kind}.jpg" for i in range(2) for kind in ("labels", "pred")}
    assert curves | batches | {"confusion_matrix.png"} <= names


# ----------------------------------------------------------------------------------------------------------- bad input


def test_another_number_of_classes_is_named(checkpoint: Path, own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    data = yaml.safe_load(own_tiny_dataset.yaml.read_text(encoding="utf-8"))
    data["names"] = ["a", "b", "c"]
    own_tiny_dataset.yaml.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(UserError, match=r"micro\.pt: knows 2 classes, but .*tiny\.yaml names 3.*--single-cls"):
        quick(checkpoint, own_tiny_dataset, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dnn": True}, "--dnn .* is not offered"),
        ({"task": "valid"}, "expected one of train, val, test, speed, study"),
        ({"confthres": 0.1}, "unknown option 'confthres'. Did you mean 'conf_thres'"),
        ({"task": "test"}, "names no 'test' images"),
        ({"conf_thres": 1.5}, "threshold must be within 0..1"),
        ({"device": "7"}, "there is no CUDA device 7 here"),
        ({"imgsz": 100_000_000}, "--imgsz 100000000: expected at most 16384"),
        ({"max_megapixels": 0}, "--max-megapixels 0: expected 1 or more"),
    ],
)
def test_wrong_options_are_refused(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        quick(checkpoint, tiny_dataset, tmp_path, **changes)


def test_half_on_a_cpu_without_bf16_is_refused_everywhere(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "native_bf16", lambda: False)
    common = ["--weights", str(checkpoint), "--project", str(tmp_path / "runs"), "--device", "cpu", "--half"]
    message = r"--half needs a CUDA device \(fp16\) or a CPU with .* Leave it out: fp32"
    with pytest.raises(UserError, match=message):
        val.main([*common, "--data", str(tiny_dataset.yaml), "--img", "64", "--workers", "0", "--noplots"])
    with pytest.raises(UserError, match=message):
        detect.main([*common, "--source", str(tiny_dataset.val[0]), "--img", "64", "--nosave"])
    with pytest.raises(UserError, match=message):
        hubconf.custom(checkpoint, device="cpu", half=True, _verbose=False)
    assert not (tmp_path / "runs").exists()


def test_half_on_a_cpu_with_bf16_says_so(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "native_bf16", lambda: True)
    quick(checkpoint, tiny_dataset, tmp_path, half=True)
    common = ["--weights", str(checkpoint), "--project", str(tmp_path / "runs"), "--device", "cpu", "--half"]
    detect.main([*common, "--source", str(tiny_dataset.val[0]), "--img", "64", "--nosave"])
    assert sum(line.startswith("--half: computing in bf16") for line in said) == 2
    network = hubconf.custom(checkpoint, device="cpu", half=True, _verbose=False)
    assert network.model.dtype is torch.bfloat16


def test_a_size_that_is_not_a_multiple_of_the_stride_is_rounded_up(
    checkpoint: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    wanted = quick(checkpoint, tiny_dataset, tmp_path, imgsz=96)[0]
    assert quick(checkpoint, tiny_dataset, tmp_path, imgsz=70)[0] == wanted


def test_a_mistyped_flag_ends_with_2_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "val.py"), "--wieghts", "x.pt"],
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 2 and "Did you mean '--weights'?" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_picture_counts_as_missed_and_pictures_above_the_bound_are_left_out(
    checkpoint: Path, own_tiny_dataset: TinyDataset, tmp_path: Path, said: list[str]
) -> None:
    whole = quick(checkpoint, own_tiny_dataset, tmp_path, conf_thres=0.001)
    spoil(own_tiny_dataset.val[0])
    results = [quick(checkpoint, own_tiny_dataset, tmp_path, workers=workers)[0] for workers in (0, 2)]
    assert results[0] == results[1] and results[0][1] <= whole[0][1], "recall cannot rise"
    lines = [line for line in said if "cannot be decoded" in line]
    assert len(lines) == 2 and all("val0.png" in line and "judged as grey" in line for line in lines)
    for file in own_tiny_dataset.val[1:]:
        file.write_bytes(cv2.imencode(".png", np.zeros((1100, 1000, 3), np.uint8))[1].tobytes())
    with pytest.raises(UserError, match=r"3 of the 4 images .* val1\.png: 1000 x 1100 pixels.*--skip-bad"):
        quick(checkpoint, own_tiny_dataset, tmp_path, max_megapixels=1)
    quick(checkpoint, own_tiny_dataset, tmp_path, max_megapixels=1, skip_bad=True)
    assert any("1 images, 0 backgrounds, 3 corrupt" in line for line in said)
