"""mAP by object size, beside pycocotools on the same boxes."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest

from experiments.sizes import AREAS, in_areas, map_by_size

SMALL, MEDIUM, LARGE = (10, 10, 30, 30), (50, 50, 110, 110), (120, 20, 320, 220)  # 400, 3600 and 40,000 pixels
PERFECT = pytest.approx(1.0)

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def on_one_image(detections: list[tuple[float, ...]], truth: list[tuple[float, ...]]) -> dict[str, float]:
    found, labels = np.array(detections, float).reshape(-1, 6), np.array(truth, float).reshape(-1, 5)
    return map_by_size(found, np.zeros(len(found), int), labels, np.zeros(len(labels), int))


def scene(seed: int, *, images: int, labels: int, found: int, classes: int, side: float, noise: float) -> Arrays:
    """Random labels of all sizes, detections near them and elsewhere, and some labels of exactly 32 and 96 pixels."""
    rng = np.random.default_rng(seed)
    truth_image = rng.integers(0, images, labels)
    size = np.exp(rng.uniform(np.log(8), np.log(200), (labels, 2)))
    size[: labels // 8], size[labels // 8 : labels // 4] = 32, 96
    corner = rng.uniform(0, side, (labels, 2)).round()
    truth = np.column_stack((rng.integers(0, classes, labels), corner, corner + size)).astype(np.float32)
    near = rng.integers(0, labels, found)
    boxes = truth[near, 1:] + rng.normal(0, noise, (found, 4)) * rng.integers(0, 2, (found, 1))
    stray = rng.random(found) < 0.2
    boxes[stray, :2] = rng.uniform(0, side, (stray.sum(), 2))
    boxes[stray, 2:] = boxes[stray, :2] + np.exp(rng.uniform(np.log(8), np.log(200), (stray.sum(), 2)))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    confidence = rng.uniform(0.01, 1, found).round(2)  # equal ones among them
    detections = np.column_stack((boxes, confidence, truth[near, 0])).astype(np.float32)
    return detections, truth_image[near], truth, truth_image


def by_pycocotools(
    detections: np.ndarray, image: np.ndarray, truth: np.ndarray, truth_image: np.ndarray
) -> list[float]:
    """The mAP of COCO's evaluation for all, small, medium and large objects; -1 without labels."""
    pytest.importorskip("pycocotools", reason="pycocotools is an optional extra")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def record(number: int, place: int, class_index: float, xyxy: np.ndarray) -> dict[str, object]:
        x1, y1, x2, y2 = xyxy.astype(float).tolist()
        box = [x1, y1, x2 - x1, y2 - y1]
        where = {"id": number, "image_id": int(place) + 1, "category_id": int(class_index) + 1}
        return {**where, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(int(max(image.max(), truth_image.max())) + 1)],
            "categories": [{"id": i + 1} for i in range(int(truth[:, 0].max()) + 1)],
            "annotations": [record(i + 1, truth_image[i], row[0], row[1:]) for i, row in enumerate(truth)],
        }
        coco.createIndex()
        found = [
            {**record(i + 1, image[i], row[5], row[:4]), "score": float(row[4])} for i, row in enumerate(detections)
        ]
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(evaluation.stats[place]) for place in (0, 3, 4, 5)]


@pytest.mark.parametrize(
    "how",
    [
        dict(images=6, labels=120, found=300, classes=3, side=400.0, noise=4.0),
        dict(images=2, labels=80, found=250, classes=2, side=120.0, noise=8.0),
        dict(images=1, labels=60, found=700, classes=2, side=900.0, noise=3.0),
        dict(images=5, labels=40, found=12, classes=8, side=400.0, noise=2.0),
    ],
    ids=["usual", "crowded", "more than 100 of a class in an image", "few found"],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_size_scores_as_with_pycocotools(seed: int, how: dict[str, float]) -> None:
    arrays = scene(seed, **how)  # type: ignore[arg-type]
    ours = list(map_by_size(*arrays).values())
    assert ours == pytest.approx(by_pycocotools(*arrays), abs=1e-12)
    assert max(ours) > 0.05, "there is something to compare"


def test_a_lucky_hit_of_ten_labels_is_worth_a_tenth() -> None:
    """What made medium objects look found by a network that finds nothing: YOLOv5's curve gives this hit 0.55."""
    labels = [(0, 200 * k, 0, 200 * k + 60, 60) for k in range(10)]
    scores = on_one_image([(0, 0, 60, 60, 0.9, 0)], labels)
    assert scores["medium"] == scores["all"] == pytest.approx(11 / 101)


def test_perfect_small_and_missed_large_objects_are_told_apart() -> None:
    scores = on_one_image([(*SMALL, 0.9, 0)], [(0, *SMALL), (0, *LARGE)])
    assert scores["small"] == PERFECT and scores["large"] == 0 and math.isnan(scores["medium"])
    assert scores["all"] == pytest.approx(51 / 101)


def test_found_objects_of_another_size_are_no_false_alarms() -> None:
    detections = [(*LARGE, 0.99, 0), (*MEDIUM, 0.95, 0), (*SMALL, 0.5, 0)]
    assert list(on_one_image(detections, [(0, *SMALL), (0, *MEDIUM), (0, *LARGE)]).values()) == [PERFECT] * 4


def test_a_false_alarm_counts_for_its_own_size_only() -> None:
    alarm = (400, 400, 410, 410)
    scores = on_one_image([(*alarm, 0.99, 0), (*SMALL, 0.5, 0), (*MEDIUM, 0.4, 0)], [(0, *SMALL), (0, *MEDIUM)])
    assert scores["medium"] == PERFECT and scores["small"] == pytest.approx(0.5)


def test_a_detection_matched_to_a_label_of_another_size_belongs_to_that_label() -> None:
    label, found = (0, 0, 33, 33), (0, 0, 31, 31)  # 1089 and 961 pixels, IoU 0.88: medium label, small detection
    scores = on_one_image([(*found, 0.9, 0), (*SMALL, 0.5, 1)], [(0, *label), (1, *SMALL)])
    assert scores["medium"] == pytest.approx(0.8)  # right at the eight thresholds up to 0.85
    assert scores["small"] == PERFECT  # its false alarms, at 0.9 and 0.95, are of a class without small labels


def test_edges_of_a_size_belong_to_both_sides() -> None:
    boxes = np.array([(0, 0, 32, 32), (0, 0, 96, 96), (0, 0, 31, 32), (0, 0, 97, 96)])
    assert dict(zip(AREAS, in_areas(boxes).tolist())) == {
        "all": [True, True, True, True],
        "small": [True, False, True, False],
        "medium": [True, True, False, False],
        "large": [False, True, False, True],
    }


def test_no_detections_and_no_labels_are_zero_and_nothing() -> None:
    assert on_one_image([], [(0, *SMALL)])["small"] == 0
    assert all(math.isnan(value) for value in on_one_image([(*SMALL, 0.9, 0)], []).values())
