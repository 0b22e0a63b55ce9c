"""Matching, average precision and the confusion matrix, beside slow literal versions of the rules and pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.boxes import box_iou
from utils.metrics import IOU_THRESHOLDS, APResult, AveragePrecision, ConfusionMatrix, fitness, match

quick = settings(max_examples=40, deadline=None)  # no deadline: a busy machine is no failure
Image = tuple[Tensor, Tensor]  # detections (k, 6), truth (n, 5)


def scene(seed: int, *, labels: int = 12, classes: int = 3, noise: float = 4.0, invented: int = 6) -> Image:
    """Crowded labels, most of them found one to three times, some under another class, and detections of nothing."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 150, (labels, 2))
    xyxy = np.concatenate((corner, corner + rng.uniform(15, 60, (labels, 2))), 1)
    class_index = rng.integers(classes, size=labels)
    truth = np.concatenate((class_index[:, None], xyxy), 1)
    source = rng.integers(labels, size=rng.integers(labels, 3 * labels)) if labels else np.zeros(0, int)
    boxes = xyxy[source] + rng.normal(0, noise, (len(source), 4)) * rng.uniform(0, 1, (len(source), 1))
    found_class = np.where(
        rng.uniform(size=len(source)) < 0.85, class_index[source], rng.integers(classes, size=len(source))
    )
    nothing = rng.uniform(0, 200, (invented, 2))
    boxes = np.concatenate((boxes, np.concatenate((nothing, nothing + 20), 1)))
    found_class = np.concatenate((found_class, rng.integers(classes, size=invented)))
    confidence = np.sort(rng.uniform(0.01, 1, len(boxes)))[::-1]
    detections = np.concatenate((boxes, confidence[:, None], found_class[:, None]), 1)
    return torch.tensor(detections).float().reshape(-1, 6), torch.tensor(truth).float().reshape(-1, 5)


def average(images: list[Image], classes: int = 3) -> APResult:
    result = AveragePrecision(classes)
    for detections, truth in images:
        result.update(match(detections, truth), detections[:, 4], detections[:, 5], truth[:, 0])
    return result.compute()


# ------------------------------------------------------------------------------------------------------------ matching


def literal_match(detections: Tensor, truth: Tensor) -> np.ndarray:
    """The rule as steps: list the pairs, sort by IoU, keep each detection once, then each label once, by detection."""
    iou = box_iou(truth[:, 1:], detections[:, :4]).numpy()
    correct = np.zeros((len(detections), len(IOU_THRESHOLDS)), bool)
    for column, threshold in enumerate(np.float32(IOU_THRESHOLDS)):
        pairs = [
            (iou[label, detection], label, detection)
            for label in range(len(truth))
            for detection in range(len(detections))
            if iou[label, detection] >= threshold and truth[label, 0] == detections[detection, 5]
        ]
        pairs.sort(key=lambda pair: -pair[0])
        by_detection: dict[int, int] = {}
        for _, label, detection in pairs:
            by_detection.setdefault(detection, label)
        by_label: dict[int, int] = {}
        for detection in sorted(by_detection):
            by_label.setdefault(by_detection[detection], detection)
        correct[list(by_label.values()), column] = True
    return correct


@quick
@given(st.integers(0, 100_000), st.integers(0, 20), st.integers(1, 3), st.sampled_from([1.0, 4.0, 12.0]))
def test_matching_equals_the_literal_rule(seed: int, labels: int, classes: int, noise: float) -> None:
    detections, truth = scene(seed, labels=labels, classes=classes, noise=noise)
    np.testing.assert_array_equal(match(detections, truth).numpy(), literal_match(detections, truth))


def test_a_label_goes_to_the_more_confident_detection_not_to_the_better_box() -> None:
    """The measured case: 0.9 at IoU 0.65 beats 0.5 at IoU 0.95 as long as both reach the threshold."""
    truth = torch.tensor([[0.0, 0, 0, 100, 100]])
    detections = torch.tensor([[0.0, 0, 100, 65.1, 0.9, 0], [0, 0, 100, 95.1, 0.5, 0]])
    correct = match(detections, truth)
    assert correct[0].tolist() == [True] * 4 + [False] * 6
    assert correct[1].tolist() == [False] * 4 + [True] * 6


def test_a_detection_whose_best_label_is_taken_gets_no_other() -> None:
    truth = torch.tensor([[0.0, 0, 0, 100, 100], [0, 0, 10, 100, 110]])
    detections = torch.tensor([[0.0, 0, 100, 100, 0.9, 0], [0, 2, 100, 102, 0.8, 0]])
    assert match(detections, truth)[:, 0].tolist() == [True, False]


def test_classes_must_agree_and_no_label_is_found_twice() -> None:
    for seed in range(20):
        detections, truth = scene(seed)
        correct = match(detections, truth)
        per_class = torch.stack([correct[detections[:, 5] == c].sum(0) for c in range(3)])
        labels = torch.stack([(truth[:, 0] == c).sum() for c in range(3)])
        assert (per_class <= labels[:, None]).all()
    wrong = match(detections + torch.tensor([0, 0, 0, 0, 0, 3.0]), truth)
    assert not wrong.any()


def test_images_without_detections_or_labels_match_nothing() -> None:
    detections, truth = scene(0)
    assert match(detections[:0], truth).shape == (0, 10)
    alone = match(detections, truth[:0])
    assert alone.shape == (len(detections), 10) and not alone.any()


def test_thresholds_may_be_a_tensor() -> None:
    detections, truth = scene(1)
    assert torch.equal(match(detections, truth, torch.tensor([0.5, 0.75])), match(detections, truth)[:, [0, 5]])


# --------------------------------------------------------------------------------------------------- average precision


def literal_average_precision(images: list[Image], classes: int) -> dict[str, np.ndarray]:
    """Class by class and threshold by threshold, with np.interp on the curves and their sentinels."""
    correct = np.concatenate([match(*image).numpy() for image in images])
    confidence = np.concatenate([detections[:, 4].numpy() for detections, _ in images]).astype(np.float64)
    predicted = np.concatenate([detections[:, 5].numpy() for detections, _ in images])
    labels = np.concatenate([truth[:, 0].numpy() for _, truth in images])
    order = np.argsort(-confidence, kind="stable")
    correct, confidence, predicted = correct[order], confidence[order], predicted[order]
    present = [c for c in range(classes) if (labels == c).any()]
    px = np.linspace(0, 1, 1000)
    ap, p, r = np.zeros((len(present), 10)), np.zeros((len(present), 1000)), np.zeros((len(present), 1000))
    for row, c in enumerate(present):
        mine, total = predicted == c, (labels == c).sum()
        if not mine.any():
            continue
        tp, fp = correct[mine].cumsum(0), (~correct[mine]).cumsum(0)
        recall, precision = tp / (total + 1e-16), tp / (tp + fp)
        r[row] = np.interp(-px, -confidence[mine], recall[:, 0], left=0)
        p[row] = np.interp(-px, -confidence[mine], precision[:, 0], left=1)
        for column in range(10):
            x = np.concatenate(([0.0], recall[:, column], [1.0]))
            y = np.concatenate(([1.0], precision[:, column], [0.0]))
            envelope = np.flip(np.maximum.accumulate(np.flip(y)))
            grid = np.linspace(0, 1, 101)
            values = np.interp(grid, x, envelope)
            ap[row, column] = sum((values[i] + values[i + 1]) * (grid[i + 1] - grid[i]) / 2 for i in range(100))
    f1 = 2 * p * r / (p + r + 1e-16)
    mean = f1.mean(0) if present else np.zeros(1000)
    smooth = np.array([mean[np.clip(np.arange(i - 50, i + 51), 0, 999)].mean() for i in range(1000)])
    return {"ap": ap, "precision_curve": p, "recall_curve": r, "f1_curve": f1, "smooth": smooth}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 6), st.integers(1, 8))
def test_average_precision_equals_the_literal_curves(seed: int, count: int, classes: int) -> None:
    images = [scene(seed + k, labels=(seed + k) % 15, classes=classes) for k in range(count)]
    result, expected = average(images, classes), literal_average_precision(images, classes)
    for name in ("ap", "precision_curve", "recall_curve", "f1_curve"):
        np.testing.assert_allclose(getattr(result, name), expected[name], atol=1e-9)
    if len(result.classes):
        best = round(result.confidence * 999)
        assert expected["smooth"][best] == pytest.approx(expected["smooth"].max(), abs=1e-12)
        np.testing.assert_array_equal(result.precision, result.precision_curve[:, best])
        np.testing.assert_array_equal(result.recall, result.recall_curve[:, best])


def perfect(seed: int, labels: int = 12) -> Image:
    _, truth = scene(seed, labels=labels)
    confidence = (
        torch.rand(len(truth), 1, generator=torch.Generator().manual_seed(seed)).sort(0, descending=True).values
    )
    return torch.cat((truth[:, 1:], confidence, truth[:, :1]), 1), truth


def test_perfect_detections_reach_the_ceiling() -> None:
    """0.995 and not 1: of the 101 points the last one, recall 1, counts as precision 0 in YOLOv5's curve."""
    result = average([perfect(seed) for seed in range(4)])
    np.testing.assert_allclose(result.ap, 0.995, atol=1e-12)
    assert result.mean_precision == result.mean_recall == pytest.approx(1)
    assert result.map == pytest.approx(0.995) and result.map50 == pytest.approx(0.995)
    np.testing.assert_array_equal(result.true_positives, result.instances)
    assert not result.false_positives.any()


def test_detecting_nothing_scores_0() -> None:
    images = [(detections[:0], truth) for detections, truth in (scene(seed) for seed in range(3))]
    result = average(images)
    assert (result.map, result.map50, result.mean_precision, result.mean_recall, result.fitness) == (0, 0, 0, 0, 0)
    assert result.instances.sum() == 36 and result.ap.shape == (3, 10)


def test_detecting_only_wrongly_scores_0() -> None:
    images = [
        (detections + torch.tensor([900.0, 900, 900, 900, 0, 0]), truth) for detections, truth in map(scene, range(3))
    ]
    result = average(images)
    assert (result.map, result.map50, result.mean_precision, result.mean_recall) == (0, 0, 0, 0)


def test_no_images_at_all_give_an_empty_result() -> None:
    result = AveragePrecision(80).compute()
    assert (
        result.map == 0
        and result.mean_recall == 0
        and result.ap.shape == (0, 10)
        and result.pr_curve.shape == (0, 1000)
    )
    np.testing.assert_array_equal(result.maps(80), np.zeros(80))


@quick
@given(st.integers(0, 100_000), st.permutations(range(5)))
def test_order_of_images_does_not_matter(seed: int, order: list[int]) -> None:
    images = [scene(seed + k) for k in range(5)]
    one, other = average(images), average([images[k] for k in order])
    np.testing.assert_allclose(one.ap, other.ap, atol=1e-12)
    np.testing.assert_allclose(one.precision, other.precision, atol=1e-12)


@quick
@given(st.integers(0, 100_000), st.integers(0, 2), st.floats(0.001, 1))
def test_a_lower_scored_false_positive_never_raises_ap(seed: int, class_index: int, share: float) -> None:
    images = [scene(seed + k) for k in range(3)]
    detections, truth = images[0]
    lowest = min(float(found[:, 4].min()) for found, _ in images) * share * 0.99
    invented = torch.tensor([[900.0, 900, 950, 950, lowest, class_index]])
    before = average(images)
    after = average([(torch.cat((detections, invented)), truth), *images[1:]])
    assert (after.ap <= before.ap + 1e-12).all()


def test_updating_image_by_image_equals_all_at_once() -> None:
    images = [scene(seed) for seed in range(4)]
    together = AveragePrecision(3)
    parts = [(match(d, t), d[:, 4], d[:, 5], t[:, 0]) for d, t in images]
    together.update(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
    np.testing.assert_array_equal(together.compute().ap, average(images).ap)
    np.testing.assert_array_equal(together.average_precision(), average(images).ap)


def test_classes_without_labels_count_in_no_mean() -> None:
    detections, truth = perfect(3)
    detections, truth = detections.clone(), truth.clone()
    truth[:, 0] = detections[:, 5] = 2
    stray = torch.tensor([[0.0, 0, 5, 5, 0.9, 0], [0, 0, 5, 5, 0.8, 7]])  # class 0 has no labels, class 7 is not known
    result = average([(torch.cat((detections, stray)), truth)])
    assert result.classes.tolist() == [2] and result.map == pytest.approx(0.995)
    np.testing.assert_allclose(result.maps(4), 0.995)


def test_fitness_is_mostly_map() -> None:
    rows = np.array([(1, 1, 0.5, 0.25, 9), (0, 0, 1, 1, 9)])
    assert fitness(rows) == pytest.approx([0.1 * 0.5 + 0.9 * 0.25, 1])


# --------------------------------------------------------------------------------------------------------- pycocotools


def coco_evaluation(images: list[Image], classes: int) -> Any:
    pycocotools = pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert pycocotools

    def record(row: Tensor, class_index: Tensor) -> dict[str, Any]:
        x1, y1, x2, y2 = row.double().tolist()
        box = [x1, y1, x2 - x1, y2 - y1]
        return {"category_id": int(class_index) + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}

    truth = [{"image_id": i + 1} | record(row[1:], row[0]) for i, (_, rows) in enumerate(images) for row in rows]
    truth = [{"id": number + 1} | entry for number, entry in enumerate(truth)]
    found = [
        {"image_id": i + 1, "score": float(row[4])} | record(row[:4], row[5])
        for i, (rows, _) in enumerate(images)
        for row in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(len(images))],
            "categories": [{"id": c + 1} for c in range(classes)],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def coco_ap_with_our_curve(evaluation: Any, instances: np.ndarray) -> np.ndarray:
    """Average precision (classes, thresholds) of pycocotools' own matches, by our curve and area instead of its own."""
    params = evaluation.params
    per_class = len(params.areaRng) * len(params.imgIds)
    result = np.zeros((len(params.catIds), len(params.iouThrs)))
    for row in range(len(params.catIds)):
        images = [e for e in evaluation.evalImgs[row * per_class : row * per_class + len(params.imgIds)] if e]
        score = np.concatenate([e["dtScores"] for e in images])
        correct = np.concatenate([e["dtMatches"] > 0 for e in images], 1).T
        average = AveragePrecision(1)
        average.update(correct, score, np.zeros(len(score)), np.zeros(instances[row]))
        result[row] = average.compute().ap[0]
    return result


def test_average_precision_agrees_with_pycocotools() -> None:
    """Where the two rules of matching agree, the rest is the curve between recalls, and that we bound.

    COCO reads precision at 101 recalls and averages: 0 above the highest recall. YOLOv5 draws a straight line from
    there to recall 1 and takes the trapezoid area, with precision 0 at recall 1 itself. So for labels that are apart
    (no two of a class overlap, no detection has a second choice) the difference is at most the triangle under that
    line, half of (1 - recall) x (precision there), and one percent for the end points.
    """
    rng = np.random.default_rng(0)
    images: list[Image] = []
    for seed in range(25):
        _, truth = scene(seed)
        grid = torch.arange(12)
        place = torch.stack((grid % 4, grid // 4, grid % 4, grid // 4), 1) * 100.0
        size = truth[:, 3:] - truth[:, 1:3]
        truth = torch.cat((truth[:, :1], place[:, :2], place[:, :2] + size), 1)
        source = torch.tensor(rng.permutation(12)[:9].repeat(2))  # a quarter is missed, the rest found twice
        noise = torch.tensor(rng.normal(0, 3, (18, 4))).float()
        confidence = torch.tensor(rng.uniform(0.05, 1, (18, 1))).float().sort(0, descending=True).values
        images.append((torch.cat((truth[source, 1:] + noise, confidence, truth[source, :1]), 1), truth))
    evaluation = coco_evaluation(images, 3)
    coco = evaluation.eval["precision"][:, :, :, 0, -1].mean(1).T  # (classes, thresholds)
    result = average(images)

    np.testing.assert_allclose(result.ap, coco_ap_with_our_curve(evaluation, result.instances), atol=1e-9)
    recall = evaluation.eval["recall"][:, :, 0, -1].T
    found = np.bincount(torch.cat([detections[:, 5] for detections, _ in images]).long().numpy(), minlength=3)
    last_precision = recall * (result.instances / found)[:, None]
    triangle = (1 - recall) * last_precision / 2
    assert result.ap[:, :5].min() > 0.2  # there is something to compare
    np.testing.assert_allclose(result.ap - triangle, coco, atol=0.01)


def test_crowded_scenes_differ_from_pycocotools_by_the_rule_of_matching_only_a_little() -> None:
    """In COCO a detection whose best label is taken may have its second best, and takes the best one that is free."""
    images = [scene(seed, labels=20, classes=2, noise=6.0) for seed in range(20)]
    evaluation = coco_evaluation(images, 2)
    result = average(images, 2)
    coco = coco_ap_with_our_curve(evaluation, result.instances)
    np.testing.assert_allclose(result.ap, coco, atol=0.02)
    assert np.abs(result.ap - coco).max() > 1e-6  # the rules do differ
    assert abs(result.map - evaluation.eval["precision"][:, :, :, 0, -1].mean()) < 0.05


# ---------------------------------------------------------------------------------------------------- confusion matrix


def literal_confusion(detections: Tensor, truth: Tensor, classes: int) -> np.ndarray:
    """Pairs by IoU descending; each detection once, sorted again, each label once; the rest is background."""
    matrix = np.zeros((classes + 1, classes + 1), int)
    detections = detections[detections[:, 4] > 0.25]
    iou = box_iou(truth[:, 1:], detections[:, :4]).numpy()
    pairs = [
        (iou[i, j], i, j) for i in range(len(truth)) for j in range(len(detections)) if iou[i, j] > np.float32(0.45)
    ]
    pairs.sort(key=lambda pair: -pair[0])
    by_detection: dict[int, tuple[float, int]] = {}
    for value, label, detection in pairs:
        by_detection.setdefault(detection, (value, label))
    by_label: dict[int, int] = {}
    for detection in sorted(by_detection, key=lambda d: -by_detection[d][0]):
        by_label.setdefault(by_detection[detection][1], detection)
    for label, row in enumerate(truth):
        predicted = int(detections[by_label[label], 5]) if label in by_label else classes
        matrix[predicted, int(row[0])] += 1
    for detection, row in enumerate(detections):
        if detection not in by_label.values():
            matrix[int(row[5]), classes] += 1
    return matrix


@quick
@given(st.integers(0, 100_000), st.integers(0, 15))
def test_confusion_equals_the_literal_rule(seed: int, labels: int) -> None:
    detections, truth = scene(seed, labels=labels)
    confusion = ConfusionMatrix(3)
    confusion.update(detections, truth)
    np.testing.assert_array_equal(confusion.matrix, literal_confusion(detections, truth, 3))


def test_every_label_and_every_confident_detection_is_counted() -> None:
    images = [scene(seed, labels=seed % 5) for seed in range(12)]
    confusion = ConfusionMatrix(3)
    for image in images:
        confusion.update(*image)
    labels = np.bincount(torch.cat([truth[:, 0] for _, truth in images]).long().numpy(), minlength=3)
    sure = torch.cat([detections[detections[:, 4] > 0.25, 5] for detections, _ in images])
    np.testing.assert_array_equal(confusion.matrix[:, :3].sum(0), labels)
    np.testing.assert_array_equal(confusion.matrix[:3].sum(1), np.bincount(sure.long().numpy(), minlength=3))


def test_false_positives_count_without_any_label_and_without_any_match() -> None:
    """In YOLOv5 both of these images leave the background column empty."""
    detections = torch.tensor([[0.0, 0, 10, 10, 0.9, 1], [50, 50, 60, 60, 0.2, 0]])
    confusion = ConfusionMatrix(2)
    confusion.update(detections, torch.zeros(0, 5))
    np.testing.assert_array_equal(confusion.matrix, [[0, 0, 0], [0, 0, 1], [0, 0, 0]])
    confusion.update(detections, torch.tensor([[0.0, 300, 300, 320, 320]]))
    np.testing.assert_array_equal(confusion.matrix, [[0, 0, 0], [0, 0, 2], [1, 0, 0]])


def test_missed_labels_count_on_images_without_detections() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.zeros(0, 6), torch.tensor([[0.0, 1, 1, 5, 5], [1, 1, 1, 5, 5]]))
    np.testing.assert_array_equal(confusion.matrix, [[0, 0, 0], [0, 0, 0], [1, 1, 0]])


def test_a_wrong_class_counts_as_confusion_not_as_background() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([[0.0, 0, 10, 10, 0.9, 1]]), torch.tensor([[0.0, 0, 0, 10, 10]]))
    np.testing.assert_array_equal(confusion.matrix, [[0, 0, 0], [1, 0, 0], [0, 0, 0]])
