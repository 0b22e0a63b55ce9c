"""Damaged YAML: networks (read, and built without memory), datasets, hyper-parameters, and any text at all."""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch

from models import graph
from models.yolo import build_model
from tests.fuzz.damage import WORDS, damage_text
from tests.fuzz.harness import Target
from utils.augmentations import TRANSFORMS
from utils.autoanchor import AnchorHyp
from utils.config import ROOT, check_hyp, read_hyp, read_yaml
from utils.data import load_dataset
from utils.loss import LossHyp
from utils.optim import OptimHyp

TOKENS = (
    *WORDS, "- ", "? ", ": ", ", ", "\n", "\n", "\n  ", "\n    ", "{", "}", "[", "]", "a", "b: ", "&a ", "*a",
    "<<: *a", "|\n  ", ">-\n  ", "!!int ", "!!float ", "!!set ", "!!omap ", "!!timestamp ", "!!binary ", "!!null ",
    "!x ", "%YAML 1.2\n", "---\n", "...\n", "# ", "1:1:1", "190:20:30.15", "0b1", "0o7", "1_000", ".inf", ".nan",
    "2305843009213693951", '"\\UFFFFFFFF"', '"\\ud800"',
)  # fmt: skip


ARGUMENTS = (
    "0", "1", "2", "3", "-1", "-7", "64", "65536", "1000000000", "9223372036854775808", "0.5", "-0.5", "1e999",
    ".nan", "None", "True", "nc", "anchors", "[]", "[1]", "[[1]]", "[2, [[1]]]", "[1, 2, 3]", "{a: 1}", "'x'",
    "no * 9", "nc / 0", "'nearest'", "1:1", "~", "2001-01-01", "[[[10, 13]]]", "-2", "[-1, 2]",
)  # fmt: skip


@cache
def _texts(pattern: str) -> tuple[str, ...]:
    return tuple(file.read_text(encoding="utf-8") for file in sorted(ROOT.glob(pattern)))


def _damaged(rng: np.random.Generator, folder: Path, pattern: str) -> Path:
    texts = _texts(pattern)
    file = folder / "damaged.yaml"
    text = texts[int(rng.integers(0, len(texts)))]
    text = _other_argument(rng, text) if rng.random() < 0.6 and "backbone" in text else damage_text(rng, text)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return file


def _other_argument(rng: np.random.Generator, text: str) -> str:
    """A network's text with one or two words of its rows replaced: a number, a layer, an argument."""
    for _ in range(int(rng.integers(1, 3))):
        words = list(re.finditer(r"(?<=[\[, ])[-\w.]+(?=[],])", text))
        word = words[int(rng.integers(0, len(words)))]
        layers = list(graph.layer_classes())
        choices = layers if rng.random() < 0.4 else ARGUMENTS
        text = text[: word.start()] + choices[int(rng.integers(0, len(choices)))] + text[word.end() :]
    return text


def _network(rng: np.random.Generator, folder: Path) -> object:
    logging.disable(logging.WARNING)
    network = graph.read(_damaged(rng, folder, "models/**/yolo*.yaml"))
    with torch.device("meta"):
        return build_model(network)


def _dataset(rng: np.random.Generator, folder: Path) -> object:
    return load_dataset(_damaged(rng, folder, "data/*.yaml"))


def _hyp(rng: np.random.Generator, folder: Path) -> object:
    return check_hyp(read_hyp(_damaged(rng, folder, "data/hyps/*.yaml")), (OptimHyp, LossHyp, AnchorHyp, *TRANSFORMS))


def _soup(rng: np.random.Generator, folder: Path) -> object:
    """Tokens of YAML in any order, some of them often."""
    few = rng.choice(len(TOKENS), int(rng.integers(1, 12)))
    order = rng.choice(few, int(2 ** rng.uniform(0, 14 if rng.random() < 0.1 else 6)))
    file = folder / "soup.yaml"
    file.write_text("".join(TOKENS[i] for i in order), encoding="utf-8")
    return read_yaml(file)


TARGETS = (
    Target("model-yaml", _network),
    Target("dataset-yaml", _dataset),
    Target("hyp-yaml", _hyp),
    Target("yaml-text", _soup),
)
