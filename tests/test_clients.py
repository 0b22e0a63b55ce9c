"""Programs written for YOLOv5 run unchanged with this repository on their path.

`tests/clients/` holds five, written as such programs are: imports, calls and habits of v6.0 to v7.0.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models.checkpoints.files import load_model

REPOSITORY = Path(__file__).resolve().parent.parent
CLIENTS = REPOSITORY / "tests" / "clients"
SHAPES = REPOSITORY / "yolov5n-shapes.pt"
PICTURES = REPOSITORY / "data" / "images"


@pytest.fixture(params=["shapes", "official"])
def case(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Weights and an image on which they find something: the repository's own, and the official file on a photo."""
    if request.param == "shapes":
        return SHAPES, PICTURES / "shapes1.jpg"
    weights = request.getfixturevalue("weights_dir") / "yolov5n.pt"
    return weights, request.getfixturevalue("datasets_dir") / "coco128" / "images" / "train2017" / "000000000009.jpg"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}


def run(folder: Path, script: str, *arguments: object) -> str:
    """What a client prints; it works in a folder of its own."""
    command = [sys.executable, str(CLIENTS / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


def detected(weights: Path, image: Path) -> torch.Tensor:
    """Our own detections (k, 6) on an image, in pixels of the file, made without any face."""
    from utils.inference import DetectOptions, Detector, fit, restore

    fitted, boxes = fit([cv2.imread(str(image))], (640, 640), 32, auto=True)
    with torch.no_grad():
        found = Detector(load_model(weights), DetectOptions(max_det=300))(fitted).detections
    return restore(found, boxes)[0]


@pytest.mark.slow
def test_a_label_tool_writes_what_is_detected_here(case: tuple[Path, Path], tmp_path: Path) -> None:
    weights, image = case
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / image.name).write_bytes(image.read_bytes())
    said = run(tmp_path, "label_tool.py", weights, "images", "labels")
    found = detected(weights, image)
    assert len(found) and f"by hand: {len(found)}\n" in said
    lines = (tmp_path / "labels" / f"{image.stem}.txt").read_text().splitlines()
    height, width = cv2.imread(str(image)).shape[:2]
    rows = np.array([[float(word) for word in line.split()] for line in lines])[::-1]
    assert rows[:, 0].tolist() == found[:, 5].tolist()
    corners = np.concatenate((rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2), 1)
    np.testing.assert_allclose(corners * [width, height, width, height], found[:, :4].round(), atol=0.01)
    drawn = cv2.imread(str(tmp_path / "labels" / f"{image.stem}_drawn.png"))
    assert (drawn != cv2.imread(str(image))).any()  # the boxes were drawn into the loader's own image


@pytest.mark.slow
def test_grad_cam_looks_at_the_object(case: tuple[Path, Path], tmp_path: Path) -> None:
    weights, image = case
    layer = 17 if weights == SHAPES else -2  # the map from which each finds its best detection
    facts = json.loads(run(tmp_path, "gradcam.py", weights, image, layer, "heat.png").splitlines()[-1])
    found = detected(weights, image)
    assert facts["boxes"] == len(found) and 0.25 < facts["score"] <= 1
    assert facts["names"] == [load_model(weights).names[int(c)] for c in found[:, 5]]
    assert facts["inside"] > facts["all"] > 0  # gradients arrived, and point at the object
    assert cv2.imread(str(tmp_path / "heat.png")).std() > 1


@pytest.mark.slow
def test_an_export_script_traces_what_the_network_computes(case: tuple[Path, Path], tmp_path: Path) -> None:
    weights, image = case
    run(tmp_path, "export_script.py", weights, "net", 320)
    network = load_model(weights)
    images = torch.from_numpy(cv2.resize(cv2.imread(str(image)), (320, 320))).permute(2, 0, 1)[None].float() / 255
    extra = {"config.txt": ""}
    script = torch.jit.load(str(tmp_path / "net.torchscript"), _extra_files=extra)
    with torch.no_grad():
        expected = network(images)[0]
        torch.testing.assert_close(script(images)[0], expected, rtol=1e-4, atol=1e-3)
    about = json.loads(extra["config.txt"])
    assert about["stride"] == 32 and list(about["names"].values()) == list(network.names.values())
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {"images": images.numpy()})[:1]
        np.testing.assert_allclose(output, expected.numpy(), rtol=1e-3, atol=1e-2)


@pytest.fixture
def video(case: tuple[Path, Path], tmp_path: Path) -> Path:
    """Five frames of the case's image, each moved a little to the right."""
    image = cv2.imread(str(case[1]))
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    file = tmp_path / "walk.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (width, height))
    for step in range(5):
        writer.write(np.ascontiguousarray(np.roll(image[:height, :width], 4 * step, 1)))
    writer.release()
    return file


@pytest.mark.slow
def test_a_tracker_follows_the_same_objects_through_all_frames(
    case: tuple[Path, Path], video: Path, tmp_path: Path
) -> None:
    weights = case[0]
    said = run(tmp_path, "tracker.py", "--weights", weights, "--source", video, "--project", tmp_path / "runs")
    assert "video 1/1 (5/5)" in said and "Speed: " in said
    rows = [line.split() for line in (tmp_path / "runs/exp/tracks/walk.txt").read_text().splitlines()]
    frames = {row[0] for row in rows}
    assert frames == set("12345")
    firsts = {row[1] for row in rows if row[0] == "1"}
    lasts = {row[1] for row in rows if row[0] == "5"}
    assert firsts & lasts  # objects keep their number
    out = cv2.VideoCapture(str(tmp_path / "runs/exp/walk.mp4"))
    assert out.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and out.get(cv2.CAP_PROP_FPS) == 5
    crops = list((tmp_path / "runs/exp/crops").rglob("*.jpg"))
    assert len(crops) == len([row for row in rows if row[0] == "1"])


@pytest.fixture
def server(case: tuple[Path, Path], tmp_path: Path) -> Iterator[int]:
    """The port on which the server client answers."""
    pytest.importorskip("pandas", reason="pandas() of results needs it")
    command = [sys.executable, str(CLIENTS / "server.py"), str(REPOSITORY), str(case[0])]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ports = (re.fullmatch(r"port (\d+)\n", line) for line in process.stdout)
        yield int(next(port for port in ports if port)[1])
        process.terminate()


@pytest.mark.slow
def test_a_server_answers_with_detections_as_json(case: tuple[Path, Path], server: int) -> None:
    weights, image = case
    request = urllib.request.Request(f"http://127.0.0.1:{server}/v1/object-detection", image.read_bytes())
    with urllib.request.urlopen(request, timeout=60) as answer:
        records = json.loads(answer.read())
    assert records and set(records[0]) == {"xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"}
    names = load_model(weights).names
    assert all(record["confidence"] > 0.4 and names[record["class"]] == record["name"] for record in records)
