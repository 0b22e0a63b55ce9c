"""Label files, damaged or made of extremes, through the parser."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.fuzz.damage import WORDS, damage_bytes, damage_text
from tests.fuzz.harness import Target
from utils.config import UserError
from utils.labels import parse_label_file

TOKENS = (
    *WORDS, "1e400", "1_000", "٠.٥", "０", "0x1p-1", "infinity", "0.", ".5", "+1", "1.0005", "-0.0005", "1e-400",
    "16777216", "0 0.5 0.5 0.2 0.2", "\u00a0", "\u2028", "\x0c", "\x85", "\r", "1e22",
)  # fmt: skip
SOAP = ("0 1 1 1 1\n", "a\n", "0 0 0 ", "0 .5 .5 .5 .5\n", "0 0 0 1 0 1 1\n", "\n", "\0", "1" * 1000, "9 " * 500, "é")


def _row(rng: np.random.Generator) -> str:
    count = 4 if rng.random() < 0.6 else 2 * int(rng.integers(3, 40))
    return " ".join((str(rng.integers(0, 3)), *(f"{value:.4g}" for value in rng.random(count))))


def _case(rng: np.random.Generator, folder: Path) -> object:
    text = "\n".join(_row(rng) for _ in range(int(rng.integers(0, 20))))
    how = rng.random()
    if how < 0.5:
        data = damage_text(rng, text).encode("utf-8", "surrogatepass")
    elif how < 0.7:
        data = damage_bytes(rng, text.encode())
    elif how < 0.95:
        chosen = rng.integers(0, len(TOKENS), int(rng.integers(1, 60)))
        ends = rng.choice([" ", "\n", "\t", "\r\n"], len(chosen))
        data = "".join(TOKENS[i] + end for i, end in zip(chosen, ends)).encode("utf-8", "surrogatepass")
    else:  # much of the same
        soap = SOAP[int(rng.integers(0, len(SOAP)))].encode()
        data = soap * int(2 ** rng.uniform(4, 24) // len(soap) + 1)
    file = folder / "a.txt"
    file.write_bytes(data)
    parsed = parse_label_file(file, None if rng.random() < 0.2 else 3)
    for message in (*parsed.errors, *parsed.notes):
        assert "\n" not in message and len(message) < 500, message[:500]
    labels = parsed.labels
    assert labels.dtype == np.float32 and labels.shape == (len(labels), 5)
    assert np.isfinite(labels).all() and ((labels[:, 1:] >= 0) & (labels[:, 1:] <= 1)).all()
    assert len(parsed.segments) in (0, len(labels))
    if parsed.errors:
        raise UserError(parsed.errors[0])
    return parsed


TARGETS: tuple[Target, ...] = (Target("labels", _case, seconds=15, megabytes=1000),)
