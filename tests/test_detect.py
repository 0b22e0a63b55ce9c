"""detect.py from end to end: on a small network of random weights, and on real weights and photos where given."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
from models.checkpoints import files as checkpoint
from models.yolo import DetectionModel
from utils.boxes import paired_iou
from utils.config import UserError
from utils.runtime import LOGGER

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A yolov5n of two classes with random weights, which finds plenty at --conf-thres 0.001."""
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=2)
    with torch.no_grad():
        for head in model.head.m:
            head.bias.view(3, -1)[:, 4] = 0.5  # objectness 0.6 instead of the prior of a head not trained yet
            head.bias.view(3, -1)[:, 5:] = torch.tensor([0.3, 0.0])
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": {0: "cat", 1: "hot dog"}}
    content |= {"stride": model.stride, "epoch": 3, "optimizer": {"state": torch.zeros(100_000)}}
    return checkpoint.save(tmp_path_factory.mktemp("weights") / "tiny.pt", content)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines logged during a test."""
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


def photo(path: Path, seed: int = 0, shape_hw: tuple[int, int] = (48, 96)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 255, (*shape_hw, 3), dtype=np.uint8)
    path.write_bytes(cv2.imencode(path.suffix.lower(), image)[1].tobytes())
    return path


def clip(path: Path, frames: int = 4, fps: float = 10) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (96, 64))
    for k in range(frames):
        writer.write(np.random.default_rng(k).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    writer.release()
    return path


def run(weights: Path, source: object, tmp_path: Path, **options: object) -> Path:
    """Detect on the CPU at 64 pixels; the run's folder."""
    settings = dict(imgsz=64, device="cpu", conf_thres=0.001, max_det=5, project=str(tmp_path / "runs"), name="exp")
    detect.run(
        weights=str(weights), source=source if isinstance(source, list) else str(source), **{**settings, **options}
    )
    return tmp_path / "runs" / str(options.get("name", "exp"))


def numbers(file: Path) -> np.ndarray:
    return np.loadtxt(file, ndmin=2)


# -------------------------------------------------------------------------------------------------------------- results


def test_every_kind_of_result_is_written_for_images(weights: Path, tmp_path: Path, log: list[str]) -> None:
    for name in ("a.jpg", "b.PNG"):
        photo(tmp_path / "in" / name)
    folder = run(
        weights, tmp_path / "in", tmp_path, save_txt=True, save_conf=True, save_csv=True, save_crop=True, imgsz=[64]
    )
    assert cv2.imread(str(folder / "a.jpg")).shape == (48, 96, 3) == cv2.imread(str(folder / "b.PNG")).shape
    rows = numbers(folder / "labels/a.txt")
    assert rows.shape == (5, 6) and set(rows[:, 0]) <= {0, 1}
    assert (rows[:, 1:5] >= 0).all() and (rows[:, 1:5] <= 1).all()
    assert (np.diff(rows[:, 5]) >= 0).all(), "from the weakest to the strongest"
    with (folder / "predictions.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["Image Name", "Prediction", "Confidence"] and len(table) == 11
    assert {row[0] for row in table[1:]} == {"a.jpg", "b.PNG"} and {row[1] for row in table[1:]} <= {"cat", "hot dog"}
    assert [row[2] for row in table[1:6]] == [f"{value:.2f}" for value in rows[:, 5]]
    assert len(list((folder / "crops").rglob("*.jpg"))) == 10
    assert any(line.startswith(f"image 1/2 {tmp_path / 'in' / 'a.jpg'}: 32x64 ") for line in log)
    assert any(line.startswith("Speed: ") and line.endswith("at shape (1, 3, 32, 64)") for line in log)
    assert log[-2].startswith("2 labels saved to ") and log[-1].startswith("Results saved to ")


def test_label_files_are_whole_pixels_in_either_format(weights: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "a.jpg")
    centred = numbers(run(weights, image, tmp_path, save_txt=True, name="a") / "labels/a.txt")
    cornered = numbers(run(weights, image, tmp_path, save_txt=True, save_format=1, name="b") / "labels/a.txt")
    assert centred.shape == (5, 5) == cornered.shape
    low, high = cornered[:, 1:3], cornered[:, 3:5]
    np.testing.assert_allclose(centred[:, 1:], np.hstack(((low + high) / 2, high - low)), atol=1e-5)
    pixels = cornered[:, 1:] * (96, 48, 96, 48)
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-3)


def test_crops_are_numbered_and_keep_apart_what_has_one_name(weights: Path, tmp_path: Path) -> None:
    sources = [photo(tmp_path / folder / "a.jpg", seed) for seed, folder in enumerate(("one", "two"))]
    folder = run(weights, [str(path) for path in sources], tmp_path, save_crop=True, save_txt=True, classes=[0])
    assert sorted(path.name for path in folder.glob("*.jpg")) == ["a.jpg", "a2.jpg"]
    assert sorted(path.name for path in (folder / "labels").iterdir()) == ["a.txt", "a2.txt"]
    crops = {path.name for path in (folder / "crops/cat").iterdir()}
    assert len(crops) == 10 and {"a.jpg", "a2.jpg", "a3.jpg", "a4.jpg", "a5.jpg"} < crops


def test_a_video_becomes_an_mp4_and_one_label_file_per_frame(weights: Path, tmp_path: Path, log: list[str]) -> None:
    folder = run(weights, clip(tmp_path / "in.mp4", 4), tmp_path, save_txt=True, save_csv=True)
    written = cv2.VideoCapture(str(folder / "in.mp4"))
    assert (written.get(cv2.CAP_PROP_FRAME_COUNT), written.get(cv2.CAP_PROP_FPS)) == (4, 10)
    written.release()
    assert sorted(path.name for path in (folder / "labels").iterdir()) == [f"in_{k}.txt" for k in (1, 2, 3, 4)]
    assert any(line.startswith("video 1/1 (2/4) ") for line in log)


def test_vid_stride_looks_at_every_second_frame(weights: Path, tmp_path: Path) -> None:
    folder = run(weights, clip(tmp_path / "in.mp4", 5), tmp_path, save_txt=True, vid_stride=2)
    assert len(list((folder / "labels").iterdir())) == 2


def test_streams_of_one_name_are_written_apart(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cameras.streams").write_text(f"{clip(tmp_path / 'cam.mp4', 3)}\n" * 2)
    folder = run(weights, tmp_path / "cameras.streams", tmp_path, save_txt=True)
    assert sorted(path.name for path in folder.glob("*.mp4")) == ["cam.mp4", "cam_1.mp4"]
    assert {"cam_1.txt", "cam_1_1.txt"} <= {path.name for path in (folder / "labels").iterdir()}


def test_a_list_file_saves_pictures_too(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(str(photo(tmp_path / "in/a.jpg")))
    assert (run(weights, tmp_path / "list.txt", tmp_path) / "a.jpg").is_file()


def test_nosave_writes_labels_but_no_pictures(weights: Path, tmp_path: Path) -> None:
    folder = run(weights, photo(tmp_path / "a.jpg"), tmp_path, nosave=True, save_txt=True)
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] == ["labels/a.txt"]


def test_an_image_without_detections_says_so_and_is_saved(weights: Path, tmp_path: Path, log: list[str]) -> None:
    folder = run(weights, photo(tmp_path / "a.jpg"), tmp_path, conf_thres=0.9999, save_txt=True, save_csv=True)
    assert (folder / "a.jpg").is_file() and not list((folder / "labels").iterdir())
    assert any("32x64 (no detections), " in line for line in log)
    assert (folder / "predictions.csv").read_text().strip() == "Image Name,Prediction,Confidence"


def test_bad_files_are_skipped_counted_and_named(weights: Path, tmp_path: Path, log: list[str]) -> None:
    photo(tmp_path / "in/a.jpg")
    (tmp_path / "in/b.jpg").write_bytes(b"")
    photo(tmp_path / "in/c.jpg")
    folder = run(weights, tmp_path / "in", tmp_path)
    assert sorted(path.name for path in folder.glob("*.jpg")) == ["a.jpg", "c.jpg"]
    summary = next(i for i, line in enumerate(log) if line.startswith("1 of 3 files could not be read"))
    assert "b.jpg" in log[summary + 1]


@pytest.mark.slow
def test_hidden_labels_leave_the_boxes(weights: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "a.png", shape_hw=(200, 320))
    pictures = []
    for name, options in (("full", {}), ("name", {"hide_conf": True}), ("bare", {"hide_labels": True})):
        folder = run(weights, image, tmp_path, name=name, **options)
        pictures.append(cv2.imread(str(folder / "a.png")).tobytes())
    assert len({*pictures, cv2.imread(str(image)).tobytes()}) == 4


@pytest.mark.slow
def test_visualize_writes_the_maps_of_every_layer_but_the_head(weights: Path, tmp_path: Path) -> None:
    folder = run(weights, photo(tmp_path / "a.jpg", shape_hw=(64, 64)), tmp_path, visualize=True) / "a"
    assert len(list(folder.glob("stage*_features.png"))) == len(list(folder.glob("*.npy"))) == 24
    assert np.load(folder / "stage0_Conv_features.npy").shape == (16, 32, 32)
    assert not list(folder.glob("*Detect*"))


# ------------------------------------------------------------------------------------------------------------- networks


def test_two_copies_of_a_network_agree_with_one(weights: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "a.jpg")
    one = numbers(run(weights, image, tmp_path, name="one", save_txt=True, save_conf=True) / "labels/a.txt")
    detect.run(
        weights=[str(weights), str(weights)], source=str(image), imgsz=64, device="cpu", conf_thres=0.001, max_det=5,
        project=str(tmp_path / "runs"), name="two", save_txt=True, save_conf=True,
    )  # fmt: skip
    np.testing.assert_allclose(numbers(tmp_path / "runs/two/labels/a.txt"), one, atol=1e-4)


@pytest.mark.slow
def test_augment_looks_more_than_once(weights: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "a.jpg", shape_hw=(128, 128))
    plain = numbers(run(weights, image, tmp_path, name="plain", save_txt=True, imgsz=128) / "labels/a.txt")
    more = numbers(run(weights, image, tmp_path, name="more", save_txt=True, imgsz=128, augment=True) / "labels/a.txt")
    assert not np.array_equal(plain, more)


def test_keywords_are_converted_as_on_the_command_line(weights: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "a.jpg")
    given = dict(save_txt=True, save_conf=True)
    wanted = numbers(run(weights, image, tmp_path, name="one", classes=[0], imgsz=[64], **given) / "labels/a.txt")
    words = dict(classes=0, conf_thres="0.001", imgsz="64", max_det="5", line_thickness="3", save_format="0")
    detect.run(
        weights=weights, source=image, device=torch.device("cpu"), project=tmp_path / "runs", name=2, **words, **given
    )
    np.testing.assert_array_equal(numbers(tmp_path / "runs/2/labels/a.txt"), wanted)
    assert set(wanted[:, 0]) == {0}


def test_update_strips_our_own_file_in_place(weights: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.pt"
    own.write_bytes(weights.read_bytes())
    run(own, photo(tmp_path / "a.jpg"), tmp_path, update=True)
    assert own.stat().st_size < 0.6 * weights.stat().st_size
    run(own, tmp_path / "a.jpg", tmp_path, name="again")
    assert (tmp_path / "runs/again/a.jpg").is_file()


def test_run_folders_count_up_unless_told_otherwise(weights: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "a.jpg")
    for _ in range(2):
        run(weights, image, tmp_path)
    run(weights, image, tmp_path, exist_ok=True, save_txt=True)
    run(weights, image, tmp_path, exist_ok=True, save_txt=True)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["exp", "exp2"]
    assert len(numbers(tmp_path / "runs/exp/labels/a.txt")) == 5, "a second run replaces, it does not append"


# -------------------------------------------------------------------------------------------------- names and extremes


def test_results_of_the_longest_names_are_written_under_shorter_ones(weights: Path, tmp_path: Path) -> None:
    folder, stem = tmp_path / "in", "\u00e4" * 125
    photo(folder / f"{stem}a.jpg")
    photo(folder / f"{stem}b.jpg", seed=1)
    clip(folder / f"{'v' * 251}.avi", frames=2)
    options = {"save_txt": True, "save_crop": True, "save_csv": True}
    run(weights, folder, tmp_path, **options)
    saved = tmp_path / "runs/exp"
    pictures = sorted(path.name for path in saved.glob("*.*") if path.suffix != ".csv")
    assert pictures == ["v" * 200 + ".mp4", "\u00e4" * 100 + ".jpg", "\u00e4" * 100 + "2.jpg"]
    labels = sorted(path.name for path in (saved / "labels").iterdir())
    assert labels[:2] == ["v" * 200 + "_1.txt", "v" * 200 + "_2.txt"] and len(labels) == 4
    assert len(list(saved.glob("crops/*/*.jpg"))) == 20
    rows = list(csv.reader((saved / "predictions.csv").open(encoding="utf-8")))
    assert {row[0] for row in rows[1:3]} <= {f"{stem}a.jpg", f"{stem}b.jpg"}, "the table names the files as they are"


@pytest.mark.parametrize("name", ["n" * 300, "a/b\0c\n", "..", "\u732b" * 200])
def test_class_names_become_folders_of_crops_whatever_they_hold(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=1)
    with torch.no_grad():
        for head in model.head.m:
            head.bias.view(3, -1)[:, 4] = 0.5
    content = {"model": model.state_dict(), "yaml": model.yaml, "names": {0: name}, "stride": model.stride, "epoch": 0}
    file = checkpoint.save(tmp_path / "odd.pt", content)
    run(file, photo(tmp_path / "a.jpg"), tmp_path, save_crop=True)
    crops = list((tmp_path / "runs/exp/crops").rglob("*.jpg"))
    assert crops and all(crop.parent.parent == tmp_path / "runs/exp/crops" for crop in crops)


@pytest.mark.parametrize("thickness", [1, 1000])
def test_the_widest_lines_and_the_thinnest_are_drawn(thickness: int, weights: Path, tmp_path: Path) -> None:
    run(weights, photo(tmp_path / "a.jpg"), tmp_path, line_thickness=thickness)
    image = cv2.imread(str(tmp_path / "runs/exp/a.jpg"))
    assert image is not None and image.shape == (48, 96, 3)


def test_a_file_above_max_megapixels_is_skipped_and_a_higher_bound_reads_it(
    weights: Path, tmp_path: Path, log: list[str]
) -> None:
    photo(tmp_path / "in/a.jpg")
    photo(tmp_path / "in/b.png", shape_hw=(800, 1300))
    run(weights, tmp_path / "in", tmp_path, max_megapixels=1)
    assert any("b.png: 1300 x 800 pixels are 1.0 megapixels" in line for line in log)
    assert [path.name for path in (tmp_path / "runs/exp").iterdir()] == ["a.jpg"]
    run(weights, tmp_path / "in", tmp_path, max_megapixels=2)
    assert sorted(path.name for path in (tmp_path / "runs/exp2").iterdir()) == ["a.jpg", "b.png"]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dnn": True}, "--dnn"),
        ({"conf_thres": 1.5}, "--conf-thres 1.5: expected 0 to 1"),
        ({"iou_thres": -1}, "--iou-thres"),
        ({"max_det": 0}, "--max-det"),
        ({"classes": [0, 7]}, "--classes 7: .* has classes 0 to 1"),
        ({"imgsz": [64, 64, 64]}, "--imgsz"),
        ({"imgsz": 0}, "--imgsz"),
        ({"imgsz": [64, 100_000_000]}, "--imgsz 100000000: expected at most 16384"),
        ({"line_thickness": 100_000}, "--line-thickness 100000: expected 1 to 1000"),
        ({"max_megapixels": 0}, "--max-megapixels 0: expected 1 or more"),
        ({"source": "a" * 300}, "no such file"),
        ({"source": "http://[::1"}, "not an address"),
        ({"source": "a\0b"}, "no such file"),
        ({"source": "nowhere.jpg"}, "no such file"),
        ({"weights": "net.onnx"}, r"net\.onnx: no such file"),
        ({"visualize": True, "augment": True}, "--visualize"),
        ({"clases": [1]}, "clases.*Did you mean 'classes'"),
        ({"device": "cuda:77"}, "--device"),
    ],
)
def test_mistakes_are_named(weights: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    settings = {"weights": str(weights), "source": str(photo(tmp_path / "a.jpg")), "project": str(tmp_path / "runs")}
    with pytest.raises(UserError, match=message):
        detect.run(**{"device": "cpu", "imgsz": 64, **settings, **options})


def test_view_img_without_a_window_is_refused(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if sys.platform in ("win32", "darwin"):
        pytest.skip("there is always a screen")
    with pytest.raises(UserError, match=r"--view-img.*--nosave"):
        run(weights, photo(tmp_path / "a.jpg"), tmp_path, view_img=True)


def test_an_image_size_off_the_stride_is_raised_with_a_warning(weights: Path, tmp_path: Path, log: list[str]) -> None:
    run(weights, photo(tmp_path / "a.jpg"), tmp_path, imgsz=[50, 90])
    assert any("--imgsz 50 " in line and "using 64" in line for line in log)
    assert any("--imgsz 90 " in line and "using 96" in line for line in log)


def test_foreign_weights_are_never_rewritten(weights_dir: Path, tmp_path: Path) -> None:
    official = tmp_path / "yolov5n.pt"
    official.write_bytes((weights_dir / "yolov5n.pt").read_bytes())
    with pytest.raises(UserError, match="--update"):
        run(official, photo(tmp_path / "a.jpg"), tmp_path, update=True)
    assert official.read_bytes() == (weights_dir / "yolov5n.pt").read_bytes()


def test_help_needs_no_torch_and_a_typing_mistake_exits_with_2() -> None:
    code = "import sys, detect; detect.build_parser().format_help(); assert not {'torch', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
    wrong = subprocess.run(
        [sys.executable, "detect.py", "--clases", "1"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "Did you mean '--classes'" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    missing = subprocess.run(
        [sys.executable, "detect.py", "--source", "nowhere.jpg"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert missing.returncode == 2 and missing.stderr.startswith("error: nowhere.jpg: ")


def test_upstreams_abbreviations_are_understood() -> None:
    options = detect.build_parser().parse_args(
        ["--img", "320", "--conf", "0.4", "--iou", "0.5", "--weight", "a.pt", "b.pt"]
    )
    assert (options.imgsz, options.conf_thres, options.iou_thres, options.weights) == (
        [320],
        0.4,
        0.5,
        ["a.pt", "b.pt"],
    )


# ------------------------------------------------------------------------------------------------------------ real data

DOG = "000000000074"
KNOWN = {  # what is plainly there: COCO's own labels of these photos
    "000000000025": {"giraffe"},
    "000000000036": {"person"},
    DOG: {"bicycle", "dog", "person"},
    "000000000086": {"person", "motorcycle"},
}


@pytest.mark.slow
def test_real_weights_find_the_known_objects_in_photos_and_in_a_video(
    weights_dir: Path, datasets_dir: Path, tmp_path: Path
) -> None:
    sources = [datasets_dir / f"coco128/images/train2017/{stem}.jpg" for stem in KNOWN]
    shared = dict(
        imgsz=640, conf_thres=0.25, max_det=1000, save_txt=True, save_conf=True, save_crop=True, save_csv=True
    )
    folder = run(weights_dir / "yolov5n.pt", [str(path) for path in sources], tmp_path, name="photos", **shared)
    with (folder / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for stem, names in KNOWN.items():
        found = {row["Prediction"] for row in table if row["Image Name"] == f"{stem}.jpg"}
        assert names <= found, f"{stem}: found {found}"
        assert all((folder / "crops" / name / f"{stem}.jpg").is_file() for name in names)
        assert (numbers(folder / f"labels/{stem}.txt")[:, 5] > 0.25).all()
    dog, truth = (
        torch.tensor(rows[rows[:, 0] == 16][:1, 1:5])
        for rows in (
            numbers(folder / f"labels/{DOG}.txt"),
            numbers(datasets_dir / f"coco128/labels/train2017/{DOG}.txt"),
        )
    )
    assert paired_iou(dog, truth, "iou").item() > 0.8

    frames = [cv2.resize(cv2.imread(str(path)), (640, 480)) for path in sources[:2] for _ in range(2)]
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (640, 480))
    for frame in frames:
        writer.write(frame)
    writer.release()
    folder = run(weights_dir / "yolov5n.pt", tmp_path / "clip.mp4", tmp_path, name="video", **shared)
    assert 23 in numbers(folder / "labels/clip_1.txt")[:, 0] and 0 in numbers(folder / "labels/clip_3.txt")[:, 0]
    assert cv2.VideoCapture(str(folder / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 4
