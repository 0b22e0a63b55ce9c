"""What the READMEs tell people to type is understood by the scripts, names files that exist, and is alike in both."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = (*READMES, "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/experiments.md")
OFFICIAL = re.compile(r"yolov5[nsmlx]6?\.pt")  # fetched by name
OWN_FILES = ("best.pt", "best.onnx", "data/fruit.yaml")  # the reader's own, in the examples
RUN_FILES = re.compile(r"runs/(train|val|detect)/\w+/weights/(best|last)\.pt")  # written by an earlier command


@dataclass(frozen=True)
class Command:
    """A `python some/script.py ...` line of a document."""

    document: str
    words: tuple[str, ...]

    @property
    def script(self) -> str:
        return self.words[1]

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def fenced(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines(document: str) -> list[str]:
    """Every shell command of a document: those in fenced blocks and those in backticks that start with python."""
    text = read(document)
    lines: list[str] = []
    for language, content in fenced(text):
        if language in {"bash", "sh", "shell"}:
            lines += re.sub(r"\\\n\s*", " ", content).splitlines()
    unfenced = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:python|make|pip) [^`]+)`", unfenced)
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def commands(document: str) -> list[Command]:
    """The commands that run one of our scripts."""
    found = []
    for line in shell_lines(document):
        words = shlex.split(line, comments=True)
        if len(words) > 1 and words[0] == "python" and words[1].endswith(".py"):
            found.append(Command(document, tuple(words)))
    return found


def parser_of(script: str) -> argparse.ArgumentParser | None:
    """The script's parser, or None where it is made only when the file runs."""
    if "def build_parser(" not in read(script):
        return None
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).build_parser()


def parsed(command: Command) -> argparse.Namespace:
    """The options of a command; of a script without `build_parser` only --cfg, after its --help knew all flags."""
    parser, words = parser_of(command.script), list(command.words[2:])
    if parser is not None:
        return parser.parse_args(words)
    shown = subprocess.run([sys.executable, command.script, "--help"], cwd=ROOT, capture_output=True, text=True)
    unknown = [word for word in words if word.startswith("-") and word not in re.split(r"[\s,\[\]]+", shown.stdout)]
    assert not unknown, f"{command} uses {unknown}"
    return argparse.Namespace(cfg=words[words.index("--cfg") + 1] if "--cfg" in words else "")


def ablation(command: Command) -> argparse.Namespace:
    """The recipe of an ablation, once its arms are understood and those that insert gates can be made."""
    import ablate
    import train
    from experiments.trials import arms_of, seeds_of
    from models.gates.insert import insert, parse

    own, rest = ablate.build_parser().parse_known_args(command.words[2:])
    assert seeds_of(own.seeds), command
    for arm in arms_of(own.cfg, own.arm, train.build_parser()):
        if arm.options.get("insert"):
            insert(arm.options["cfg"], [parse(spec) for spec in arm.options["insert"]])
    return train.build_parser().parse_args(rest)


def exists(name: str, folders: tuple[str, ...]) -> bool:
    return any((ROOT / folder / name).exists() for folder in folders)


def missing_files(options: argparse.Namespace) -> list[str]:
    """Values of flags that name files which neither exist nor are made, fetched or written by the reader."""
    weights = getattr(options, "weights", None) or []
    weights = [weights] if isinstance(weights, str) else weights
    missing = [
        name
        for name in weights
        if not (OFFICIAL.fullmatch(name) or RUN_FILES.fullmatch(name) or name in OWN_FILES or exists(name, (".",)))
    ]
    data = getattr(options, "data", None)
    if data and data not in OWN_FILES and not exists(data, (".", "data")):
        missing.append(data)
    hyp = getattr(options, "hyp", None)
    if hyp and not exists(hyp, (".", "data/hyps")):
        missing.append(hyp)
    source = getattr(options, "source", None)
    if source and not source.isdigit() and not exists(source, (".",)):
        missing.append(source)
    return missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_understood_and_names_files_that_exist(document: str) -> None:
    from models.graph import read as read_network

    for command in commands(document):
        assert (ROOT / command.script).is_file(), command
        try:
            options = parsed(command) if command.script != "ablate.py" else ablation(command)
        except SystemExit:
            pytest.fail(f"{command} is not understood")
        assert not missing_files(options), f"{command} names {missing_files(options)}"
        if getattr(options, "cfg", ""):
            assert read_network(options.cfg).rows, command


def test_the_readmes_have_commands_for_each_script() -> None:
    for document in READMES:
        scripts = {command.script for command in commands(document)}
        assert {"train.py", "val.py", "detect.py", "models/yolo.py"} <= scripts


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (shell_lines(document) for document in READMES)
    assert english == chinese
    assert len(english) > 20


def test_both_readmes_have_the_same_numbers_in_their_tables() -> None:
    def numbers(document: str) -> list[str]:
        rows = [line for line in read(document).splitlines() if line.startswith("|")]
        return re.findall(r"(?<![\w.])\d[\d,.]*\d", "\n".join(rows))

    assert numbers(READMES[0]) == numbers(READMES[1])


def test_the_first_two_commands_set_everything_up() -> None:
    blocks = [content for language, content in fenced(read("README.md")) if language == "bash"]
    demo, tests = blocks[:2]
    for block in (demo, tests):
        assert "-m venv .venv" in block and "pip install" in block
    assert "python train.py" in demo and "se-last" in demo and "python detect.py" in demo
    assert tests.rstrip().endswith("python -m pytest")


def test_the_make_targets_the_documents_name_exist() -> None:
    targets = set(re.findall(r"^(\w+):", read("Makefile"), flags=re.MULTILINE))
    named = {line.split()[1] for document in DOCUMENTS for line in shell_lines(document) if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_make_demo_runs_the_first_command_of_the_readme() -> None:
    makefile = re.sub(r"\\\n\s*", "", read("Makefile"))
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert recipe
    made = [shlex.split(line)[1:] for line in recipe[1].splitlines() if line.startswith("\t$(PY)")]
    readme = [list(command.words[1:]) for command in commands("README.md")[:2]]
    assert made == readme


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_lead_to_files(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(document)):
        if not target.startswith("https://"):
            assert ((ROOT / document).parent / target).is_file(), f"{document} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_figure_is_left_to_be_measured(document: str) -> None:
    assert not re.findall(r"@@\w+@@", read(document))


def test_the_dataset_example_is_a_valid_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.data import load_dataset

    for document in READMES:
        example = next(content for language, content in fenced(read(document)) if language == "yaml")
        (tmp_path / "fruit.yaml").write_text(example, encoding="utf-8")
        (tmp_path / "fruit").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path)
        spec = load_dataset("fruit.yaml")
        assert spec.names == {0: "apple", 1: "pear"}
        assert spec.train == (tmp_path.resolve() / "fruit/images/train",)


def test_the_gate_of_ones_own_is_the_one_that_is_tested() -> None:
    from tests.test_attention import OWN_GATE

    for document in READMES:
        gate, _ = [content for language, content in fenced(read(document)) if language == "python"]
        assert gate.strip() == OWN_GATE.strip()


@pytest.mark.slow
def test_the_hubs_example_runs_from_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="the example shows pandas()")
    _, english = [content for language, content in fenced(read(READMES[0])) if language == "python"]
    _, chinese = [content for language, content in fenced(read(READMES[1])) if language == "python"]
    assert english == chinese
    photo = ROOT / "data/images/shapes1.jpg"
    code = english.replace('"path/to/this/folder"', repr(str(ROOT)))
    code = code.replace('"best.pt"', repr(str(ROOT / "yolov5n-shapes.pt"))).replace('"photo.jpg"', repr(str(photo)))
    code = code.replace("array", "__import__('numpy').zeros((64, 96, 3), 'uint8')")
    code = code.replace('"https://ultralytics.com/images/zidane.jpg"', repr(str(photo)))  # no network here
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "image 1/3: 320x320 " in done.stdout and len(list((tmp_path / "runs/detect/exp").iterdir())) == 3


def test_the_readmes_name_every_flag_that_is_refused() -> None:
    from train import NOT_OFFERED

    companions = {"--evolve_population", "--resume_evolve"}
    for document in READMES:
        words = set(re.split(r"[`\s]+", read(document)))
        missing = {flag for flag, *_ in NOT_OFFERED} - companions - words
        assert not missing, f"{document} does not name {missing}"
