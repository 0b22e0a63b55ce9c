"""YAML with line numbers, dataset and hyper-parameter files, command-line options."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.config import (
    ROOT,
    ArgumentParser,
    UserError,
    check_hyp,
    check_minimum,
    find_file,
    options_from,
    owned,
    read_hyp,
    read_yaml,
)


def write(folder: Path, text: str, name: str = "some.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_of_nested_keys_are_kept(tmp_path: Path) -> None:
    file = read_yaml(write(tmp_path, "# comment\nnames:\n  0: a\n  1: b\nrows:\n- [-1, 1, Conv, [64]]\n"))
    assert file.where("names", 1).endswith("some.yaml:4")
    assert file.where("rows", 0, 3).endswith("some.yaml:6")
    assert file.where("rows", 7).endswith("some.yaml:5")  # nearest parent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "some.yaml:2: 'a' is given twice (first on line 1)"),
        ("a: [1\nb: 2\n", "some.yaml:2: not valid YAML"),
        ("- 1\n", "expected `key: value` lines, found a list"),
        ("", "found nothing"),
        ("a: !!python/object/apply:os.system ['true']\n", "some.yaml:1: the tag "),
        ("[1]: 2\n", "some.yaml:1:"),
    ],
)
def test_a_broken_yaml_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_yaml(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_that_explode_are_refused(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    with pytest.raises(UserError, match="aliases expand"):
        read_yaml(write(tmp_path, text))


def test_a_file_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "gbk.yaml"
    path.write_bytes("a: 1\nb: 汽车\n".encode("gbk"))
    with pytest.raises(UserError, match=r"gbk.yaml:2: not UTF-8"):
        read_yaml(path)


def test_a_bare_name_is_found_below_data() -> None:
    assert find_file("coco128.yaml") == ROOT / "data" / "coco128.yaml"
    assert find_file("hyp.scratch-low.yaml") == ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"


def test_a_misspelt_file_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'coco128.yaml'\?"):
        find_file("coco182.yaml")


def test_a_file_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a file ending in .yaml or .yml"):
        find_file(write(tmp_path, "", "data.txt"), suffixes=(".yaml", ".yml"))


@dataclass
class Owner:
    lr0: float = field(default=0.01, metadata={"min": 0.0, "max": 1.0})
    fliplr: float = 0.5


def test_hyp_is_completed_with_defaults_and_handed_out(tmp_path: Path) -> None:
    hyp = check_hyp(read_hyp(write(tmp_path, "lr0: 1e-3\n")), [Owner])
    assert owned(Owner, hyp) == Owner(lr0=0.001, fliplr=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr0: 0.1\nfliprl: 1\n", "some.yaml:2: unknown key 'fliprl'. Did you mean 'fliplr'?"),
        ("lr0: 3\n", "some.yaml:1: 'lr0' is 3, expected 0 to 1"),
        ("lr0: fast\n", "some.yaml:1: 'lr0' must be a number, found 'fast'"),
        ("lr0: .nan\n", "must be a number"),
        ("lr0: true\n", "must be a number"),
    ],
)
def test_a_wrong_hyper_parameter_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_hyp(read_hyp(write(tmp_path, text)), [Owner])
    assert message in str(caught.value)


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="some.py")
    made.add_argument("--imgsz", "--img", type=int, default=640, help="size")
    made.add_argument("--optimizer", choices=["SGD", "Adam"], default="SGD", help="which")
    return made


def test_flags_may_be_abbreviated() -> None:
    assert parser().parse_args(["--im", "320", "--opt", "Adam"]).imgsz == 320


def test_an_unknown_flag_gets_a_suggestion_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--imgzs", "320"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--imgzs" in error
    assert "Did you mean '--imgsz'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("script", ["models/transfer.py", "models/insert.py", "models/yolo.py", "train.py"])
def test_the_help_line_names_the_script_as_it_was_called(script: str, tmp_path: Path) -> None:
    for folder in (ROOT, tmp_path):
        typed = os.path.relpath(ROOT / script, folder)
        words = [sys.executable, typed, "--weigths", "a.pt"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2 and done.stderr.endswith(f" See `python {typed} --help`.\n"), done.stderr
        assert re.search(r"[.?] See `python", done.stderr) and done.stderr.count("\n") == 1


def test_an_unknown_keyword_is_an_error_as_an_unknown_flag_is() -> None:
    assert options_from(parser(), {"imgsz": 320}).imgsz == 320
    with pytest.raises(UserError, match=r"unknown option 'imgzs'. Did you mean 'imgsz'\?"):
        options_from(parser(), {"imgzs": 320})
    with pytest.raises(UserError, match="expected one of SGD, Adam"):
        options_from(parser(), {"optimizer": "Lion"})


def every_kind() -> ArgumentParser:
    made = parser()
    made.add_argument("--conf-thres", type=float, default=0.25)
    made.add_argument("--classes", nargs="+", type=int, default=None)
    made.add_argument("--weights", nargs="+", default=["s.pt"])
    made.add_argument("--insert", nargs="+", default=[])
    made.add_argument("--half", action="store_true")
    made.add_argument("--cache", nargs="?", const="ram", default=None)
    made.add_argument("--level", type=int, choices=(0, 1), default=0)
    for name in ("--name", "--data", "--hyp", "--source", "--device"):
        made.add_argument(name, default="x")
    return made


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("imgsz", "320", 320),
        ("imgsz", np.int64(320), 320),
        ("conf_thres", "0.3", 0.3),
        ("conf_thres", 1, 1.0),
        ("classes", 0, [0]),
        ("classes", "0", [0]),
        ("classes", (0, "2"), [0, 2]),
        ("classes", range(3), [0, 1, 2]),
        ("classes", None, None),
        ("weights", "a.pt", ["a.pt"]),
        ("weights", Path("a.pt"), ["a.pt"]),
        ("insert", [], []),
        ("half", True, True),
        ("cache", True, "ram"),
        ("cache", False, None),
        ("cache", "disk", "disk"),
        ("level", "1", 1),
        ("optimizer", "Adam", "Adam"),
        ("device", 0, "0"),
        ("device", ("any", "object"), ("any", "object")),
        ("source", 0, "0"),
        ("source", ["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"]),
        ("data", {"train": "a"}, {"train": "a"}),
        ("data", Path("d") / "a.yaml", str(Path("d") / "a.yaml")),
        ("hyp", {"lr0": 0.1}, {"lr0": 0.1}),
        ("name", 7, "7"),
    ],
    ids=str,
)
def test_a_keyword_is_converted_as_its_flag_would_be(key: str, value: Any, wanted: Any) -> None:
    found = getattr(options_from(every_kind(), {key: value}), key)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("imgsz", "big", "imgsz='big': expected a whole number."),
        ("imgsz", 640.0, "imgsz=640.0: expected a whole number."),
        ("imgsz", True, "imgsz=True: expected a whole number."),
        ("imgsz", None, "imgsz=None: expected a whole number."),
        ("imgsz", [320], r"imgsz=[320]: expected a whole number."),
        ("conf_thres", "high", "conf_thres='high': expected a number."),
        ("classes", "0 2", "classes='0 2': expected a whole number."),
        ("classes", [0, "cat"], "classes='cat': expected a whole number."),
        ("classes", [], "classes=[]: expected at least one."),
        ("half", "false", "half='false': expected True or False."),
        ("half", 1, "half=1: expected True or False."),
        ("level", 2, "level=2: expected one of 0, 1."),
        ("name", {"a": 1}, "name={'a': 1}: expected text."),
        ("name", np.zeros((9, 9)), "name=array("),
    ],
    ids=str,
)
def test_a_value_its_flag_would_refuse_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        options_from(every_kind(), {key: value})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_only_what_a_command_line_names_is_given() -> None:
    given = every_kind().given(["--img", "640", "--half", "--class", "1", "2", "--cache"])
    assert given == {"imgsz": 640, "half": True, "classes": [1, 2], "cache": "ram"}
    assert vars(options_from(every_kind(), given)) == vars(
        every_kind().parse_args(["--img", "640", "--half", "--class", "1", "2", "--cache"])
    )


def test_an_option_below_its_minimum_is_named() -> None:
    options = parser().parse_args(["--imgsz", "-5"])
    with pytest.raises(UserError, match=r"--imgsz -5: expected 1 or more\."):
        check_minimum(options, imgsz=1)
    check_minimum(options, imgsz=-5)


# ------------------------------------------------------------------------------------------------------- shipped YAMLs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scratch-low", {"lr0": 0.01, "lrf": 0.01, "cls": 0.5, "obj": 1.0, "scale": 0.5, "mixup": 0.0}),
        ("scratch-med", {"lrf": 0.1, "cls": 0.3, "obj": 0.7, "scale": 0.9, "mixup": 0.1, "copy_paste": 0.0}),
        ("scratch-high", {"lrf": 0.1, "cls": 0.3, "scale": 0.9, "mixup": 0.1, "copy_paste": 0.1}),
        ("no-augmentation", {"hsv_h": 0, "translate": 0, "scale": 0, "fliplr": 0.0, "mosaic": 0.0}),
        ("VOC", {"lr0": 0.00334, "anchors": 3.412, "anchor_t": 3.3744, "mosaic": 0.85834}),
        ("Objects365", {"lr0": 0.00258, "anchors": 3.2, "warmup_epochs": 1.33, "hsv_s": 0.704}),
        ("shapes", {"nominal_batch": 16}),
    ],
)
def test_shipped_hyper_parameters_are_yolov5s(name: str, expected: dict[str, float]) -> None:
    hyp = read_hyp(f"hyp.{name}.yaml")
    assert {key: hyp[key] for key in expected} == expected
    assert len(hyp) == 28 + (name in ("VOC", "Objects365", "shapes"))
