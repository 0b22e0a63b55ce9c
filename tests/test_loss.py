"""Target assignment and loss, beside a slow version that goes label by label, cell by cell, in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from utils.boxes import paired_iou
from utils.config import UserError, check_hyp, read_hyp
from utils.loss import Assignment, ComputeLoss, LossHyp, _by_cell, _flat_index, assign_targets, scale_gains

quick = settings(max_examples=30, deadline=None)  # no deadline: a busy machine is no failure
ANCHORS_PX = [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]]
ANCHORS_PX += [[(436, 615), (739, 380), (925, 792)]]


class Head(nn.Module):
    """What the loss reads of a detection head."""

    def __init__(self, num_classes: int, levels: int) -> None:
        super().__init__()
        self.nc, self.na, self.nl = num_classes, 3, levels
        self.register_buffer("stride", torch.tensor([8.0, 16.0, 32.0, 64.0])[:levels])
        self.register_buffer("anchors", torch.tensor(ANCHORS_PX[:levels]) / self.stride.view(-1, 1, 1))


class Network(nn.Module):
    """What the loss reads of a network."""

    def __init__(self, hyp: dict[str, float] | None = None, *, num_classes: int = 4, levels: int = 3) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), Head(num_classes, levels))
        self.hyp = scale_gains(hyp or {}, levels, num_classes, 640)


def raw_predictions(seed: int, *, batch: int = 2, num_classes: int = 4, levels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = 32 if levels <= 3 else 64
    sizes = [(side // stride, 2 * side // stride) for stride in (8, 16, 32, 64)[:levels]]
    return [torch.randn(batch, 3, h, w, 5 + num_classes, generator=generator).requires_grad_() for h, w in sizes]


def random_targets(seed: int, count: int = 12, *, batch: int = 2, num_classes: int = 4) -> Tensor:
    """Centres everywhere, borders included, sizes from tiny to the whole image."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 6, generator=generator)
    targets[:, 0] = torch.randint(batch, (count,), generator=generator)
    targets[:, 1] = torch.randint(num_classes, (count,), generator=generator)
    targets[:, 2:4] = (targets[:, 2:4] * 20).round() / 20  # often on the borders of cells, and on those of the image
    targets[:, 4:] = targets[:, 4:] ** 2 + 0.01
    return targets


# ------------------------------------------------------------------------------------------------- the slow reference


def slow_assignment(
    targets: Tensor, shape_hw: tuple[int, int], anchors: Tensor, anchor_t: float
) -> list[tuple[int, int, int, int, int, list[float], list[float]]]:
    """(image, anchor, row, column, class, box in cells, anchor) in the order self, left, up, right, down."""
    height, width = shape_hw
    result = []
    for offset_x, offset_y, side in ((0, 0, None), (0.5, 0, "x"), (0, 0.5, "y"), (-0.5, 0, "-x"), (0, -0.5, "-y")):
        for index, anchor in enumerate(anchors):
            for target in targets:
                x, y, w, h = target[2] * width, target[3] * height, target[4] * width, target[5] * height
                if max(w / anchor[0], anchor[0] / w, h / anchor[1], anchor[1] / h) >= anchor_t:
                    continue
                value = {None: None, "x": x, "y": y, "-x": width - x, "-y": height - y}[side]
                if value is not None and not (value % 1 < 0.5 and value > 1):
                    continue
                column = min(max(math.floor(x - offset_x), 0), width - 1)
                row = min(max(math.floor(y - offset_y), 0), height - 1)
                box = [float(x - column), float(y - row), float(w), float(h)]
                place = (int(target[0]), index, row, column, int(target[1]))
                result.append((*place, box, anchor.tolist()))
    return result


def slow_bce(logit: Tensor, wanted: float, positive_weight: float, gamma: float) -> Tensor:
    p = logit.sigmoid()
    loss = -(positive_weight * wanted * p.log() + (1 - wanted) * (1 - p).log())
    if gamma:
        right = wanted * p + (1 - wanted) * (1 - p)
        loss = loss * (wanted * 0.25 + (1 - wanted) * 0.75) * (1 - right) ** gamma
    return loss


def slow_loss(
    predictions: list[Tensor], targets: Tensor, hyp: dict[str, float], anchors: Tensor
) -> tuple[Tensor, Tensor]:
    hyp = {"cls_pw": 1, "obj_pw": 1, "anchor_t": 4, "fl_gamma": 0, "label_smoothing": 0} | hyp
    balances = (4.0, 1.0, 0.4) if len(predictions) == 3 else (4.0, 1.0, 0.25, 0.06, 0.02)
    smooth = hyp["label_smoothing"] / 2
    box, obj, cls = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    for level, balance, level_anchors in zip(predictions, balances, anchors, strict=False):
        level = level.double()
        wanted: dict[tuple[int, ...], float] = {}
        rows = slow_assignment(targets, (level.shape[2], level.shape[3]), level_anchors, hyp["anchor_t"])
        for image, index, row, column, class_index, label, anchor in rows:
            t = level[image, index, row, column]
            xy, wh = 2 * t[:2].sigmoid() - 0.5, (2 * t[2:4].sigmoid()) ** 2 * torch.tensor(anchor).double()
            ciou = paired_iou(torch.cat((xy, wh)), torch.tensor(label).double())
            box = box + (1 - ciou) / len(rows)
            wanted[image, index, row, column] = max(ciou.item(), 0)
            if level.shape[4] > 6:
                each = [
                    slow_bce(logit, 1 - smooth if c == class_index else smooth, hyp["cls_pw"], hyp["fl_gamma"])
                    for c, logit in enumerate(t[5:])
                ]
                cls = cls + torch.stack(each).mean() / len(rows)
        target_map = torch.zeros(level.shape[:4]).double()
        for place, value in wanted.items():
            target_map[place] = value
        each = [
            slow_bce(logit, value, hyp["obj_pw"], hyp["fl_gamma"])
            for logit, value in zip(level[..., 4].flatten(), target_map.flatten().tolist(), strict=True)
        ]
        obj = obj + balance * torch.stack(each).mean()
    items = torch.stack((box * hyp["box"], obj * hyp["obj"], cls * hyp["cls"]))
    return items.sum() * len(predictions[0]), items


CASES: dict[str, dict[str, float]] = {
    "defaults": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"cls_pw": 0.5, "obj_pw": 2.0},
    "focal": {"fl_gamma": 1.5},
    "narrow anchors": {"anchor_t": 2.0},
}


@pytest.mark.parametrize("hyp", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_equal_the_slow_reference(hyp: dict[str, float]) -> None:
    network = Network(hyp)
    predictions, targets = raw_predictions(1), random_targets(1)
    total, items = ComputeLoss(network)(predictions, targets)
    expected_total, expected_items = slow_loss(predictions, targets, network.hyp, network.model[-1].anchors)
    torch.testing.assert_close(items.double(), expected_items.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), expected_total.detach()[None], rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(total.sum(), predictions)
    theirs = torch.autograd.grad(expected_total, predictions)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_classes", "levels"), [(1, 3), (4, 4), (2, 2)])
def test_other_numbers_of_classes_and_levels_equal_the_slow_reference(num_classes: int, levels: int) -> None:
    network = Network(num_classes=num_classes, levels=levels)
    predictions = raw_predictions(2, num_classes=num_classes, levels=levels)
    targets = random_targets(2, num_classes=num_classes)
    total, items = ComputeLoss(network)(predictions, targets)
    expected_total, expected_items = slow_loss(predictions, targets, network.hyp, network.model[-1].anchors)
    torch.testing.assert_close(items.double(), expected_items.detach(), rtol=1e-5, atol=1e-6)
    assert total.shape == (1,) and total.item() == pytest.approx(expected_total.item(), rel=1e-5)
    assert (items[2] == 0) == (num_classes == 1)


# ---------------------------------------------------------------------------------------------------------- assignment


def rows_of(assignment: Assignment) -> list[tuple[Any, ...]]:
    fields = (assignment.image, assignment.anchor, assignment.row, assignment.column, assignment.class_index)
    places = zip(*(values.tolist() for values in fields), strict=True)
    boxes, anchors = assignment.cxcywh.tolist(), assignment.anchor_wh.tolist()
    return [(*place, box, anchor) for place, box, anchor in zip(places, boxes, anchors, strict=True)]


@quick
@given(st.integers(0, 100_000), st.integers(0, 15), st.floats(1.5, 8))
def test_assignment_equals_the_slow_reference_in_its_order(seed: int, count: int, anchor_t: float) -> None:
    targets, anchors, shape_hw = random_targets(seed, count), Head(4, 3).anchors[1:2], (5, 9)
    (ours,) = assign_targets(targets, [shape_hw], anchors, anchor_t)
    expected = slow_assignment(targets, shape_hw, anchors[0], anchor_t)
    assert ours.valid.all()
    for mine, other in zip(rows_of(ours), expected, strict=True):
        assert mine[:5] == other[:5]
        assert mine[5] == pytest.approx(other[5], abs=1e-5) and mine[6] == other[6]


@quick
@given(st.integers(0, 100_000), st.integers(0, 15), st.booleans())
def test_every_assigned_index_is_in_range(seed: int, count: int, compact: bool) -> None:
    targets, shapes = random_targets(seed, count), [(8, 16), (4, 8), (1, 1)]
    for assignment, (height, width) in zip(
        assign_targets(targets, shapes, Head(4, 3).anchors, 4.0, compact=compact), shapes, strict=True
    ):
        for values, limit in (
            (assignment.image, 2),
            (assignment.anchor, 3),
            (assignment.row, height),
            (assignment.column, width),
            (assignment.class_index, 4),
        ):
            assert values.dtype == torch.int64 and ((values >= 0) & (values < limit)).all()


@quick
@given(st.integers(0, 100_000), st.integers(0, 15))
def test_padding_is_all_that_compacting_removes(seed: int, count: int) -> None:
    targets, shapes, anchors = random_targets(seed, count), [(8, 16), (4, 8), (2, 4)], Head(4, 3).anchors
    whole = assign_targets(targets, shapes, anchors, 4.0, compact=False)
    for padded, tight in zip(whole, assign_targets(targets, shapes, anchors, 4.0), strict=True):
        assert len(padded.valid) == 5 * 3 * count
        for name, values in vars(padded).items():
            assert torch.equal(values[padded.valid], getattr(tight, name))


def test_a_centre_claims_its_cell_and_the_two_nearest_neighbours() -> None:
    target = torch.tensor([[0.0, 1, 2.3 / 8, 3.8 / 8, 0.25, 0.25]])
    (assignment,) = assign_targets(target, [(8, 8)], torch.tensor([[[2.0, 2.0]]]), 4.0)
    assert list(zip(assignment.column.tolist(), assignment.row.tolist(), strict=True)) == [(2, 3), (1, 3), (2, 4)]
    torch.testing.assert_close(assignment.cxcywh[:, :2], torch.tensor([[0.3, 0.8], [1.3, 0.8], [0.3, -0.2]]))


def test_a_centre_in_the_corner_cell_has_no_neighbours_outside() -> None:
    target = torch.tensor([[0.0, 0, 0.2 / 8, 0.3 / 8, 0.25, 0.25], [0, 0, 1.0, 1.0, 0.25, 0.25]])
    (assignment,) = assign_targets(target, [(8, 8)], torch.tensor([[[2.0, 2.0]]]), 4.0)
    places = list(zip(assignment.column.tolist(), assignment.row.tolist(), strict=True))
    # the second centre lies on the far edge: itself and the neighbours left and up all end in the last cell
    assert places == [(0, 0), (7, 7), (7, 7), (7, 7)]


def test_shapes_far_from_every_anchor_are_assigned_nowhere() -> None:
    target = torch.tensor([[0.0, 0, 0.5, 0.5, 0.9, 0.001]])
    assert all(len(a.image) == 0 for a in assign_targets(target, [(8, 8)] * 3, Head(4, 3).anchors, 4.0))


# ---------------------------------------------------------------------------------------------------------------- loss


def test_without_labels_only_the_background_counts() -> None:
    network, predictions = Network(), raw_predictions(3)
    total, items = ComputeLoss(network)(predictions, torch.zeros(0, 6))
    expected, _ = slow_loss(predictions, torch.zeros(0, 6), network.hyp, network.model[-1].anchors)
    assert items[0] == items[2] == 0 and total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.sum().backward()
    for level in predictions:
        assert level.grad is not None and (level.grad[..., 4] > 0).all()
        assert not level.grad[..., :4].any() and not level.grad[..., 5:].any()


def test_gradient_reaches_every_part_of_assigned_predictions() -> None:
    predictions, targets = raw_predictions(4), random_targets(4, 40)
    compute_loss = ComputeLoss(Network())
    compute_loss(predictions, targets)[0].sum().backward()
    shapes = [(level.shape[2], level.shape[3]) for level in predictions]
    for level, assignment in zip(predictions, assign_targets(targets, shapes, compute_loss.anchors, 4.0), strict=True):
        rows = _by_cell(level.grad)[_flat_index(level, assignment)]
        assert len(rows) and (rows != 0).all() and rows.isfinite().all()


@pytest.mark.parametrize("place", [0, 4, 6])
def test_not_a_number_in_gives_not_a_number_out(place: int) -> None:
    predictions = [level.detach() for level in raw_predictions(5)]
    for level in predictions:
        level[..., place] = torch.nan
    total, items = ComputeLoss(Network())(predictions, random_targets(5, 40))
    assert total.isnan().all() and items.isnan().any()


def test_the_last_label_of_a_cell_decides_its_objectness() -> None:
    """Two labels in one cell: swapping them swaps whose IoU is wanted."""
    anchors = Head(4, 3).anchors
    first = torch.tensor([[0.0, 0, 0.52, 0.53, 0.15, 0.35], [0, 0, 0.54, 0.55, 0.2, 0.5]])
    predictions = [torch.zeros_like(level) for level in raw_predictions(6, batch=1)]  # boxes of the anchors' size
    for level in predictions:
        level[..., 4] = 1  # at 0 the cost would not depend on what is wanted
    orders = (first, first.flip(0))
    found = [ComputeLoss(Network())(predictions, t)[1][1] for t in orders]
    assert found[0] != found[1]
    for targets, ours in zip(orders, found, strict=True):
        assert ours.item() == pytest.approx(
            slow_loss(predictions, targets, Network().hyp, anchors)[1][1].item(), rel=1e-5
        )


def test_duplicates_overwrite_in_order_however_many_there_are() -> None:
    """60 labels in the same few cells give the objectness target of a loop that writes one after the other."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.cat((torch.zeros(60, 2), torch.rand(60, 4, generator=generator) * 0.02 + 0.4), 1)
    targets[:, 4:] -= 0.25
    network, predictions = Network(), raw_predictions(7, batch=1)
    ours = [ComputeLoss(network)(predictions, targets)[1] for _ in range(3)]
    assert torch.equal(ours[0], ours[1]) and torch.equal(ours[0], ours[2])
    expected = slow_loss(predictions, targets, network.hyp, network.model[-1].anchors)[1]
    torch.testing.assert_close(ours[0].double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_padded_rows_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator runs, with rows kept that do not count, gives what a CPU computes."""
    results = []
    for padded in (False, True):
        predictions = raw_predictions(8)
        if padded:
            monkeypatch.setattr("utils.loss._may_compact", lambda device: False)
        total, items = ComputeLoss(Network())(predictions, random_targets(8, 30))
        results.append((items, *torch.autograd.grad(total.sum(), predictions)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_give_a_float32_loss(dtype: torch.dtype) -> None:
    network, targets = Network(), random_targets(9, 30)
    halves = [level.detach().to(dtype).requires_grad_() for level in raw_predictions(9)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, items = ComputeLoss(network)(halves, targets)
    expected = ComputeLoss(network)([level.detach().float() for level in halves], targets)
    assert total.dtype == items.dtype == torch.float32
    torch.testing.assert_close((total.detach(), items), expected)
    total.sum().backward()
    assert all(level.grad is not None and level.grad.dtype == dtype and level.grad.isfinite().all() for level in halves)


def test_total_is_the_items_times_the_batch_and_differentiable() -> None:
    total, items = ComputeLoss(Network())(raw_predictions(10, batch=3), random_targets(10, batch=3))
    assert total.shape == (1,) and total.requires_grad and not items.requires_grad
    torch.testing.assert_close(total.detach(), items.sum(0, keepdim=True) * 3)


def test_autobalance_moves_weights_towards_the_inverse_loss() -> None:
    compute_loss = ComputeLoss(Network(), autobalance=True)
    predictions, nothing = raw_predictions(11), torch.zeros(0, 6)
    _, items = compute_loss(predictions, nothing)
    assert torch.equal(items, ComputeLoss(Network())(predictions, nothing)[1])  # new weights count from the next batch
    losses = torch.stack([nn.functional.softplus(level[..., 4]).mean() for level in predictions])
    moved = 0.9999 * torch.tensor([4.0, 1.0, 0.4]) + 0.0001 / losses
    torch.testing.assert_close(compute_loss.balance, (moved / moved[1]).detach())
    assert torch.equal(ComputeLoss(Network()).balance, torch.tensor([4.0, 1.0, 0.4]))


def test_loss_reads_through_a_distributed_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    predictions, targets = raw_predictions(12), random_targets(12)
    wrapped, plain = (ComputeLoss(network)(predictions, targets) for network in (Wrapper(Network()), Network()))
    assert torch.equal(wrapped[1], plain[1])


def test_perfect_predictions_cost_next_to_nothing() -> None:
    """Predictions turned into the labels they are assigned: box loss 0, class loss 0, objectness at its minimum."""
    network, compute_loss = Network(), ComputeLoss(Network())
    targets = torch.tensor([[0.0, 2, 0.31, 0.42, 0.1, 0.15]])
    predictions = [torch.full_like(level.detach(), -12.0) for level in raw_predictions(0, batch=1)]
    shapes = [(level.shape[2], level.shape[3]) for level in predictions]
    for level, a in zip(predictions, assign_targets(targets, shapes, compute_loss.anchors, 4.0), strict=True):
        row = torch.full((len(a.image), 9), -12.0)
        row[:, :2] = ((a.cxcywh[:, :2] + 0.5) / 2).logit()
        row[:, 2:4] = ((a.cxcywh[:, 2:] / a.anchor_wh).sqrt() / 2).logit()
        row[:, 4] = row[:, 7] = 12.0
        level[a.image, a.anchor, a.row, a.column] = row
    _, items = ComputeLoss(network)(predictions, targets)
    assert (items < 1e-3).all()


# ---------------------------------------------------------------------------------------------------- hyper-parameters


def test_gains_scale_with_levels_classes_and_image_size_in_a_new_dict() -> None:
    hyp = {"box": 0.05, "cls": 0.5, "obj": 1.0, "lr0": 0.01}
    scaled = scale_gains(hyp, 4, 20, 1280)
    assert scaled == pytest.approx({"box": 0.0375, "cls": 0.09375, "obj": 3.0, "lr0": 0.01})
    assert hyp == {"box": 0.05, "cls": 0.5, "obj": 1.0, "lr0": 0.01}
    assert scale_gains({}, 3, 80, 640) == pytest.approx({"box": 0.05, "cls": 0.5, "obj": 1.0})


def test_ranges_are_checked_by_key() -> None:
    assert check_hyp(read_hyp({"box": 0.1}), [LossHyp])["obj"] == 1.0
    with pytest.raises(UserError, match=r"'anchor_t' is 0\.5, expected 1 to 100"):
        check_hyp(read_hyp({"anchor_t": 0.5}), [LossHyp])


# --------------------------------------------------------------------------------------------------------- accelerator

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@needs_cuda
def test_cuda_gives_the_same_loss_and_gradient_every_time_and_as_the_cpu() -> None:
    targets = random_targets(13, 60)
    results = []
    for device in ("cpu", "cuda", "cuda"):
        predictions = [level.detach().to(device).requires_grad_() for level in raw_predictions(13)]
        total, items = ComputeLoss(Network().to(device))(predictions, targets.to(device))
        results.append([value.cpu() for value in (items, *torch.autograd.grad(total.sum(), predictions))])
    for cpu, one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, cpu, rtol=1e-4, atol=1e-6)


@needs_cuda
def test_cuda_never_waits_for_the_loss() -> None:
    predictions = [level.detach().cuda().requires_grad_() for level in raw_predictions(14)]
    targets, compute_loss = random_targets(14, 60).cuda(), ComputeLoss(Network().cuda(), autobalance=True)
    compute_loss(predictions, targets)[0].sum().backward()  # the first call may move constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute_loss(predictions, targets)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
