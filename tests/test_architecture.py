"""The repository keeps the house rules of `tests/house.py`, and the rules find what they forbid.

Everything but `tests/` is read with `ast`; nothing is imported except in subprocesses that watch what importing does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.house import (
    LAYER_BLIND,
    LONG_FILES,
    LONG_FUNCTIONS,
    ROOT,
    ROWS,
    RULES,
    TOP_ROW,
    layer_blind_rule,
    layer_names,
    snippet,
    sources,
    too_long,
)

HEAVY = ("torch", "torchvision", "cv2", "numpy", "matplotlib", "PIL", "pandas", "thop", "tqdm")


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps_the_rule(rule: str) -> None:
    found = [violation for source in sources() for violation in RULES[rule](source)]
    assert not found, "\n" + "\n".join(map(str, sorted(found)))


def test_the_rules_read_the_whole_repository() -> None:
    paths = {source.path for source in sources()}
    assert {"train.py", "val.py", "detect.py", "models/common.py", "models/yolo.py", "utils/config.py"} <= paths
    assert not any(path.startswith("tests/") for path in paths)


def test_train_and_val_name_no_layer() -> None:
    layers = layer_names()
    assert {"Conv", "C3", "SPPF", "Concat", "SE"} <= layers
    scripts = [source for source in sources() if source.path in LAYER_BLIND]
    assert len(scripts) == len(LAYER_BLIND)
    found = [violation for source in scripts for violation in layer_blind_rule(source, layers)]
    assert not found, "\n" + "\n".join(map(str, found))


def test_every_exception_to_the_lengths_is_still_needed() -> None:
    needed = {name for source in sources() for name, _ in too_long(source)}
    assert {*LONG_FILES, *LONG_FUNCTIONS} <= needed
    assert all(len(reason) > 10 for reason in (*LONG_FILES.values(), *LONG_FUNCTIONS.values()))


@pytest.mark.parametrize("script", ["train.py", "val.py", "detect.py"])
def test_help_answers_without_loading_torch(script: str) -> None:
    probe = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--weights" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "LOADED []"


IMPORT_PROBE = """
import json, logging, os, random, signal, sys, warnings
import cv2, numpy, torch, torchvision, yaml, tqdm, PIL.Image, PIL.ImageFont
import matplotlib, matplotlib.pyplot, concurrent.futures, multiprocessing.pool
import torch.utils.data, torch.optim, torch.nn.functional

def state():
    return {
        "environment": dict(os.environ), "cwd": os.getcwd(), "sys.path": list(sys.path),
        "torch threads": torch.get_num_threads(), "interop threads": torch.get_num_interop_threads(),
        "cv2 threads": cv2.getNumThreads(), "dtype": str(torch.get_default_dtype()),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "numpy printing": str(numpy.get_printoptions()), "torch seed": torch.initial_seed(),
        "torch random": torch.get_rng_state().tolist()[:32], "python random": hash(random.getstate()),
        "numpy random": numpy.random.get_state()[1][:16].tolist(),
        "root handlers": len(logging.getLogger().handlers), "root level": logging.getLogger().level,
        "warnings": len(warnings.filters), "interrupt": str(signal.getsignal(signal.SIGINT)),
        "matplotlib": str(dict(matplotlib.rcParams)),
    }

events = []
WATCHED = {"socket.connect", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename", "os.system", "os.putenv"}

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if watching and (event in WATCHED or writes):
        events.append(f"{event} {arguments!r}"[:200])

watching = False
sys.addaudithook(watch)
for folder, names in json.loads(sys.argv[1]):
    sys.path.insert(0, folder)
    events.clear()
    before = state()
    watching = True
    for name in names:
        __import__(name)
    watching = False
    after = state()
    print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "events": events}))
"""


@pytest.fixture(scope="module")
def effects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a fresh Python printed: a JSON line on importing all our files, then on importing one with side effects."""
    folder = tmp_path_factory.mktemp("loud")
    (folder / "loud.py").write_text(
        "import os, torch\nos.environ['LOUD'] = '1'\ntorch.set_num_threads(3)\ntorch.manual_seed(1)\n"
        "open('written.txt', 'w').close()\nprint('hello')\n",
        encoding="utf-8",
    )
    ours = [source.module for source in sources() if source.module.split(".")[0] != TOP_ROW]
    groups = json.dumps([[str(ROOT), ours], [str(folder), ["loud"]]])
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", IMPORT_PROBE, groups]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_importing_any_file_has_no_effect(effects: list[str]) -> None:
    assert json.loads(effects[0]) == {"changed": [], "events": []}  # the first line: nothing was printed before it


def test_the_import_probe_sees_effects(effects: list[str]) -> None:
    printed, result = effects[1:]
    loud = json.loads(result)
    assert {"environment", "torch threads", "torch seed"} <= set(loud["changed"])
    assert any("written.txt" in event for event in loud["events"])
    assert printed == "hello"


BAD_SNIPPETS = [
    ("imports", "from models.common import Conv\n", "utils/boxes.py"),
    ("imports", "import models\n", "utils/loss.py"),
    ("imports", "def late():\n    from models.yolo import Model\n", "utils/engine.py"),
    ("imports", "from utils import dataloaders\n", "utils/boxes.py"),
    ("imports", "from utils.engine import evaluate\n", "models/yolo.py"),
    ("imports", "from models.gates.transfer import transfer\n", "models/checkpoints/files.py"),
    ("imports", "import train\n", "utils/engine.py"),
    ("imports", "from val import run\n", "train.py"),
    ("imports", "import importlib\nimportlib.import_module('models.yolo')\n", "utils/boxes.py"),
    ("imports", "x = 1\n", "utils/misc.py"),
    ("third_party", "import matplotlib.pyplot as plt\n", "utils/metrics.py"),
    ("third_party", "def draw():\n    from matplotlib import pyplot\n", "train.py"),
    ("third_party", "import numpy\n", "models/common.py"),
    ("bans", "eval('1')\n", "train.py"),
    ("bans", "run = eval\n", "train.py"),
    ("bans", "exec('x = 1')\n", "train.py"),
    ("bans", "__import__('os')\n", "train.py"),
    ("bans", "import builtins\nbuiltins.eval('1')\n", "train.py"),
    ("bans", "from utils.boxes import *\n", "train.py"),
    ("bans", "import numpy as np\nnp.load('x', allow_pickle=False)\n", "train.py"),
    ("bans", "import subprocess\nsubprocess.run('ls', shell=True)\n", "train.py"),
    ("bans", "import torch\ntorch.load('x')\n", "train.py"),
    ("bans", "import torch\ntorch.load('x', weights_only=False)\n", "train.py"),
    ("bans", "from torch import load\n", "train.py"),
    ("bans", "import pickle\npickle.loads(b'')\n", "train.py"),
    ("bans", "from pickle import loads\n", "train.py"),
    ("bans", "import yaml\nyaml.load('a', yaml.Loader)\n", "train.py"),
    ("bans", "import yaml\nyaml.load('a', Loader=yaml.UnsafeLoader)\n", "train.py"),
    ("bans", "try:\n    x = 1\nexcept:\n    pass\n", "train.py"),
    ("bans", "def f():\n    global x\n    x = 1\n", "train.py"),
    ("bans", "def f():\n    raise NotImplementedError\n", "train.py"),
    ("bans", "def f():\n    raise NotImplementedError('later')\n", "train.py"),
    ("top_level", "import torch\ntorch.set_num_threads(1)\n", "utils/runtime.py"),
    ("top_level", "for i in range(3):\n    print(i)\n", "utils/runtime.py"),
    ("sys_path", "import sys\nsys.path.insert(0, '.')\n", "models/yolo.py"),
    ("sys_path", "import sys\nif __name__ == '__main__':\n    sys.path.append('.')\n", "utils/plots.py"),
    ("state", "CACHE = {}\ndef f(x):\n    CACHE[x] = 1\n", "utils/labels.py"),
    ("state", "SEEN: list[int] = []\ndef f(x):\n    SEEN.append(x)\n", "utils/labels.py"),
    ("length", "def f():\n" + "    x = 1\n" * 60, "train.py"),
    ("length", "x = 1\n" * 601, "train.py"),
]


@pytest.mark.parametrize(("rule", "text", "path"), BAD_SNIPPETS)
def test_a_rule_finds_what_it_forbids(rule: str, text: str, path: str) -> None:
    found = list(RULES[rule](snippet(text, path)))
    assert found and all(violation.path == path and violation.line >= 1 for violation in found)


GOOD_SNIPPETS = [
    ("imports", "from utils.boxes import box_iou\nfrom models.checkpoints.files import read\n", "train.py"),
    ("imports", "import torch\nfrom models.common import Conv\n", "models/yolo.py"),
    ("imports", "from train import run\n", "benchmarks/bench_train.py"),
    ("third_party", "import math\nimport torch\nfrom torch import nn\n", "models/common.py"),
    ("bans", "import torch\nmodel.eval()\ntorch.load('x', weights_only=True)\n", "train.py"),
    ("bans", "import subprocess\nsubprocess.run(['ls'])\nyaml.load(text, Loader=LineLoader)\n", "train.py"),
    ("top_level", '"""Text."""\nimport os\nX = 1\nif __name__ == "__main__":\n    print(X)\n', "train.py"),
    ("sys_path", "import sys\nif __name__ == '__main__':\n    sys.path.insert(0, '.')\n", "models/yolo.py"),
    ("state", "def f(x):\n    CACHE = {}\n    CACHE[x] = 1\n", "utils/labels.py"),
    ("state", "NAMES = {}\ndef f(NAMES):\n    NAMES['a'] = 1\n", "utils/labels.py"),
    ("length", "def f():\n" + "    x = 1\n" * 59, "train.py"),
]


@pytest.mark.parametrize(("rule", "text", "path"), GOOD_SNIPPETS)
def test_a_rule_lets_good_code_pass(rule: str, text: str, path: str) -> None:
    assert not list(RULES[rule](snippet(text, path)))


def test_layer_names_are_found_in_names_imports_and_strings() -> None:
    layers = {"SE", "Conv"}
    for text in ("import models.common as c\nc.SE(1)\n", "from models.common import Conv\n", "kind == 'SE'\n"):
        assert list(layer_blind_rule(snippet(text, "train.py"), layers))
    assert not list(layer_blind_rule(snippet("x = 'uses SE layers'\n", "train.py"), layers))


# --- the page that describes all this ---------------------------------------------------------------------------------


def architecture() -> str:
    return (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_every_file_has_a_line_in_the_architecture_and_the_other_way_round() -> None:
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", architecture(), flags=re.MULTILINE))
    real = {source.path for source in sources()}
    real -= {path for path in real if path.endswith("__init__.py") or path.startswith(f"{TOP_ROW}/")}
    assert listed == real


def test_the_architecture_shows_the_import_table_that_is_checked() -> None:
    real = {source.module for source in sources()}
    rows = {row: [module for module in modules if module in real] for row, modules in ROWS.items()}
    expected = {row: modules for row, modules in rows.items() if modules}
    block = re.search(r"```\n(values .*?)```", architecture(), flags=re.DOTALL)
    assert block
    shown: dict[str, list[str]] = {}
    for word in block[1].split():
        if word in ROWS:
            shown[word] = []
        else:
            shown[list(shown)[-1]].append(word)
    assert shown == expected
