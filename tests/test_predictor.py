"""What `torch.hub` returns: any image in, detections out, the same as detect.py's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detect
import hubconf
from models.base import Output
from models.predictor import AutoShape, Detections
from models.yolo import DetectionModel
from utils.config import ROOT, UserError
from utils.images import read_image

WEIGHTS = ROOT / "yolov5n-shapes.pt"
PICTURES = sorted((ROOT / "data/images").glob("*.jpg"))[:3]


@pytest.fixture(scope="module")
def model() -> AutoShape:
    return hubconf.custom(WEIGHTS, _verbose=False, device="cpu")  # type: ignore[return-value]


def rgb(path: Path) -> np.ndarray:
    return np.ascontiguousarray(read_image(path)[..., ::-1])


def test_every_kind_of_image_gives_the_same_boxes(model: AutoShape) -> None:
    path = PICTURES[0]
    array = rgb(path)
    kinds: dict[str, Any] = {
        "text": str(path),
        "array": array,
        "channels first": array.transpose(2, 0, 1),
        "alpha": np.dstack((array, np.full(array.shape[:2], 7, np.uint8))),
        "floats of 0..255": array.astype(np.float32),
        "PIL": Image.fromarray(array),
        "list": [array],
        "batch": array[None],
        "tensor in a list": [torch.from_numpy(array).permute(2, 0, 1) / 255],
    }
    wanted = model(path, size=320)
    assert len(wanted.xyxy[0]) > 1 and torch.equal(wanted.pred[0], wanted.xyxy[0])
    for kind, image in kinds.items():
        assert torch.equal(model(image, size=320).xyxy[0], wanted.xyxy[0]), kind


def test_a_grey_image_is_seen_in_three_equal_channels(model: AutoShape) -> None:
    grey = cv2.cvtColor(read_image(PICTURES[0]), cv2.COLOR_BGR2GRAY)
    wanted = model(np.dstack([grey] * 3), size=320).xyxy[0]
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        assert torch.equal(model(image, size=320).xyxy[0], wanted)


def test_a_pil_image_is_turned_as_its_exif_says(model: AutoShape, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.open(PICTURES[0]).resize((320, 160)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as picture:
        assert model(picture, size=320).ims[0].shape == (320, 160, 3)
    assert model(tmp_path / "turned.png", size=320).ims[0].shape == (320, 160, 3)


def test_a_list_of_mixed_images_gives_what_detect_py_writes(
    model: AutoShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (path, shape) in enumerate(
        zip(PICTURES * 2, [(320, 320), (200, 320), (320, 210), (97, 131), (200, 320)])
    ):
        cv2.imwrite(str(tmp_path / f"{number}.png"), cv2.resize(read_image(path), shape))
    files = sorted(tmp_path.glob("*.png"))
    written: dict[str, np.ndarray] = {}
    real = detect._Results.add

    def add(self: Any, frame: Any, detections: np.ndarray) -> bool:
        written[Path(frame.path).name] = detections.copy()
        return real(self, frame, detections)

    monkeypatch.setattr(detect._Results, "add", add)
    detect.run(weights=WEIGHTS, source=tmp_path, imgsz=320, project=tmp_path / "runs", device="cpu", nosave=True)
    results = model(files, size=320)
    assert sum(map(len, results.xyxy)) > 3
    for file, rows in zip(files, results.xyxy, strict=True):
        rows = rows.clone()
        rows[:, :4] = rows[:, :4].round()
        assert np.array_equal(written[file.name], rows.numpy())  # to the last bit


def test_a_tensor_goes_to_the_network_as_it_is(model: AutoShape) -> None:
    images = torch.rand(2, 3, 64, 96)
    output = model(images)
    assert isinstance(output, Output) and output[0].shape == (2, 3 * (96 + 24 + 6), 5 + 6)


def test_the_attributes_decide_what_is_kept(model: AutoShape) -> None:
    everything = model(PICTURES[0], size=320).xyxy[0]
    try:
        model.conf = float(everything[0, 4]) - 1e-6
        assert len(model(PICTURES[0], size=320).xyxy[0]) == 1
        model.conf, model.classes = 0.25, [int(everything[0, 5])]
        assert set(model(PICTURES[0], size=320).xyxy[0][:, 5].tolist()) == {float(everything[0, 5])}
        model.classes, model.max_det = None, 2
        assert len(model(PICTURES[0], size=320).xyxy[0]) == 2
        model.max_det, model.conf, model.multi_label = 1000, 0.01, True
        several = model(PICTURES[0], size=320).xyxy[0]
        model.multi_label = False
        assert len(several) > len(model(PICTURES[0], size=320).xyxy[0])
    finally:
        for name in ("conf", "classes", "max_det", "multi_label"):
            model.__dict__.pop(name, None)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg"),
        ([], "no image in the list"),
        (np.zeros((0, 5, 3), np.uint8), r"an array \(0, 5, 3\)"),
        (np.full((8, 8, 3), 0.5), r"numbers of 0\.\.1; expected 0\.\.255"),
        (3, "a int; expected a path"),
        ("http://127.0.0.1:9/a.jpg", "not fetched"),
    ],
)
def test_what_is_no_image_is_named(model: AutoShape, image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(image)


def test_an_image_by_its_address_is_read_and_not_kept(
    model: AutoShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handler = partial(SimpleHTTPRequestHandler, directory=str(PICTURES[0].parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        results = model(f"http://127.0.0.1:{server.server_port}/{PICTURES[0].name}?size=1", size=320)
    finally:
        server.shutdown()
        server.server_close()
    assert torch.equal(results.xyxy[0], model(PICTURES[0], size=320).xyxy[0])
    assert results.files == [f"{PICTURES[0].stem}.jpg"] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- results


@pytest.fixture
def results(model: AutoShape) -> Detections:
    return model([PICTURES[0], rgb(PICTURES[1])], size=320)


def test_boxes_have_four_formats(results: Detections) -> None:
    for image, xyxy, xywh, xyxyn, xywhn in zip(
        results.ims, results.xyxy, results.xywh, results.xyxyn, results.xywhn, strict=True
    ):
        height, width = image.shape[:2]
        size = torch.tensor([width, height, width, height])
        torch.testing.assert_close(xyxyn[:, :4] * size, xyxy[:, :4])
        torch.testing.assert_close(xywhn[:, :4] * size, xywh[:, :4])
        torch.testing.assert_close(xywh[:, 2:4], xyxy[:, 2:4] - xyxy[:, :2])
        assert torch.equal(xyxy[:, 4:], xywhn[:, 4:])
    assert results.n == len(results) == 2 and len(results.t) == 3 and results.s == (2, 3, 320, 320)
    assert results.files == [f"{PICTURES[0].stem}.jpg", "image1.jpg"]


def test_the_text_counts_the_objects_of_every_image(results: Detections) -> None:
    lines = str(results).splitlines()
    assert lines[0].startswith("image 1/2: 320x320 ") and lines[1].startswith("image 2/2: ")
    assert lines[2].startswith("Speed: ") and lines[2].endswith("at shape (2, 3, 320, 320)")
    assert repr(results).startswith("YOLOv5 <class 'models.predictor.Detections'> instance\n")
    nothing = Detections([np.zeros((4, 6, 3), np.uint8)], [torch.zeros(0, 6)], ["a.jpg"], names={0: "x"})
    assert str(nothing).startswith("image 1/1: 4x6 (no detections)")


def test_render_draws_on_the_images_and_save_writes_them(results: Detections, tmp_path: Path) -> None:
    before = [image.copy() for image in results.ims]
    folder = results.save(save_dir=tmp_path / "exp")
    assert [file.name for file in sorted(folder.iterdir())] == sorted(results.files)
    assert results.save(save_dir=tmp_path / "exp").name == "exp2"
    drawn = results.render()
    assert drawn is results.ims
    for old, new, file in zip(before, drawn, results.files, strict=True):
        assert old.shape == new.shape and not np.array_equal(old, new)
        assert np.abs(rgb(folder / file).astype(int) - new).mean() < 8  # red and blue are in their places


def test_crops_are_parts_of_the_image_with_their_classes(results: Detections, tmp_path: Path) -> None:
    crops = results.crop(save_dir=tmp_path / "exp")
    assert len(crops) == sum(map(len, results.xyxy))
    strongest = crops[len(results.xyxy[0]) - 1]  # the weakest come first
    assert strongest["box"] == results.xyxy[0][0, :4].tolist() and strongest["conf"] == float(results.xyxy[0][0, 4])
    name = results.names[int(strongest["cls"])]
    assert strongest["label"] == f"{name} {strongest['conf']:.2f}"
    files = list((tmp_path / "exp/crops").rglob("*.jpg"))
    assert len(files) == len(crops)
    assert results.crop(save=False)[0]["im"].shape == crops[0]["im"].shape
    assert any(
        np.abs(read_image(file).astype(int) - strongest["im"]).mean() < 4
        for file in (tmp_path / "exp/crops" / name).iterdir()
        if read_image(file).shape == strongest["im"].shape
    )


def test_pandas_gives_a_table_per_image(results: Detections) -> None:
    pandas = pytest.importorskip("pandas")
    table = results.pandas().xyxy[0]
    assert list(table.columns) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert list(results.pandas().xywhn[1].columns)[:4] == ["xcenter", "ycenter", "width", "height"]
    assert isinstance(table, pandas.DataFrame) and len(table) == len(results.xyxy[0])
    assert table["class"].dtype.kind == "i" and table["name"][0] == results.names[table["class"][0]]
    assert table.to_json(orient="records").startswith('[{"xmin":')
    assert torch.is_tensor(results.xyxy[0])  # the original keeps its tensors


def test_without_pandas_the_package_is_named(results: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        results.pandas()


def test_results_can_be_taken_apart(results: Detections) -> None:
    first, second = results.tolist()
    assert len(first) == 1 and torch.equal(first.xyxy[0], results.xyxy[0])
    assert torch.equal(results[1].xyxy[0], second.xyxy[0]) and results[-1].files == ["image1.jpg"]
    assert [len(part) for part in results] == [1, 1] and len(results[:2]) == 2
    with pytest.raises(IndexError):
        results[2]
    assert isinstance(results.numpy().xyxy[0], np.ndarray)


# ------------------------------------------------------------------------------------------------------------- the hub


def test_official_names_build_networks_of_other_classes_and_channels() -> None:
    model = hubconf.yolov5n(pretrained=False, channels=1, classes=4, _verbose=False, device="cpu")
    assert isinstance(model, DetectionModel) and len(model.names) == 4 and model.yaml["ch"] == 1
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_official_network_with_other_classes_keeps_its_weights(weights_dir: Path) -> None:
    model = hubconf.yolov5n(classes=4, _verbose=False, device="cpu")
    same = hubconf.custom(weights_dir / "yolov5n.pt", autoshape=False, _verbose=False, device="cpu")
    assert isinstance(same, DetectionModel) and torch.equal(model.model[0].conv.weight, same.model[0].conv.weight)
    assert model.model[-1].nc == 4


HUB = """
import sys
import numpy as np
import torch
model = torch.hub.load(sys.argv[1], 'custom', sys.argv[2], source='local', _verbose=False, device='cpu')
model.conf = 0.3
results = model([sys.argv[3], np.zeros((64, 96, 3), np.uint8)], size=320)
results.print(); results.save(); results.crop()
assert len(results.pandas().xyxy[0]) == len(results.xyxy[0]) > 1
assert type(model).__name__ == 'AutoShape' and model.names[0] == 'disc' and model.stride == 32
assert len(model.model.model.model) == 25
"""


@pytest.mark.slow
def test_torch_hub_loads_from_another_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "hub"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", HUB, str(ROOT), str(WEIGHTS), str(PICTURES[0])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("image 1/2: 320x320 ") and "image 2/2: 64x96 (no detections)" in done.stdout
    assert len(list((tmp_path / "runs/detect/exp").glob("*.jpg"))) == 2
    assert (tmp_path / "runs/detect/exp2/crops").is_dir()
