"""YAML and names that are not what they claim: one short line each, in little time and memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models import graph
from models.checkpoints.files import read
from models.yolo import build_model
from tests.bounds import bounded
from utils.config import MAX_MESSAGE, MAX_YAML_BYTES, ArgumentParser, UserError, find_file, read_hyp, read_yaml
from utils.data import load_dataset
from utils.downloads import fetch_archive, find_weights

PRIME = 2**61 - 1  # Python's hash of an integer is its remainder
SECONDS, MEGABYTES = 10.0, 200.0


def write(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def refusal(action: Callable[[], object]) -> str:
    """The line that the action ends with."""
    with bounded(SECONDS, MEGABYTES), pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert line.isprintable() and len(line) <= MAX_MESSAGE
    return line


# ------------------------------------------------------------------------------------------------------------- messages


def test_a_message_is_one_short_line_of_printable_characters() -> None:
    assert str(UserError("a\nb\x1b[31m\u202e\ud800\u2028é汽🙂")) == "a\\nb\\x1b[31m\\u202e\\ud800\\u2028é汽🙂"
    long = str(UserError(f"first{'x' * 10_000_000}last"))
    assert len(long) <= MAX_MESSAGE and long.startswith("first") and long.endswith("last")
    assert len(str(UserError("\0" * 10_000))) <= MAX_MESSAGE
    assert str(UserError(str(UserError("a\nb" * 400)))) == str(UserError("a\nb" * 400)), "twice is the same as once"


def test_a_flag_with_control_characters_is_answered_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ArgumentParser(prog="some.py").parse_args(["--a\nb\x1b[2J", "x" * 5000])
    shown = capsys.readouterr().err.removesuffix("\n")
    assert shown.isprintable() and len(shown) < 600


# ------------------------------------------------------------------------------------------------------------ any YAML

BROKEN = {
    "a NUL": ("a: 1\nb: \0\n", "some.yaml:2: YAML does not allow the character '\\x00'"),
    "an escape": ("a: 1\n\nb: \x1b[31m\n", "some.yaml:3: YAML does not allow the character '\\x1b'"),
    "an impossible date": (
        "a: 1\nb: 2001-99-99\n",
        "some.yaml:2: '2001-99-99' is no timestamp (month must be in 1..12)",
    ),
    "5,000 digits": (f"a: {'9' * 5000}\n", "some.yaml:1: a number of 5,000 characters"),
    "base 60": (f"a: 1{':1' * 100_000}\n", "some.yaml:1: a number of 200,001 characters"),
    "base 60 with a point": (f"a: 1{':1' * 5000}.0\n", "some.yaml:1: a number of 10,003 characters"),
    "no integer": ("a: !!int x\n", "some.yaml:1: 'x' is no int"),
    "an empty integer": ("a: !!int ''\n", "some.yaml:1: '' is no int"),
    "no boolean": ("a: !!bool x\n", "some.yaml:1: 'x' is no bool"),
    "no time": ("a: !!timestamp x\n", "some.yaml:1: 'x' is no timestamp"),
    "a word as a list for a key": ("!!omap x: 1\n", "some.yaml:1: a key must be a plain word or number"),
    "a value tag": ("a: =\n", "some.yaml:1: not valid YAML"),
    "beyond Unicode": ('a: 1\nb: "\\UFFFFFFFF"\n', "some.yaml:2: not valid YAML"),
    "a version": (f"%YAML 1.{'1' * 6000}\n---\na: 1\n", "some.yaml:1: not valid YAML"),
    "a deep list": (f"a: {'[' * 100_000}", "some.yaml:1: not valid YAML: more than 50,000 values, or values nested"),
    "a deep mapping": ("".join(f"{' ' * i}a:\n" for i in range(500)), "nested deeper than 50"),
    "deep keys": ("? " * 100_000, "nested deeper than 50"),
    "a list that holds itself": ("a: &a [*a]\n", "contain themselves"),
    "a mapping that merges itself": ("a: &a {<<: *a}\n", "contain themselves"),
    "merges that double": (
        "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
        "its aliases expand to more than 50,000 values",
    ),
    "a merge of a number": ("a: 1\nb: {<<: 3}\n", "some.yaml:2: `<<` takes a mapping"),
    "a long tag": (f"a: !{'x' * 100_000} 1\n", "is refused; write plain values."),
    "a long key": (f"{'x' * 1000}: 1\n{'x' * 1000}: 1\n", "is given twice"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_yaml_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(lambda: read_yaml(write(tmp_path, text)))


LARGE = {
    "a list of a million": "a:\n" + "- 0\n" * 1_000_000,
    "a list of 100,000": "a:\n" + "- 0\n" * 100_000,
    "a flow list": f"a: [{'1,' * 200_000}]",
    "keys": "a: {" + "".join(f"k{i}: , " for i in range(50_000)) + "}",
    "aliases": "b: &a 1\na: [" + "*a," * 150_000 + "]",
    "directives": "%F\n" * 170_000 + "--- 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE.keys())
def test_a_yaml_with_more_than_files_need_is_refused_quickly(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    line = refusal(lambda: read_yaml(path))
    assert (
        "larger than 512 KB" in line if len(text) > MAX_YAML_BYTES else "more than" in line or "expected `key" in line
    )


@pytest.mark.slow
def test_the_slowest_yaml_that_is_read_takes_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, "a: [" + "".join(f"&a{i} 1," for i in range(40_000)) + "]")
    with bounded(SECONDS, MEGABYTES):
        assert len(read_yaml(path).data["a"]) == 40_000


@pytest.mark.parametrize(
    "key",
    [lambda i: f"{i * PRIME}", lambda i: f"{i * PRIME}.0", lambda i: f"0x{i * PRIME:x}", lambda i: f"{i << 40}"],
    ids=["integers", "floats", "hexadecimal", "equal low bits"],
)
def test_keys_with_chosen_hashes_are_refused(tmp_path: Path, key: Callable[[int], str]) -> None:
    path = write(tmp_path, "names:\n" + "".join(f"  {key(i)}: 1\n" for i in range(200, 2_200)))
    assert re.search(
        r"some.yaml:1002: .* is one more of too many keys that are numbers", refusal(lambda: read_yaml(path))
    )


def test_as_many_class_names_as_any_dataset_has_are_read(tmp_path: Path) -> None:
    names = "".join(f"  {i}: some ordinary name {i}\n" for i in range(13_204))
    spec = load_dataset(write(tmp_path, f"train: a\nval: b\nnames:\n{names}"))
    assert spec.num_classes == 13_204 and spec.file.where("names", 13_203).endswith(":13207")


def test_a_merge_takes_what_is_missing_and_keeps_what_is_there(tmp_path: Path) -> None:
    text = "base: &b {x: 1, y: 2}\nmore: &m {y: 3, z: 4}\na: {<<: [*b, *m], x: 5}\n"
    file = read_yaml(write(tmp_path, text))
    assert file.data["a"] == {"x": 5, "y": 2, "z": 4}
    assert file.where("a", "y").endswith("some.yaml:1") and file.where("a", "x").endswith("some.yaml:3")


# -------------------------------------------------------------------------------------------------------- network rows

NETWORK = """nc: 2
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - ROW
head:
  - [[1], 1, Detect, [nc, anchors]]
"""
ROWS = (
    "[-1, 1, nn.MaxPool2d, [2, [[1]]]]",
    "[-1, 1, nn.MaxPool2d, [[[2]]]]",
    "[-1, 1, nn.MaxPool2d, [0]]",
    "[-1, 1, nn.Conv2d, [8, 8, 0]]",
    "[-1, 1, nn.Conv2d, [8, [8], 3]]",
    "[-1, 1, nn.Conv2d, [8, -8, 3]]",
    "[-1, 1, nn.Conv2d, [8, 1e999, 3]]",
    "[-1, 1, nn.Conv2d, [8, 9223372036854775808, 3]]",
    "[-1, 1, nn.Upsample, [None, [1, 2], nearest]]",
    "[-1, 1, nn.Upsample, [None, 1e-300]]",
    "[-1, 1, nn.Upsample, [null, 0, '?']]",
    "[-1, 1, nn.LSTM, [8, 8, 1000000000]]",
    "[-1, 1, nn.TransformerEncoderLayer, [8, 1]]",
    "[-1, 1, nn.AdaptiveAvgPool2d, [[1000000, 1000000]]]",
    "[-1, 1, nn.Upsample, [[100000, 100000]]]",
    "[-1, 1, nn.ZeroPad2d, [1000000000]]",
    "[-1, 1, Contract, [0.5]]",
    "[-1, 1, Contract, [[2]]]",
    "[-1, 1, Contract, [100000]]",
    "[-1, 1, Expand, [0]]",
    "[-1, 1, Concat, [[1]]]",
    "[-1, 1, Concat, [7]]",
    "[-1, 1000, C3, [8]]\n" + "  - [-1, 1000, C3, [8]]\n" * 3,
    "[-1, 1, SE, [8, [2]]]",
    "[-1, 1, SE, [8, 2, nan]]",
    "[-1, 1, EMA, [8, 0]]",
    "[-1, 1, SPP, [8, 5]]",
    "[-1, 1, SPP, [8, [a]]]",
    "[-1, 1, Conv, [8, 3, 2, 2001-01-01]]",
    "[-1, 1, Conv, [8, {a: 1}]]",
    "[-1, 1, Detect, [nc, 9223372036854775807]]",
    "[-1, 1, Detect, [nc, [[1, .inf]]]]",
    "[-1, 1, nn.Linear, [8, 8]]",
    "[-1, 1, nn.Module, []]",
    "[-1, 1, nn.Threshold, []]",
    "[-1, 1, nn.CosineSimilarity, []]",
    "[-1, 1, nn.Flatten, []]",
    "[~, 1, Conv, [8]]",
    "[[], 1, Conv, [8]]",
    "[[[-1]], 1, Conv, [8]]",
    "[-1, 99999999999999999999, Conv, [8]]",
    "[-1, 1, [Conv], [8]]",
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:60])
def test_a_row_that_cannot_be_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    line = refusal(lambda: build_model(write(tmp_path, NETWORK.replace("ROW", row))))
    assert re.search(r"some\.yaml:(4|7|8|9|10|11): |some\.yaml:12: layer 5", line), line


def test_the_rows_of_these_tests_differ_from_a_network_that_is_built(tmp_path: Path) -> None:
    model = build_model(write(tmp_path, NETWORK.replace("ROW", "[-1, 1, nn.MaxPool2d, [2, 2]]")))
    assert model.stride.tolist() == [4.0]


def test_a_map_of_unknown_size_is_measured_without_memory(tmp_path: Path) -> None:
    path = write(tmp_path, NETWORK.replace("ROW", "[-1, 1, nn.Upsample, [[6400, 6400]]]"))
    with bounded(SECONDS, MEGABYTES):
        assert build_model(path).stride.tolist() == pytest.approx([0.02])


KEYS = {
    "nc": "nc: 99999999999999999999",
    "depth_multiple": "depth_multiple: .nan",
    "anchors": "anchors: 1000000000",
    "pairs": "anchors: [[1, 1e300]]",
    "ch": "ch: true",
    "activation": "activation: nn.MultiheadAttention(1000000, 1)",
    "arguments": "activation: nn.PReLU(-1)",
    "nesting": f"activation: nn.SiLU({'-' * 100_000}1)",
}


@pytest.mark.parametrize("line", KEYS.values(), ids=KEYS.keys())
def test_a_value_that_no_network_has_is_named(tmp_path: Path, line: str) -> None:
    key = line.split(":")[0]
    text = NETWORK.replace("ROW", "[-1, 1, Conv, [8]]")
    text = re.sub(rf"(?m)^{key}: .*$", line, text) if f"\n{key}:" in f"\n{text}" else f"{text}{line}\n"
    assert key in refusal(lambda: build_model(write(tmp_path, text)))


def test_a_size_that_no_channel_count_fits_is_rounded_up(tmp_path: Path) -> None:
    text = NETWORK.replace("ROW", "[-1, 1, Conv, [8]]") + "channel_multiple: 0.5\n"
    with torch.device("meta"):
        assert graph.read(write(tmp_path, text)).rows[0].channels == 8


# --------------------------------------------------------------------------------------------------------------- names

NAMES = {
    "300 characters": "a" * 300,
    "300 characters in a folder": f"b/{'a' * 300}",
    "5,000 characters": "a/" * 2500,
    "a NUL": "a\0b",
    "half a character": "a\ud800",
    "an unknown user": "~nosuchuser/x",
    "escapes": "a\x1b[2J\nb",
}
READERS: dict[str, tuple[Callable[[str], object], str]] = {
    "--weights": (find_weights, ".pt"),
    "a checkpoint": (read, ".pt"),
    "--cfg": (graph.read, ".yaml"),
    "--data": (load_dataset, ".yaml"),
    "--hyp": (read_hyp, ".yaml"),
    "any": (find_file, ""),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize(("reader", "suffix"), READERS.values(), ids=READERS.keys())
def test_a_name_that_no_file_has_gets_one_line(reader: Callable[[str], object], suffix: str, name: str) -> None:
    refusal(lambda: reader(name + suffix))


@pytest.mark.parametrize("name", [name for name in NAMES.values() if "\x1b" not in name], ids=lambda n: repr(n[:12]))
@pytest.mark.parametrize("key", ["path", "train"])
def test_a_dataset_folder_that_cannot_be_gets_one_line(key: str, name: str) -> None:
    spec = {"path": "", "train": "a", "val": "b", "names": ["x"], key: name}
    assert "no file can have this name" in (line := refusal(lambda: load_dataset(spec))) or "there is no user" in line


def test_a_folder_that_may_not_be_searched_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)
    monkeypatch.setattr(Path, "exists", refused)
    assert "no such weights file" in refusal(lambda: find_weights("secret/x.pt"))
    assert "no such file" in refusal(lambda: read("secret/x.pt"))


ADDRESSES = [
    "https://[::1/a",
    "https://a:b/a",
    "https://a:99999/a",
    f"https://{'a' * 300}/a",
    "https://a..b/a",
    "https://a/\0",
]


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda a: repr(a[:20]))
def test_an_address_that_cannot_be_gets_one_line(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(lambda: find_weights(f"{address}.pt"))
    refusal(lambda: find_weights(address.replace("https", "http") + ".pt"))
    refusal(lambda: fetch_archive(f"{address}.zip", tmp_path))
    refusal(lambda: find_file(f"{address}.yaml"))
