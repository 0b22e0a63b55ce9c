"""Class names in log lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.names import counted, plural


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("person", "persons"),
        ("cross", "crosses"),
        ("bus", "buses"),
        ("wine glass", "wine glasses"),
        ("box", "boxes"),
        ("bench", "benches"),
        ("toothbrush", "toothbrushes"),
        ("berry", "berries"),
        ("toy", "toys"),
        ("mouse", "mouses"),
        ("knife", "knifes"),
        ("scissors", "scissors"),
        ("skis", "skis"),
        ("sheep", "sheep"),
        ("Platelets", "Platelets"),
        ("RBC", "RBCs"),
        ("红绿灯", "红绿灯"),
        ("café", "cafés"),
        ("y", "ys"),
        ("", "s"),
        ("7", "7s"),
    ],
)
def test_plurals_follow_rules(one: str, many: str) -> None:
    assert plural(one) == many


def test_objects_are_counted_by_class() -> None:
    names = {0: "person", 1: "cross", 27: "tie"}
    assert counted(names, np.array([27.0, 1.0, 0.0, 1.0], np.float32)) == "1 person, 2 crosses, 1 tie"
    assert counted(names, torch.tensor([0, 0])) == "2 persons"
    assert counted(names, []) == "(no detections)"
