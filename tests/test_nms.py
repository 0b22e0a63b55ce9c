"""Non-maximum suppression, beside torchvision's and beside a reference that goes image by image as the facts say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms, nms

import utils.nms
from utils.boxes import box_iou, cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.config import ROOT, UserError
from utils.nms import non_max_suppression


def predictions(seed: int, batch: int = 2, count: int = 300, classes: int = 5, masks: int = 0) -> Tensor:
    """Crowded boxes within 200 pixels, probabilities in 0..1, mask coefficients of both signs."""
    generator = torch.Generator().manual_seed(seed)
    result = torch.rand(batch, count, 5 + classes + masks, generator=generator)
    result[..., :2] *= 200
    result[..., 2:4] = result[..., 2:4] * 60 + 5
    result[..., 5 + classes :] -= 0.5
    return result


def reference(prediction: Tensor, conf: float, iou: float, *, multi_label: bool, agnostic: bool) -> list[Tensor]:
    """One image, one row, one class at a time; suppression by one plain call for everything."""
    results = []
    for image in prediction:
        rows = []
        for row in image[image[:, 4] > conf]:
            scores = row[5:] * row[4]
            wanted = range(len(scores)) if multi_label and len(scores) > 1 else [int(scores.argmax())]
            box = cxcywh_to_xyxy(row[:4])
            rows += [[*box.tolist(), scores[c].item(), c] for c in wanted if scores[c] > conf]
        table = torch.tensor(rows).reshape(-1, 6)
        table = table[table[:, 4].argsort(descending=True, stable=True)][:30000]
        kept = nms(table[:, :4] + (0 if agnostic else 7680) * table[:, 5:], table[:, 4], iou)
        results.append(table[kept[:300]])
    return results


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("conf", [0.001, 0.25, 0.6])
def test_equals_the_reference_row_by_row(conf: float, multi_label: bool, agnostic: bool) -> None:
    prediction = predictions(1)
    ours = non_max_suppression(prediction, conf, 0.5, multi_label=multi_label, agnostic=agnostic)
    theirs = reference(prediction, conf, 0.5, multi_label=multi_label, agnostic=agnostic)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=0, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.45, 0.6]))
def test_keeps_what_torchvision_keeps_per_class(seed: int, iou: float) -> None:
    prediction = predictions(seed, batch=1)
    (ours,) = non_max_suppression(prediction, 0.1, iou, max_det=10_000)
    confidence, index = (prediction[0, :, 5:] * prediction[0, :, 4:5]).max(1)
    passing = (prediction[0, :, 4] > 0.1) & (confidence > 0.1)
    xyxy, confidence, index = cxcywh_to_xyxy(prediction[0, passing, :4]), confidence[passing], index[passing]
    kept = batched_nms(xyxy.double(), confidence.double(), index, iou)
    expected = torch.cat((xyxy[kept], confidence[kept, None], index[kept, None].float()), 1)
    # torchvision works on exact coordinates here, ours on ones moved apart by class: an IoU at the threshold may differ
    assert abs(len(ours) - len(expected)) <= 1
    if len(ours) == len(expected):
        torch.testing.assert_close(ours, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_result_is_sorted_and_a_subset_and_apart(seed: int, agnostic: bool) -> None:
    prediction = predictions(seed, batch=1)
    (result,) = non_max_suppression(prediction, 0.1, 0.45, agnostic=agnostic)
    assert (result[:-1, 4] >= result[1:, 4]).all()
    candidates = {tuple(row) for row in cxcywh_to_xyxy(prediction[0, :, :4]).tolist()}
    assert {tuple(row) for row in result[:, :4].tolist()} <= candidates
    iou = box_iou(result[:, :4], result[:, :4]).fill_diagonal_(0)
    same = torch.ones_like(iou, dtype=torch.bool) if agnostic else result[:, 5:] == result[:, 5]
    assert not (same & (iou > 0.451)).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_is_idempotent(seed: int) -> None:
    (once,) = non_max_suppression(predictions(seed, batch=1), 0.2, 0.45)
    again = torch.zeros(1, len(once), 10)
    again[0, :, :4], again[0, :, 4] = xyxy_to_cxcywh(once[:, :4]), once[:, 4]
    again[0, torch.arange(len(once)), 5 + once[:, 5].long()] = 1
    (twice,) = non_max_suppression(again, 0.0, 0.45)
    torch.testing.assert_close(twice, once, atol=1e-4, rtol=0)


@pytest.mark.parametrize("agnostic", [False, True])
def test_rounds_and_groups_change_nothing(agnostic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = predictions(3, batch=1, count=500, classes=20)
    options = {"multi_label": True, "agnostic": agnostic, "max_det": 200 if agnostic else 700}
    quick = non_max_suppression(prediction, 0.05, 0.6, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(utils.nms, "FIRST_ROUND", 10**9)
    monkeypatch.setattr(utils.nms, "GROUPING_FROM", 10**9)
    plain = non_max_suppression(prediction, 0.05, 0.6, **options)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(quick, plain, strict=True))
    assert any(len(detections) > 100 for detections in plain)


def test_a_batch_gives_what_its_images_give_alone() -> None:
    prediction = predictions(4, batch=4)
    prediction[2, :, 4] = 0  # nothing found on one of them
    together = non_max_suppression(prediction, 0.2, 0.45, multi_label=True)
    alone = [non_max_suppression(image[None], 0.2, 0.45, multi_label=True)[0] for image in prediction]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert together[2].shape == (0, 6)


def test_order_of_predictions_does_not_matter() -> None:
    prediction = predictions(5, batch=1)
    shuffled = prediction[:, torch.randperm(prediction.shape[1], generator=torch.Generator().manual_seed(0))]
    ours, other = (non_max_suppression(p, 0.1, 0.45, multi_label=True)[0] for p in (prediction, shuffled))
    torch.testing.assert_close(ours, other, atol=0, rtol=0)


def test_thresholds_are_strict() -> None:
    prediction = torch.tensor([[[50.0, 50, 20, 20, 0.5, 1.0, 0.0], [90, 90, 20, 20, 0.75, 0.5, 0.0]]])
    assert len(non_max_suppression(prediction, 0.5)[0]) == 0
    assert len(non_max_suppression(prediction, 0.375)[0]) == 1
    assert len(non_max_suppression(prediction, 0.37)[0]) == 2


def test_multi_label_counts_a_box_once_per_class() -> None:
    prediction = torch.tensor([[[50.0, 50, 20, 20, 1.0, 0.9, 0.6, 0.1]]])
    (result,) = non_max_suppression(prediction, 0.5, multi_label=True)
    assert result[:, 5].tolist() == [0, 1]
    assert non_max_suppression(prediction, 0.5)[0][:, 5].tolist() == [0]
    assert len(non_max_suppression(prediction, 0.5, multi_label=True, agnostic=True)[0]) == 1


@pytest.mark.parametrize("multi_label", [False, True])
def test_class_filter_keeps_only_these_classes(multi_label: bool) -> None:
    prediction = predictions(6)
    everything = non_max_suppression(prediction, 0.1, multi_label=multi_label, max_det=10_000)
    some = non_max_suppression(prediction, 0.1, multi_label=multi_label, classes=[1, 3, 99], max_det=10_000)
    for whole, part in zip(everything, some, strict=True):
        torch.testing.assert_close(part, whole[(whole[:, 5] == 1) | (whole[:, 5] == 3)], atol=0, rtol=0)
    # without multi_label a box whose best class is not wanted is gone; it does not come back as its second best
    assert all(len(detections) == 0 for detections in non_max_suppression(prediction, 0.1, classes=[]))


def test_a_single_class_never_multiplies() -> None:
    prediction = predictions(7, classes=1)
    ours, other = (non_max_suppression(prediction, 0.1, multi_label=flag) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_mask_coefficients_travel_with_their_box() -> None:
    prediction = predictions(8, masks=4)
    bare = non_max_suppression(prediction[..., :-4], 0.1, multi_label=True)
    masked = non_max_suppression(prediction, 0.1, multi_label=True, num_masks=4)
    for image, (plain, rich) in zip(prediction, zip(bare, masked, strict=True), strict=True):
        assert torch.equal(plain, rich[:, :6])
        origin = (cxcywh_to_xyxy(image[:, :4])[None] == rich[:, None, :4]).all(2).int().argmax(1)
        torch.testing.assert_close(rich[:, 6:], image[origin, -4:], atol=0, rtol=0)


def test_labels_join_with_confidence_1() -> None:
    prediction = predictions(9)
    labels = [torch.tensor([[3.0, 400, 400, 50, 60], [0, 600, 600, 10, 10]]), torch.zeros(0, 5)]
    plain, helped = non_max_suppression(prediction), non_max_suppression(prediction, labels=labels)
    assert torch.equal(helped[1], plain[1])
    torch.testing.assert_close(helped[0][0], torch.tensor([375.0, 370, 425, 430, 1, 3]))
    torch.testing.assert_close(helped[0][1], torch.tensor([595.0, 595, 605, 605, 1, 0]))
    assert torch.equal(helped[0][2:], plain[0])


def test_labels_suppress_what_overlaps_them() -> None:
    prediction = torch.tensor([[[50.0, 50, 20, 20, 0.9, 0.9, 0.0]]])
    (result,) = non_max_suppression(prediction, labels=[torch.tensor([[0.0, 51, 50, 20, 20]])])
    assert result.tolist() == [[41, 40, 61, 60, 1, 0]]


def test_at_most_max_det_and_the_best_of_them() -> None:
    prediction = predictions(10)
    many, few = non_max_suppression(prediction, 0.01, 0.6), non_max_suppression(prediction, 0.01, 0.6, max_det=7)
    assert all(torch.equal(a[:7], b) for a, b in zip(many, few, strict=True))


def test_only_the_best_candidates_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.nms, "MAX_CANDIDATES", 5)
    prediction = predictions(11, batch=1)
    (result,) = non_max_suppression(prediction, 0.01, 0.45, max_det=10_000)
    scores = (prediction[0, :, 5:] * prediction[0, :, 4:5]).amax(1).sort(descending=True).values[:5]
    assert 1 <= len(result) <= 5 and result[0, 4] == scores[0] and result[-1, 4] >= scores[4]


def test_network_output_is_accepted_whole_and_left_alone() -> None:
    prediction = predictions(12)
    before = prediction.clone()
    whole = non_max_suppression((prediction, [torch.zeros(1)]), 0.1, multi_label=True)  # type: ignore[list-item]
    assert all(
        torch.equal(a, b) for a, b in zip(whole, non_max_suppression(prediction, 0.1, multi_label=True), strict=True)
    )
    assert torch.equal(prediction, before)


def test_half_precision_predictions_give_float32_detections() -> None:
    (result,) = non_max_suppression(predictions(13, batch=1).half(), 0.1)
    assert result.dtype == torch.float32 and len(result)


def test_not_a_number_is_no_detection() -> None:
    assert len(non_max_suppression(torch.full((1, 10, 7), torch.nan))[0]) == 0


@pytest.mark.parametrize("thresholds", [(-0.1, 0.5), (0.5, 1.1)])
def test_thresholds_outside_0_to_1_are_refused(thresholds: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"within 0\.\.1, found"):
        non_max_suppression(predictions(0), *thresholds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_the_detections_of_the_cpu() -> None:
    prediction = predictions(14, count=2000)
    cpu = non_max_suppression(prediction, 0.05, 0.6, multi_label=True)
    cuda = non_max_suppression(prediction.cuda(), 0.05, 0.6, multi_label=True)
    for ours, other in zip(cpu, cuda, strict=True):
        torch.testing.assert_close(other.cpu(), ours)


@pytest.mark.slow
def test_the_operator_comes_without_torchvisions_python_package() -> None:
    code = (
        "import sys, torch; from utils.nms import non_max_suppression as nms;"
        "rows = torch.tensor([[[50., 50, 20, 20, .9, 1], [51, 50, 20, 20, .8, 1]]]);"
        "assert len(nms(rows)[0]) == 1; print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
