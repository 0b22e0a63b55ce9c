"""Do the network's anchors fit the labels, and if not, which would.

A label can only be learned where some anchor's sides are within the factor `thr` of its own (`anchor_t` of the loss).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from utils.config import UserError
from utils.runtime import LOGGER

GOOD_ENOUGH = 0.98  # best possible recall above which anchors stay
SMALL_PX = 3  # labels below this many pixels are hard to learn: warned about
USABLE_PX = 2  # labels with both sides below this are left out of the search, and no anchor is smaller
MAX_BOXES = 20_000  # searched on a random sample of this size; judged on all labels
RESTARTS = 5
LLOYD_STEPS = 100
SETTLED = 1e-3  # standard deviations; centres moving less are done, mutation refines them anyway
STEP = 1.0  # largest scale of a mutation: steps of 0.1, YOLOv5's, end in the optimum next to where they began


@dataclass(frozen=True)
class AnchorHyp:
    """`anchors`: so many per level, to be found for the data; 0 keeps the network's unless they fit badly."""

    anchors: float = field(default=0.0, metadata={"min": 0.0, "max": 10.0})


@dataclass(frozen=True)
class AnchorFit:
    """How well anchors fit labels.

    `best_possible_recall`: share of labels that some anchor can answer for. `anchors_per_label`: how many can, on
    average.
    """

    best_possible_recall: float
    anchors_per_label: float


@dataclass(frozen=True)
class AnchorCheck:
    """What `judge_anchors` found. `anchors` (levels, per level, 2) in pixels are the ones to use from now on."""

    anchors: np.ndarray
    changed: bool  # `anchors` are new; write them with `write_anchors`
    before: AnchorFit
    after: AnchorFit
    messages: tuple[str, ...]
    warnings: tuple[str, ...]


def label_sizes(
    labels: Sequence[np.ndarray],
    shapes_hw: Sequence[tuple[int, int]] | np.ndarray,
    imgsz: int,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Width and height (n, 2) in pixels of all labels once every image's longer side is `imgsz`.

    `labels` holds per image (k, 5) of class, cx, cy, w, h in 0..1. With `rng` every image is scaled by 0.9 to 1.1, as
    augmentation would.
    """
    if not len(labels):
        return np.zeros((0, 2))
    size_wh = np.asarray(shapes_hw, dtype=np.float64)[:, ::-1]
    size_wh = imgsz * size_wh / size_wh.max(1, keepdims=True)
    if rng is not None:
        size_wh = size_wh * rng.uniform(0.9, 1.1, (len(size_wh), 1))
    counts = [len(label) for label in labels]
    return np.concatenate([np.asarray(label)[:, 3:5] for label in labels]) * size_wh.repeat(counts, 0)


def anchor_fit(wh: np.ndarray, anchors: np.ndarray, thr: float) -> AnchorFit:
    """How well `anchors` (..., 2) fit label sizes `wh` (n, 2), in pixels, if sides may differ by the factor `thr`."""
    if not len(wh):
        return AnchorFit(0.0, 0.0)
    fits = _log_ratio(np.log(wh), np.log(anchors.reshape(-1, 2))) < np.log(thr)
    return AnchorFit(float(fits.any(-2).mean()), float(fits.sum(-2).mean()))


def _log_ratio(log_wh: np.ndarray, log_anchors: np.ndarray) -> np.ndarray:
    """Log of the factor (..., k, n) by which sizes (n, 2) and anchors (..., k, 2) differ, the worse of the two sides.

    The labels come last: NumPy is several times faster when its innermost loop is the long one.
    """
    log_width, log_height = np.ascontiguousarray(log_wh.T)
    ratio = np.abs(log_anchors[..., :1] - log_width)
    return np.maximum(ratio, np.abs(log_anchors[..., 1:] - log_height), out=ratio)


def judge_anchors(
    head: Any,
    labels: Sequence[np.ndarray],
    shapes_hw: Sequence[tuple[int, int]] | np.ndarray,
    imgsz: int,
    *,
    thr: float = 4.0,
    generations: int = 1000,
    keep: bool = False,
    rng: np.random.Generator,
) -> AnchorCheck:
    """Judge the anchors of `head` on a dataset, and look for better ones if best possible recall is at most 0.98.

    With `keep` they are only judged: the weights of a trained head mean something beside their own anchors alone. New
    anchors are taken only if that recall rises. Nothing is written: hand the result to `write_anchors`.

    Args:
        head: has `anchors` (levels, per level, 2) in grid cells and `stride` (levels,).
        labels, shapes_hw, imgsz: see `label_sizes`.
        thr: the loss's `anchor_t`.
    """
    anchors = (head.anchors.detach().float() * head.stride.float().view(-1, 1, 1)).cpu().numpy().astype(np.float64)
    wh = label_sizes(labels, shapes_hw, imgsz, rng)
    wh = wh[(wh > 0).all(1)]
    before = anchor_fit(wh, anchors, thr)
    if not len(wh):
        return AnchorCheck(anchors, False, before, before, ("AutoAnchor: no labels to judge the anchors by.",), ())

    small = int((wh < SMALL_PX).any(1).sum())
    warnings = [f"AutoAnchor: {small} of {len(wh)} labels are less than {SMALL_PX} pixels wide or high at {imgsz}."]
    warnings = warnings if small else []
    found = f"AutoAnchor: {before.anchors_per_label:.2f} anchors per label, "
    found += f"best possible recall {before.best_possible_recall:.3f}"
    if before.best_possible_recall > GOOD_ENOUGH:
        return AnchorCheck(anchors, False, before, before, (f"{found}: the anchors stay.",), tuple(warnings))
    if keep:
        message = (
            f"{found}: the anchors stay, the head's weights were trained with them (--autoanchor looks for others)."
        )
        return AnchorCheck(anchors, False, before, before, (message,), tuple(warnings))
    if not (wh >= USABLE_PX).any():
        message = f"{found}: the anchors stay, no label reaches {USABLE_PX} pixels."
        return AnchorCheck(anchors, False, before, before, (message,), tuple(warnings))

    fresh = kmeans_anchors(wh, anchors.shape[0] * anchors.shape[1], imgsz, thr, generations, rng)
    after = anchor_fit(wh, fresh, thr)
    searched = f"{after.anchors_per_label:.2f} and {after.best_possible_recall:.3f}"
    if after.best_possible_recall <= before.best_possible_recall:
        message = f"{found}: the anchors stay, those found for the data reach no more ({searched})."
        return AnchorCheck(anchors, False, before, before, (message,), tuple(warnings))
    listing = " ".join(f"{width:.0f},{height:.0f}" for width, height in fresh)
    message = f"{found}: replaced by anchors found for the data ({searched}): {listing}."
    return AnchorCheck(fresh.reshape(anchors.shape), True, before, after, (message,), tuple(warnings))


def write_anchors(head: Any, anchors: np.ndarray) -> None:
    """Put `anchors` (levels, per level, 2) in pixels into `head.anchors`, in grid cells, in place.

    The levels are put in the order of the strides, so that large anchors meet the coarse grid whichever comes first.
    """
    ordered = torch.as_tensor(anchors, dtype=torch.float32)
    ordered = ordered[ordered.prod(-1).mean(-1).argsort()]  # small to large
    rank = head.stride.cpu().argsort().argsort()
    with torch.no_grad():
        head.anchors.copy_(ordered[rank].to(head.anchors.device) / head.stride.float().view(-1, 1, 1))


# -------------------------------------------------------------------------------------------- for other people's code


def check_anchors(dataset: Any, model: Any, thr: float = 4.0, imgsz: int = 640) -> None:
    """Judge a network's anchors on a dataset, and replace them in its head where others fit the labels better.

    YOLOv5's arguments: `dataset.labels` holds per image (k, 5) of class, cx, cy, w, h in 0..1, `dataset.shapes` (n, 2)
    the images' width and height, `model` (or `model.module`) ends in the head.
    """
    head = getattr(model, "module", model).model[-1]
    rng = np.random.default_rng(0)
    check = judge_anchors(head, dataset.labels, np.asarray(dataset.shapes)[:, ::-1], imgsz, thr=thr, rng=rng)
    for warning in check.warnings:
        LOGGER.warning(warning)
    LOGGER.info("\n".join(check.messages))
    if check.changed:
        write_anchors(head, check.anchors)


def check_anchor_order(m: Any) -> None:
    """Turn the levels of a head's anchors (in pixels) around, in place, where the coarsest grid has the smallest."""
    sizes = m.anchors.prod(-1).mean(-1).view(-1)
    if (sizes[-1] - sizes[0]).sign() != (m.stride[-1] - m.stride[0]).sign():
        m.anchors[:] = m.anchors.flip(0)


# -------------------------------------------------------------------------------------------------------------- search


def kmeans_anchors(
    wh: np.ndarray, n: int, imgsz: int, thr: float, generations: int, rng: np.random.Generator
) -> np.ndarray:
    """`n` anchors (n, 2) in pixels for label sizes `wh` (m, 2), small to large: k-means, then a random search.

    k-means minimises squared distance, which is not what decides whether an anchor may answer, so random changes that
    raise the mean of 1 / factor over the labels within `thr` follow. Same `rng`, same result.

    Raises:
        UserError: no label has a side of 2 pixels.
    """
    wh = wh[(wh >= USABLE_PX).any(1) & (wh > 0).all(1)]
    if not len(wh):
        raise UserError(f"no label reaches {USABLE_PX} pixels at {imgsz}: raise --imgsz, or check the label files.")
    if len(wh) > MAX_BOXES:
        wh = wh[rng.choice(len(wh), MAX_BOXES, replace=False)]
    if len(np.unique(wh, axis=0)) > n:
        spread = wh.std(0)
        spread = np.where(spread > 0, spread, 1.0)  # all equally wide or high
        centres = _kmeans(wh / spread, n, rng) * spread
    else:  # fewer kinds of labels than anchors: scatter anchors around them
        centres = wh[rng.integers(len(wh), size=n)] * rng.uniform(0.5, 2.0, (n, 2))
    anchors = _mutate(np.clip(centres, USABLE_PX, imgsz), wh, thr, generations, rng)
    return anchors[anchors.prod(1).argsort(kind="stable")]


def _kmeans(points: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (n, 2) of the best of several runs of Lloyd's algorithm from k-means++ seeds."""
    best, best_cost = points[:n], np.inf
    for _ in range(RESTARTS):
        centres = _seeds(points, n, rng)
        for _ in range(LLOYD_STEPS):
            nearest = _squared_distances(points, centres).argmin(0)
            size = np.bincount(nearest, minlength=n)
            sums = np.stack([np.bincount(nearest, points[:, axis], n) for axis in (0, 1)], 1)
            moved = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], centres)
            if np.abs(moved - centres).max() < SETTLED:
                break
            centres = moved
        cost = _squared_distances(points, centres).min(0).mean()
        if cost < best_cost:
            best, best_cost = centres, cost
    return best


def _seeds(points: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ seeds (n, 2): each a point drawn with probability ~ squared distance to those drawn before
    (Arthur and Vassilvitskii 2007)."""
    centres = points[rng.integers(len(points), size=1)]
    distance = _squared_distances(points, centres)[0]
    while len(centres) < n:
        centre = points[rng.choice(len(points), p=distance / distance.sum())][None]
        distance = np.minimum(distance, _squared_distances(points, centre)[0])
        centres = np.concatenate((centres, centre))
    return centres


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(k, n) from every one of k centres to every one of n points."""
    x, y = np.ascontiguousarray(points.T)
    return np.square(centres[:, :1] - x) + np.square(centres[:, 1:] - y)


def _mutate(anchors: np.ndarray, wh: np.ndarray, thr: float, generations: int, rng: np.random.Generator) -> np.ndarray:
    """Anchors (n, 2) after `generations` rounds, each of which changes every anchor alone and keeps the best.

    YOLOv5 changes all anchors at once and judges them together. What a label gets from the other anchors does not
    depend on the changed one, so n changes apart cost one judgement too.
    """
    log_wh, log_thr = np.log(wh).astype(np.float32), math.log(thr)

    def scores(candidates: np.ndarray) -> np.ndarray:  # (n, 2) -> (n, m): 1 / factor, or 0 where it is out of reach
        ratio = _log_ratio(log_wh, np.log(candidates).astype(np.float32))
        return np.exp(-ratio) * (ratio < log_thr)

    def best_without_each(rows: np.ndarray) -> np.ndarray:  # (n, m) -> (n, m)
        return np.stack([np.delete(rows, i, 0).max(0, initial=0) for i in range(len(rows))])

    rows = scores(anchors)
    others, best = best_without_each(rows), rows.max(0).mean()
    for _ in range(generations):
        # how far is itself random, so that small and large steps both occur; some sides stay
        step = rng.normal(size=anchors.shape) * rng.uniform(size=(len(anchors), 1)) * STEP
        factor = np.clip(1 + step * (rng.uniform(size=anchors.shape) < 0.9), 0.3, 3.0)
        candidates = np.maximum(anchors * factor, USABLE_PX)
        changed = scores(candidates)
        qualities = np.maximum(changed, others).mean(1)
        winner = qualities.argmax()
        if qualities[winner] > best:
            best, rows[winner] = qualities[winner], changed[winner]
            anchors = np.where(np.arange(len(anchors))[:, None] == winner, candidates, anchors)
            others = best_without_each(rows)
    return anchors
