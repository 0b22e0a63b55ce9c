"""The text of a YAML with gates, byte for byte, and the command that writes it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.gates.insert import insert, parse, run, table, write
from models.graph import read
from tests.test_insert import BLOCK, FLOW, after, graph_of, lines, options, small, without_header
from utils import runtime
from utils.config import ROOT, UserError

# --- the text ---------------------------------------------------------------------------------------------------------


def test_only_what_must_change_in_the_text_changes(tmp_path: Path) -> None:
    file = small(tmp_path)
    made = without_header(insert(file, [parse("SE:4@after:C3:1")]))
    expected = BLOCK.replace("# the 2nd\n", "# the 2nd\n  - [-1, 1, SE, [32, 4]]   # 3: channels, reduction\n")
    for old, new in {
        "# 3: the last, 3": "# 4: the last, 3",
        "[-1, 2]": "[-1, 3]",
        "# 6\n": "# 7\n",
        "[6, 3]": "[7, 4]",
    }.items():
        expected = expected.replace(old, new)
    assert made == expected
    assert file.read_text(encoding="utf-8") == BLOCK


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (
            "after:0",
            {
                "  # 0-P1/2\n": "  # 0-P1/2\n   [-1, 1, SE, [16, 4]],  # 1: channels, reduction\n",
                "# 3\n": "# 4\n",
                "[-1, 2]": "[-1, 3]",
                "# 6 (": "# 7 (",
                "[6, 3]": "[7, 4]",
            },
        ),
        (
            "after:3",
            {
                "  # 3\n": "  # 3\n   [-1, 1, SE, [64, 4]],  # 4: channels, reduction\n",
                "# 6 (": "# 7 (",
                "[6, 3]": "[7, 4]",
            },
        ),
        (
            "before:4",
            {
                "  [[-1, 1, nn.": "  [[-1, 1, SE, [64, 4]],  # 4: channels, reduction\n   [-1, 1, nn.",
                "# 6 (": "# 7 (",
                "[6, 3]": "[7, 3]",
            },
        ),
        (
            "before:6",
            {
                "   [-1, 2, C3": "   [-1, 1, SE, [96, 4]],  # 6: channels, reduction\n   [-1, 2, C3",
                "# 6 (": "# 7 (",
                "[6, 3]": "[7, 3]",
            },
        ),
        (
            "at:6",
            {
                " P2\n": " P2\n   [-1, 1, SE, [96, 4]],  # 6: channels, reduction\n",
                "# 6 (": "# 7 (",
                "[6, 3]": "[7, 3]",
            },
        ),
        (
            "after:6",
            {
                "(P2/4)\n": "(P2/4)\n   [-1, 1, SE, [32, 4]],  # 7: channels, reduction\n",
                "[6, 3]": "[7, 3]",
            },
        ),
    ],
)
def test_lists_in_brackets_keep_their_style(tmp_path: Path, place: str, changes: dict[str, str]) -> None:
    text = insert(small(tmp_path, FLOW), [parse(f"SE:4@{place}")])
    expected = FLOW
    for old, new in changes.items():
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert without_header(text) == expected
    assert text.splitlines()[1].startswith("# with SE ")


def test_a_last_row_without_a_comma_gets_one(tmp_path: Path) -> None:
    text = insert(
        small(tmp_path, FLOW, "[64, 3, 2]],  # 3", "[64, 3, 2]]  # 3"), [parse("SE:4@after:3"), parse("ECA@at:4")]
    )
    assert (
        "[64, 3, 2]],  # 3\n   [-1, 1, SE, [64, 4]],  # 4: channels, reduction\n   [-1, 1, ECA, [64]]  # 5: ch" in text
    )


def test_rows_on_one_line_stay_on_it(tmp_path: Path) -> None:
    rows = "backbone: [[-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [32, 3, 2]]]\n"
    rows += "head: [[-1, 1, C3, [32]], [[1, 2], 1, Detect, [nc, 3]]]\n"
    file = small(tmp_path, f"nc: 2\n{rows}")
    text = insert(file, [parse(f"SE:4@{place}") for place in ("after:0", "before:1", "after:1", "before:2")])
    assert text.splitlines()[-2] == (
        "backbone: [[-1, 1, Conv, [16, 3, 2]], [-1, 1, SE, [16, 4]], [-1, 1, SE, [16, 4]], [-1, 1, Conv, [32, 3, 2]], "
        "[-1, 1, SE, [32, 4]]]"
    )
    assert text.splitlines()[-1] == ("head: [[-1, 1, SE, [32, 4]], [-1, 1, C3, [32]], [[4, 6], 1, Detect, [nc, 3]]]")
    assert text.startswith("# with SE after row 0, SE before row 1,") and "nc: 2\n" in text
    json_like = f"{{nc: 2, {rows.replace(chr(10), ', ', 1).strip()}}}"
    assert after(small(tmp_path, json_like), "SE:4@after:1", "SE:4@before:3").rows[-1].sources == (4, 5)


@pytest.mark.parametrize("text", [BLOCK, FLOW])
def test_line_ends_and_a_byte_order_mark_are_kept(tmp_path: Path, text: str) -> None:
    insertions = [parse("SE@after:3"), parse("SE@before:Detect")]
    plain = insert(small(tmp_path, text), insertions)
    windows = small(tmp_path, "\ufeff" + text.replace("\n", "\r\n"))
    assert insert(windows, insertions) == "\ufeff" + plain.replace("\n", "\r\n")
    written = write(windows, insertions, tmp_path / "out.yaml")
    assert written.read_bytes().decode() == "\ufeff" + plain.replace("\n", "\r\n")
    assert len(read(written).rows) == 11


def test_rows_without_numbers_get_no_comment(tmp_path: Path) -> None:
    bare = re.sub(r" +#.*", "", BLOCK)
    assert lines(insert(small(tmp_path, bare), [parse("SE@after:3")]), "SE") == ["  - [-1, 1, SE, [64]]"]


def test_comments_say_what_was_done_and_how_to_do_it_again() -> None:
    text = insert("yolov5s.yaml", [parse("SE:16@before:Detect/1"), parse("SE:16@after:SPPF"), parse("SE:16@at:7")])
    title, first, second, empty, *_ = text.splitlines()
    assert (title, empty) == ("# YOLOv5s, the small network: P3, P4 and P5 outputs", "")
    assert first + second.removeprefix("#  ") == (
        "# with SE before Detect/1, SE after SPPF, SE at row 7; made by: python models/insert.py --cfg yolov5s.yaml "
        "--module SE --args 16 --before Detect/1 --after SPPF --at 7"
    )
    assert len(first) <= 120
    text = insert("yolov5s.yaml", [parse("SE:16@after:SPPF"), parse("ECA:None:2.0@before:Detect/1")])
    _, first, second, *_ = text.splitlines()
    command = (
        "python models/insert.py --cfg yolov5s.yaml --insert SE:16@after:SPPF --insert ECA:None:2.0@before:Detect/1"
    )
    assert (first + second.removeprefix("#  ")).endswith(f"SE after SPPF, ECA before Detect/1; made by: {command}")
    assert lines(text, "ECA") == ["  - [18, 1, ECA, [256, None, 2.0]] # 25: channels, kernel, gain"]


def test_another_size_is_the_same_text_with_its_multiples() -> None:
    text = insert("yolov5x-se-last.yaml", [parse("ECA@before:Detect/1")])
    same = insert("yolov5s-se-last.yaml", [parse("ECA@before:Detect/1")]).replace("s-se-last", "x-se-last")
    assert text == same.replace("multiple: 0.33 ", "multiple: 1.33 ").replace("multiple: 0.50 ", "multiple: 1.25 ")
    assert read(yaml.safe_load(text)).rows[10].channels == 1280


def test_a_network_numbered_wrongly_is_warned_about(tmp_path: Path, said: list[str]) -> None:
    insert(small(tmp_path, BLOCK, "[[6, 3]", "[[5, 3]"), [parse("SE:4@after:0")])
    assert len(said) == 1 and "reads layer 5, a Concat" in said[0]


# --- the command ------------------------------------------------------------------------------------------------------


def test_out_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "my.yaml"
    out.write_text("mine", encoding="utf-8")
    given = options(module="SE", args=["16"], places=["after:SPPF"], out=str(out))
    with pytest.raises(UserError, match=r"is there already\. Choose another name, or add --exist-ok"):
        run(given)
    assert out.read_text(encoding="utf-8") == "mine"
    given.exist_ok = True
    run(given)
    assert out.read_bytes() == (ROOT / "models/yolov5s-se-last.yaml").read_bytes()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to insert: give a gate and a place"),
        ({"module": "SE"}, "--module goes with --after, --before, --at or --inside"),
        ({"places": ["after:SPPF"]}, "--module goes with --after, --before, --at or --inside"),
        ({"insert": ["SE@after:SPPF"], "out": "my.txt"}, "--out my.txt: expected a file ending in .yaml"),
        ({"insert": ["SE@after:SPPF"], "out": "none/my.yaml"}, "none/my.yaml: cannot be written (No such file"),
    ],
)
def test_half_a_command_is_refused(in_tmp: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run(options(**given))
    assert not list(in_tmp.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = small(tmp_path)
    monkeypatch.setattr(runtime.os, "replace", full)
    with pytest.raises(UserError, match=r"small\.yaml: cannot be written \(No space left on device\)"):
        write("yolov5s.yaml", [parse("SE@after:SPPF")], out)
    assert out.read_text(encoding="utf-8") == BLOCK and list(tmp_path.iterdir()) == [out]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "models/insert.py", *arguments]
    return subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_prints_or_writes_the_network_and_nothing_else(tmp_path: Path) -> None:
    file = small(tmp_path, BLOCK, "[[6, 3]", "[[5, 3]")
    done = command("--cfg", str(file), "--module", "SE", "--args", "4", "--before", "3", "--after", "C3:1", "--at", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == insert(file, [parse(f"SE:4@{place}") for place in ("before:3", "after:C3:1", "at:3")])
    assert "a Concat" in done.stderr
    out = tmp_path / "out.yaml"
    done = command("--cfg", str(file), "--insert", "ECA@after:0", "--out", str(out))
    assert (done.returncode, done.stdout) == (0, "") and "ECA after row 0" in done.stderr
    assert read(out).rows[1].module == "ECA"


@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_one_line() -> None:
    done = command("--cfg", "yolov5s.yaml", "--module", "SE", "--after", "C3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: models/yolov5s.yaml: 'C3' is not one row.") and done.stderr.count("\n") == 1
    done = command("--cfg", "yolov5s.yaml", "--list-places")
    assert done.returncode == 0 and done.stdout.splitlines() == table(graph_of("yolov5s.yaml"))


def test_help_answers_without_loading_torch() -> None:
    probe = (
        "import runpy, sys\n"
        "sys.argv = ['models/insert.py', '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--list-places" in done.stdout, done.stderr
