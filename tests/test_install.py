"""What `pip install` brings: modules, YAMLs and the command, used from another folder, and nothing written to it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from conftest import REPOSITORY, TinyDataset

from tests.house import ROWS, sources
from tests.test_train import micro_network


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, built from a copy of this repository without a network."""
    folder = tmp_path_factory.mktemp("installed")
    skipped = shutil.ignore_patterns(".*", "runs", "datasets", "build", "*.egg-info", "__pycache__", "venv", "tests")
    shutil.copytree(REPOSITORY, folder / "source", ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "source"]
    for command in (build, [*pip, "install", "--no-deps", "--no-index", "--target", folder / "site"]):
        wheels = [] if command is build else list(folder.glob("*.whl"))
        done = subprocess.run([*map(str, command), *map(str, wheels)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "source")
    return folder / "site"


def call(installed: Path, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, with the installed copy on the path and the repository not."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("YOLOV5_DATASETS_DIR", "YOLOV5_WEIGHTS_DIR"):
        environment.pop(name, None)
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}


def test_every_module_and_every_data_file_is_named_for_installation() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    top = {source.module for source in sources() if "/" not in source.path}
    assert top <= {*settings["py-modules"]} <= top | {*ROWS["scripts"]}
    packages = {source.path.split("/")[0] for source in sources() if "/" in source.path} - {"benchmarks"}
    assert {f"{name}*" for name in packages} | {"data*"} == {*settings["packages"]["find"]["include"]}


@pytest.mark.slow
def test_an_installed_copy_has_every_file_that_is_looked_for(installed: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    wanted = {
        name
        for name in listed
        if re.match(
            r"(data|models|utils|experiments)/.*\.(py|yaml|jpg)$|\w+\.py$|\w+-shapes\.pt$|yolov5n-shapes\.pt$", name
        )
    }
    assert len(wanted) > 60 and wanted <= files_below(installed), wanted - files_below(installed)


@pytest.mark.slow
def test_an_installed_copy_trains_validates_and_detects_from_another_folder(
    installed: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    before = files_below(installed)
    program = [sys.executable, installed / "bin/yolov5-attention"]
    quick = "--img 64 --workers 0 --noplots --device cpu"
    micro_network(tmp_path)
    lines = (
        f"train --weights= --cfg micro.yaml --data {tiny_dataset.yaml} --epochs 1 --batch 4 {quick}",
        f"val --weights runs/train/exp/weights/best.pt --data {tiny_dataset.yaml} {quick}",
        "detect --weights yolov5n-shapes.pt --img 64 --device cpu",
    )
    for line in lines:
        done = call(installed, tmp_path, *program, *shlex.split(line))
        assert done.returncode == 0, done.stderr
    expected = {"runs/train/exp/weights/best.pt", "runs/train/exp/results.csv"}
    assert expected | {f"runs/detect/exp/shapes{number}.jpg" for number in (1, 2, 3)} <= files_below(tmp_path)
    assert (tmp_path / "runs/val/exp").is_dir()
    resumed = call(installed, tmp_path, *program, "train", "--resume")
    assert resumed.returncode == 2 and "runs/train/exp/weights/last.pt: a finished run" in resumed.stderr
    wrong = call(installed, tmp_path, *program, "val", "--wieghts", "x.pt")
    assert wrong.returncode == 2 and "See `yolov5-attention val --help`." in wrong.stderr
    script = (
        "import train, val, detect, ablate, hubconf, yolov5_attention, models.yolo, utils.loss, experiments.report\n"
        "from utils.config import ROOT, find_file\n"
        "print(ROOT, find_file('hyp.shapes.yaml'), find_file('yolov5s-se-last.yaml'), find_file('yolov5-p6.yaml'))"
    )
    done = call(installed, tmp_path, sys.executable, "-c", script)
    assert done.returncode == 0 and all(word.startswith(str(installed)) for word in done.stdout.split()), done
    assert files_below(installed) == before


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_commands_help_names_the_commands_and_loads_no_torch(tmp_path: Path) -> None:
    probe = (
        "import sys, yolov5_attention\nsys.argv = ['yolov5-attention', *sys.argv[1:]]\n"
        "try:\n    yolov5_attention.main()\n"
        "finally:\n    assert not {'torch', 'numpy', 'cv2'} & set(sys.modules)"
    )
    for words, expected in (
        ([], ["train", "val", "detect", "ablate", "insert", "transfer", "inspect", "usage:"]),
        (["--help"], ["train", "usage:"]),
        (["train", "--help"], ["usage: yolov5-attention train", "--skip-bad"]),
        (["inspect", "--help"], ["usage: yolov5-attention inspect"]),
    ):
        done = call(REPOSITORY, tmp_path, sys.executable, "-c", probe, *words)
        assert done.returncode == 0 and all(word in done.stdout for word in expected), done


def test_an_unknown_command_ends_with_2_and_a_suggestion(tmp_path: Path) -> None:
    done = call(REPOSITORY, tmp_path, sys.executable, "-m", "yolov5_attention", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: there is no command 'trian'. Did you mean 'train'? See `yolov5-attention --help`.\n")


# --------------------------------------------------------------------------------------------------------------- docker


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (REPOSITORY / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_is_for_the_cpu_and_takes_another_index_for_cuda() -> None:
    kinds = [kind for kind, _ in instructions()]
    assert kinds[0] == "FROM" and set(kinds) <= {"FROM", "RUN", "ARG", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert ("ARG", "TORCH=https://download.pytorch.org/whl/cpu") in instructions()
    runs = [words for kind, words in instructions() if kind == "RUN"]
    for words in runs:
        assert subprocess.run(["sh", "-n", "-c", words]).returncode == 0, words
    torch = next(words for words in runs if '--index-url "$TORCH"' in words)
    wanted = [line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if line.startswith("torch")]
    assert all(f'"{requirement}"' in torch for requirement in wanted)
    assert kinds.index("ARG") < [words for _, words in instructions()].index(torch)


def test_what_an_image_is_built_from_is_not_ignored() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    needed = {"pyproject.toml", "requirements.txt", "LICENSE", "data", "models", "utils", "experiments", "train.py"}
    assert not needed & set(ignored) and ignored.index("*.pt") < ignored.index("!yolov5n-shapes.pt")
