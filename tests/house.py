"""The house rules as data, and as functions over syntax trees that yield what breaks them."""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A file imports from lower rows, or from its left within its own row.
ROWS: dict[str, tuple[str, ...]] = {
    "values": (
        "utils.boxes",
        "utils.config",
        "utils.files",
        "utils.distributed",
        "utils.forks",
        "utils.runtime",
        "utils.names",
        "utils.progress",
        "utils.downloads",
        "models.recompute",
        "models.common",
        "models.attention",
    ),
    "data": (
        "utils.shapes",
        "utils.data",
        "utils.samples",
        "utils.images",
        "utils.labels",
        "utils.augmentations",
        "utils.dataloaders",
        "utils.device_cache",
        "utils.capture",
        "utils.sources",
    ),
    "model": (
        "models.grammar",
        "models.pasted",
        "models.inside",
        "models.graph",
        "models.measure",
        "models.base",
        "models.augment",
        "models.yolo",
        "models.checkpoints.unpickle",
        "models.checkpoints.archive",
        "models.checkpoints.files",
        "models.gates.insert",
        "models.gates.start",
        "models.gates.alignment",
        "models.gates.copying",
        "models.gates.transfer",
        "models.checkpoints.upstream",
        "models.backends.base",
        "models.backends.pytorch",
        "models.backends.torchscript",
        "models.backends.onnx",
        "models.backends.openvino",
        "models.backends.tensorrt",
        "models.backends.coreml",
        "models.backends.yolov5",
        "models.backends.files",
        "models.backends.multi",
        "models.backends",
    ),
    "judging": ("utils.nms", "utils.loss", "utils.metrics", "utils.autoanchor", "utils.tasks"),
    "running": (
        "utils.optim",
        "utils.inference",
        "utils.engine",
        "utils.training",
        "utils.recorder",
        "utils.drawing",
        "utils.plots",
        "models.predictor",
        "models.gates.inspect",
    ),
    "experiments": (
        "experiments.statistics",
        "experiments.trials",
        "experiments.pools",
        "experiments.sizes",
        "experiments.registration",
        "experiments.data",
        "experiments.cells",
        "experiments.page",
        "experiments.report",
        "experiments.publish",
    ),
    "faces": (
        "models.experimental",
        "utils.activations",
        "utils.autobatch",
        "utils.datasets",
        "utils.general",
        "utils.torch_utils",
        "hubconf",
    ),
    "scripts": (
        "train",
        "val",
        "detect",
        "export",
        "ablate",
        "models.insert",
        "models.transfer",
        "models.inspect_gates",
        "yolov5_attention",
    ),
}
TOP_ROW = "benchmarks"  # these scripts time everything else and nobody imports them

LAYER_FILES = ("models/common.py", "models/attention.py")
LAYER_BLIND = ("train.py", "val.py")  # they must work for any network, so they name no layer
# A layer file stays readable on its own, and drawing stays in one place.
ONLY_IMPORTER = {"matplotlib": ("utils.plots",)}
ONLY_IMPORTS = {"models.common": ("torch",), "models.attention": ("torch",)}
UNSAFE_YAML_LOADERS = {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader"}
MUTATORS = {"append", "add", "update", "setdefault", "pop", "popitem", "extend", "clear", "insert", "remove", "discard"}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
# name -> why it may be longer; an entry that is no longer needed fails its test
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the repository, dotted module name and syntax tree."""

    path: str
    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)


@dataclass(frozen=True, order=True)
class Violation:
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


Rule = Callable[[Source], Iterator[Violation]]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def sources() -> list[Source]:
    """Every Python file of the repository that is not a test; hidden folders and what runs wrote are left out."""
    skipped = {"tests", "runs", "build", "venv", "node_modules"}
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).parts
        if not any(part in skipped or part.startswith(".") for part in parts[:-1]):
            path = "/".join(parts)
            found.append(Source(path, module_name(path), file.read_text(encoding="utf-8")))
    return found


def snippet(text: str, path: str = "utils/boxes.py") -> Source:
    return Source(path, module_name(path), textwrap.dedent(text))


# --- who imports whom -------------------------------------------------------------------------------------------------


def imported_names(source: Source) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, wherever it stands; `from a import b` yields both `a` and `a.b`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".")[: -node.level]
                base = ".".join([*package, base] if base else package)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def place(module: str) -> tuple[int, int] | None:
    """(row, position in the row) of a module of ours, or None where the table does not know it."""
    if module.split(".")[0] == TOP_ROW:
        return len(ROWS), 0
    for row, modules in enumerate(ROWS.values()):
        if module in modules:
            return row, modules.index(module)
    return None


def is_ours(name: str) -> bool:
    scripts = ROWS["scripts"]
    return name in scripts or name.split(".")[0] in {"utils", "models", "experiments", "hubconf", TOP_ROW, *scripts}


def import_rule(source: Source) -> Iterator[Violation]:
    if source.path.endswith("__init__.py"):
        return
    here = place(source.module)
    if here is None:
        yield Violation(source.path, 1, "has no place in ROWS: find its subject's file, or give it a row with a reason")
        return
    for line, name in imported_names(source):
        if not is_ours(name):
            continue
        face = source.module in ROWS["faces"]  # YOLOv5's own file names: utils.general there knows networks
        if source.module.startswith("utils.") and not face and name.split(".")[0] == "models":
            yield Violation(source.path, line, f"utils/ never imports models/, but this imports {name}")
        there = place(name)
        if there is not None and there > here:
            yield Violation(source.path, line, f"{source.module} may not import {name}: only lower rows or to its left")


def third_party_rule(source: Source) -> Iterator[Violation]:
    for line, name in imported_names(source):
        package = name.split(".")[0]
        allowed = ONLY_IMPORTER.get(package)
        if allowed and source.module not in allowed:
            yield Violation(source.path, line, f"only {', '.join(allowed)} may import {package}")
        only = ONLY_IMPORTS.get(source.module)
        if only and package not in (*only, "models", "utils", "experiments") and package not in sys.stdlib_module_names:
            yield Violation(source.path, line, f"{source.module} may import only {', '.join(only)}, not {package}")


# --- what is banned ---------------------------------------------------------------------------------------------------


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def banned_call(node: ast.Call) -> str | None:
    """What is wrong with this call, or None."""
    name = ast.unparse(node.func)
    if _keyword(node, "allow_pickle") is not None:
        return "allow_pickle: arrays never need to run a pickle"
    shell = _keyword(node, "shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        return "shell=True: pass a list of arguments"
    if name == "torch.load" and not _is_true(_keyword(node, "weights_only")):
        return "torch.load without weights_only=True runs code from the file"
    if name in {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "os.system"}:
        return f"{name} runs whatever the data says"
    loader = _keyword(node, "Loader")
    if name == "yaml.load" and (loader is None or ast.unparse(loader).split(".")[-1] in UNSAFE_YAML_LOADERS):
        return "yaml.load without a safe loader builds arbitrary objects"
    if name == "yaml.unsafe_load" or name == "yaml.full_load":
        return f"{name} builds more than plain data"
    return None


def ban_rule(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        message = None
        if isinstance(node, ast.Name) and node.id in {"eval", "exec", "__import__"}:
            message = f"{node.id}: names come from tables, literals from a grammar"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"builtins.eval", "builtins.exec"}:
            message = f"{ast.unparse(node)}: names come from tables, literals from a grammar"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            message = "import *: name what you use"
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in {a.name for a in node.names}:
            message = "from torch import load hides torch.load from this test"
        elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
            names = {alias.name for alias in node.names} & {"load", "loads"}
            message = f"pickle.{min(names)} runs whatever the data says" if names else None
        elif isinstance(node, ast.Global):
            message = "global: pass the thing"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            message = "bare except also swallows Ctrl-C: name the exception"
        elif isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            message = "NotImplementedError: a feature is real or absent"
        elif isinstance(node, ast.Call):
            message = banned_call(node)
        if message:
            yield Violation(source.path, node.lineno, message)


def layer_names() -> set[str]:
    """Names of the layer classes, read from the source."""
    found = set()
    for path in LAYER_FILES:
        file = ROOT / path
        if file.exists():
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return found


def layer_blind_rule(source: Source, layers: set[str]) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        names: set[str] = set()
        if isinstance(node, ast.Name):
            names = {node.id}
        elif isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = {node.value}
        for name in names & layers:
            yield Violation(source.path, node.lineno, f"names the layer {name}; scripts work for any network")


# --- what an import may do --------------------------------------------------------------------------------------------


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {
        "__name__ == '__main__'",
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    }


def top_level_rule(source: Source) -> Iterator[Violation]:
    """Module level holds imports, definitions and constants: nothing that happens because the file was imported."""
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in source.tree.body:
        if isinstance(node, quiet) or _is_main_guard(node):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Try) and all(isinstance(inner, quiet) for inner in node.body):
            continue  # an optional package
        yield Violation(source.path, node.lineno, "runs when the file is imported: move it into a function")


def sys_path_rule(source: Source) -> Iterator[Violation]:
    """Only a script inside models/ may touch sys.path, and only under its __main__ guard."""
    guarded: set[int] = set()
    if source.path.startswith(("models/", f"{TOP_ROW}/")):
        for node in source.tree.body:
            if _is_main_guard(node):
                guarded |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(source.tree):
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path.")
        if is_call and id(node) not in guarded:
            yield Violation(source.path, node.lineno, "changes sys.path outside the __main__ guard of models/")


def _module_constants(tree: ast.Module) -> set[str]:
    """Names assigned at module level; a logger is the standard library's own shared object and may be set up."""
    names = set()
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "logging.getLogger":
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _changed_names(function: ast.AST) -> Iterator[tuple[int, str]]:
    """Names whose object is changed in place inside a function, and the line."""
    for node in ast.walk(function):
        changed: Iterable[ast.expr] = ()
        if isinstance(node, (ast.Assign, ast.Delete)):
            changed = [target.value for target in node.targets if isinstance(target, (ast.Subscript, ast.Attribute))]
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, (ast.Subscript, ast.Attribute)):
            changed = [node.target.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = [node.func.value]
        yield from ((node.lineno, value.id) for value in changed if isinstance(value, ast.Name))


def state_rule(source: Source) -> Iterator[Violation]:
    """A module-level object that functions change is a setting everybody shares without knowing it."""
    tree = source.tree
    constants = _module_constants(tree)
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        arguments = function.args
        local = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        local |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for line, name in _changed_names(function):
            if name in constants - local:
                yield Violation(source.path, line, f"{function.name} changes the module's {name}: pass the thing")


# --- how long things may be -------------------------------------------------------------------------------------------


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Qualified name and node of every function and method."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{prefix}{child.name}", child
            name = f"{prefix}{child.name}." if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else prefix
            yield from walk(child, name)

    yield from walk(tree, "")


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(source: Source) -> Iterator[tuple[str, Violation]]:
    """(name for the exception tables, violation) of a file or function over its limit."""
    lines = source.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield source.path, Violation(source.path, 1, f"{lines} lines, at most {MAX_FILE_LINES}")
    for name, node in functions(source.tree):
        count = function_lines(node)
        if count > MAX_FUNCTION_LINES:
            message = f"{name} has {count} lines, at most {MAX_FUNCTION_LINES}"
            yield f"{source.path}:{name}", Violation(source.path, node.lineno, message)


def length_rule(source: Source) -> Iterator[Violation]:
    for name, violation in too_long(source):
        if name not in LONG_FILES and name not in LONG_FUNCTIONS:
            yield violation


RULES: dict[str, Rule] = {
    "imports": import_rule,
    "third_party": third_party_rule,
    "bans": ban_rule,
    "top_level": top_level_rule,
    "sys_path": sys_path_rule,
    "state": state_rule,
    "length": length_rule,
}
