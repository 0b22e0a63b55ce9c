"""Ways to damage bytes and text."""

from __future__ import annotations

import numpy as np

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    "", "~", "-1", "0", "1e999", "nan", "-inf", "1" * 5000, "2001-99-99", "0x", "null", "true", "[", "{", "}]", "&a",
    "*a", "!!python/object:os.system", "<<", "\x00", "\x1b[31m", "\u202e", "\ufeff", "~nosuchuser", "../" * 40,
    "a" * 5000,
    "9" * 20, "1.5", "é", "\U0001f600", "- " * 50, "'", '"', "%", "\t", "http://[::1", "nn.MaxPool2d", "[[1]]",
    "2**9**9",
)  # fmt: skip


def damage_bytes(rng: np.random.Generator, data: bytes, *, most: int = 6) -> bytes:
    """`data` after one to `most` random changes: bits, bytes, numbers, cuts, repeats, moves, noise."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, most + 1))):
        place = int(rng.integers(0, len(out) + 1))
        length = int(min(2 ** rng.uniform(0, 12), max(len(out), 1)))
        kind = rng.integers(0, 8)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and place < len(out):
            out[place] = int(rng.integers(0, 256))
        elif kind == 2:
            width, order = int(rng.choice([1, 2, 4, 8])), ("little", "big")[int(rng.integers(0, 2))]
            number = NUMBERS[int(rng.integers(0, len(NUMBERS)))] % 2 ** (8 * width)
            out[place : place + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
        elif kind == 3:
            del out[place : place + length]
        elif kind == 4:
            out[place:place] = out[place : place + length] * int(rng.integers(1, 4))
        elif kind == 5:
            start = int(rng.integers(0, len(out) + 1))
            out[place : place + length] = out[start : start + length]
        elif kind == 6:
            out[place:place] = rng.bytes(min(length, 64))
        else:
            del out[place:]
    return bytes(out)


def damage_text(rng: np.random.Generator, text: str, *, most: int = 6) -> str:
    """`text` after one to `most` random changes: words, lines and characters replaced, doubled, moved, removed."""
    lines = text.split("\n")
    for _ in range(int(rng.integers(1, most + 1))):
        place = int(rng.integers(0, max(len(lines), 1)))
        line = lines[place] if lines else ""
        word = WORDS[int(rng.integers(0, len(WORDS)))]
        kind = rng.integers(0, 7)
        if kind == 0:
            parts = line.split(" ")
            parts[int(rng.integers(0, len(parts)))] = word
            lines[place : place + 1] = [" ".join(parts)]
        elif kind == 1:
            at = int(rng.integers(0, len(line) + 1))
            lines[place : place + 1] = [line[:at] + word + line[at + int(rng.integers(0, 4)) :]]
        elif kind == 2:
            lines[place : place + 1] = [line] * int(rng.integers(2, 5))
        elif kind == 3:
            del lines[place : place + int(rng.integers(1, 4))]
        elif kind == 4 and lines:
            lines.insert(int(rng.integers(0, len(lines) + 1)), lines.pop(place))
        elif kind == 5:
            lines[place : place + 1] = [" " * int(rng.integers(0, 5)) + line.lstrip()]
        else:
            at = int(rng.integers(0, len(line) + 1))
            lines[place : place + 1] = [line[:at] + chr(int(rng.integers(1, 0x2FF))) + line[at + 1 :]]
    return "\n".join(lines)
