"""Configuration as data: YAML that remembers its lines, dataset and hyper-parameter files, command-line options.

Everything here needs only PyYAML, so that `--help` and a typing mistake are answered without importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import math
import os
import stat
import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

ROOT = Path(__file__).resolve().parents[1]
# Options of `run(...)` that take more than their text: a dataset or hyper-parameters as a mapping, several sources, a
# torch.device.
PYTHON_ONLY: dict[str, type | tuple[type, ...]] = {
    "data": Mapping,
    "hyp": Mapping,
    "source": (list, tuple),
    "device": object,
}
WORDS = (str, os.PathLike, Real)  # what a word of a command line can stand for
MAX_YAML_NODES = 200_000  # aliases inside aliases grow exponentially; no honest file comes near this
OwnerT = TypeVar("OwnerT")


class UserError(ValueError):
    """A mistake in what the user gave us: the scripts print its one line and exit with code 2."""


def closest(word: object, choices: Iterable[object]) -> str:
    """`" Did you mean 'x'?"` for the most similar choice, or an empty string where nothing is similar."""
    words = [str(choice) for choice in choices]
    same = [choice for choice in words if choice.casefold() == str(word).casefold()]
    matches = same or difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


# ---------------------------------------------------------------------------------------------------------------- YAML


@dataclass(frozen=True)
class YamlFile:
    """A parsed YAML mapping and the 1-based line of every key path, such as `("names", 3)` or `("backbone", 9, 3)`."""

    path: Path
    data: dict[str, Any]
    lines: Mapping[tuple[Hashable, ...], int] = field(default_factory=dict)

    def where(self, *keys: Hashable) -> str:
        """`file:line` of a key path, of its nearest known parent, or just the file."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.lines:
                return f"{display_path(self.path)}:{self.lines[keys[:end]]}"
        return display_path(self.path)


def read_yaml(path: str | Path) -> YamlFile:
    """Read a YAML mapping with the safe schema, keeping line numbers.

    Raises:
        UserError: not there, not UTF-8, not YAML, not a mapping, a key given twice, or aliases that explode.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{display_path(path)}:{line}: not UTF-8 text. Save the file with UTF-8 encoding.") from None
    except OSError as error:
        raise UserError(f"{display_path(path)}: cannot be read ({error.strerror}).") from None
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        lines: dict[tuple[Hashable, ...], int] = {}
        data = _construct(loader, root, (), lines, path, [0]) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{display_path(path)}:{line}: not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{display_path(path)}: not valid YAML: {str(error).splitlines()[0]}.") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{display_path(path)}: expected `key: value` lines, found {found}.")
    return YamlFile(path, data, lines)


def _construct(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    keys: tuple[Hashable, ...],
    lines: dict[tuple[Hashable, ...], int],
    path: Path,
    visited: list[int],
) -> Any:
    visited[0] += 1
    if visited[0] > MAX_YAML_NODES:
        raise UserError(f"{display_path(path)}: its aliases expand to more than {MAX_YAML_NODES:,} values; refused.")
    lines.setdefault(keys, node.start_mark.line + 1)
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UserError(f"{display_path(path)}:{lines[keys]}: the tag '{node.tag}' is refused; write plain values.")
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise UserError(f"{display_path(path)}:{line}: a key must be a plain word or number.")
            if key in mapping:
                first = lines[(*keys, key)]
                raise UserError(f"{display_path(path)}:{line}: '{key}' is given twice (first on line {first}).")
            lines[(*keys, key)] = line
            mapping[key] = _construct(loader, value_node, (*keys, key), lines, path, visited)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, child, (*keys, i), lines, path, visited) for i, child in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def display_path(path: str | Path) -> str:
    """The path relative to the working directory where it lies below it, otherwise as it is."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def find_file(name: str | Path, folders: Iterable[str] = ("data", "models"), suffixes: Iterable[str] = ()) -> Path:
    """The file a bare name such as `coco128.yaml` stands for: as given, below the repository, or inside `folders`.

    Raises:
        UserError: found nowhere (with the most similar name), found twice, or with a suffix that is not in `suffixes`.
    """
    suffixes = tuple(suffixes)
    if suffixes and Path(name).suffix.lower() not in suffixes:
        raise UserError(f"{name}: expected a file ending in {' or '.join(suffixes)}.")
    if str(name).startswith(("http://", "https://")):
        raise UserError(f"{name}: configuration files are not fetched. Download it, look at it, and give its path.")
    for candidate in (Path(name), ROOT / name):
        if candidate.is_file():
            return candidate
    everything = [file for folder in folders for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]
    hits = [file for file in everything if file.parts[-len(Path(name).parts) :] == Path(name).parts]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise UserError(f"{name}: stands for {' and '.join(display_path(hit) for hit in hits)}. Give the whole path.")
    alike = [file.name for file in everything if file.suffix == Path(name).suffix]
    looked = ", ".join(display_path(ROOT / folder) for folder in folders)
    raise UserError(f"{name}: no such file, here or below {looked}.{closest(Path(name).name, alike)}")


# ------------------------------------------------------------------------------------------------------------- dataset


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset YAML with its paths resolved; the paths need not exist yet (they may have to be fetched or drawn)."""

    file: YamlFile
    root: Path
    names: dict[int, str]
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    download: str | None = None  # an https archive
    draw: str | None = None  # "shapes": made by utils.shapes on first use

    @property
    def path(self) -> Path:
        """The YAML file."""
        return self.file.path

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def split(self, task: str) -> tuple[Path, ...]:
        """Folders, lists or images of `train`, `val` or `test`; UserError where the YAML does not name that split."""
        paths: tuple[Path, ...] = {"train": self.train, "val": self.val, "test": self.test}[task]
        if not paths:
            raise UserError(f"{display_path(self.path)}: names no '{task}' images. Add a line `{task}: <folder>`.")
        return paths

    def moved(self, root: Path) -> DatasetSpec:
        """The same dataset below another root."""

        def move(paths: tuple[Path, ...]) -> tuple[Path, ...]:
            return tuple(root / p.relative_to(self.root) if p.is_relative_to(self.root) else p for p in paths)

        return dataclasses.replace(self, root=root, train=move(self.train), val=move(self.val), test=move(self.test))


def datasets_dir() -> Path | None:
    """`YOLOV5_DATASETS_DIR` (upstream's spelling `YOLOv5_DATASETS_DIR` means the same), or None."""
    value = os.environ.get("YOLOV5_DATASETS_DIR") or os.environ.get("YOLOv5_DATASETS_DIR")  # noqa: SIM112
    return Path(value).expanduser() if value else None


def refuse_read_only(folder: Path) -> None:
    """Raise PermissionError where a folder, or the nearest above it that exists, is marked read-only.

    The system itself does not stop root from writing there.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.stat().st_mode & stat.S_IWUSR:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def load_dataset(data: str | Path | Mapping[str, Any]) -> DatasetSpec:
    """Read a dataset YAML (or an equal mapping) and resolve its paths.

    A relative `path` is looked for below `YOLOV5_DATASETS_DIR` where that is set, the working directory, the repository
    and its folder `datasets`; the first that exists wins. What is nowhere is fetched or drawn into
    `YOLOV5_DATASETS_DIR`, else into the repository's `datasets`: a leading `../datasets/` or `datasets/` stands for
    this place, and other steps upwards are left out of it.

    Raises:
        UserError: a missing or unknown kind of entry, with the YAML's line.
    """
    if isinstance(data, Mapping):
        file = YamlFile(Path("data"), dict(data))
    else:
        file = read_yaml(find_file(data, ("data",), (".yaml", ".yml")))
    root = _dataset_root(file)
    names = _names(file)
    splits = {task: _split_paths(file, task, root) for task in ("train", "val", "test")}
    for task in ("train", "val"):
        if not splits[task]:
            raise UserError(f"{file.where()}: has no '{task}' entry. Add `{task}: <folder of images>`.")
    download, draw = file.data.get("download"), file.data.get("draw")
    if draw is not None and draw != "shapes":
        raise UserError(f"{file.where('draw')}: can draw 'shapes' only, not {draw!r}.")
    if download is not None and not str(download).startswith("https://"):
        raise UserError(
            f"{file.where('download')}: 'download' takes the https address of a zip or tar archive; "
            "scripts in a dataset file are never run. Fetch the data yourself and remove the line."
        )
    return DatasetSpec(file=file, root=root, names=names, **splits, download=download, draw=draw)


def _dataset_root(file: YamlFile) -> Path:
    value = file.data.get("path") or "."
    if not isinstance(value, str):
        raise UserError(f"{file.where('path')}: 'path' must be a folder, found {value!r}.")
    path = Path(value).expanduser()
    if path.is_absolute():
        return path
    inside = Path(*(part for part in Path(os.path.normpath(path)).parts if part != ".."))
    if inside.parts[:1] == ("datasets",):
        inside = inside.relative_to("datasets")
    named, own = datasets_dir(), ROOT / "datasets"
    candidates = [Path.cwd() / path, ROOT / path, own / inside]
    if named is not None:
        candidates.insert(0, named / inside)
    return next((c for c in candidates if c.exists()), (named or own) / inside).resolve()


def _names(file: YamlFile) -> dict[int, str]:
    value = file.data.get("names")
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"{file.where('names')}: expected `names:` with one name per class, as a list or `0: name` lines."
        )
    for expected, key in enumerate(value):
        if key != expected or isinstance(key, bool):
            raise UserError(f"{file.where('names', key)}: class numbers must run 0, 1, 2, ...; found {key!r}.")
    declared = file.data.get("nc")
    if declared is not None and declared != len(value):
        raise UserError(f"{file.where('nc')}: nc is {declared}, but {len(value)} names follow. Make them agree.")
    return {key: str(name) for key, name in value.items()}


def _split_paths(file: YamlFile, task: str, root: Path) -> tuple[Path, ...]:
    value = file.data.get(task)
    if value is None or value == "":
        return ()
    entries = value if isinstance(value, list) else [value]
    paths = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, str):
            raise UserError(f"{file.where(task, i)}: '{task}' takes folders, image lists or images, found {entry!r}.")
        path = root / Path(entry).expanduser()
        if not path.exists() and entry.startswith("../"):
            path = root / entry[3:]
        paths.append(path)
    return tuple(paths)


# ---------------------------------------------------------------------------------------------------- hyper-parameters


class Hyp(dict[str, float]):
    """Hyper-parameters by key, with the file and line each came from."""

    def __init__(self, values: Mapping[str, float], file: YamlFile | None = None) -> None:
        super().__init__(values)
        self.file = file

    def where(self, key: str) -> str:
        return self.file.where(key) if self.file else "hyp"


def read_hyp(source: str | Path | Mapping[str, Any]) -> Hyp:
    """Read a hyper-parameter file (`hyp.scratch-low.yaml`) or mapping: every value a finite number."""
    if isinstance(source, Mapping):
        file, data = None, dict(source)
    else:
        file = read_yaml(find_file(source, ("data",), (".yaml", ".yml")))
        data = file.data
    hyp = Hyp({}, file)
    for key, value in data.items():
        number = _number(value)
        if number is None:
            raise UserError(f"{hyp.where(key)}: '{key}' must be a number, found {value!r}.")
        hyp[str(key)] = number
    return hyp


def _number(value: Any) -> float | int | None:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 (without a dot) as text
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def check_hyp(hyp: Hyp, owners: Iterable[type]) -> Hyp:
    """The hyper-parameters completed with every owner's defaults.

    An owner is a dataclass whose fields are keys of the file; a field's metadata may hold `min` and `max`.

    Raises:
        UserError: a key nobody owns (with the most similar one), or a value out of range, with file and line.
    """
    fields = {f.name: f for owner in owners for f in dataclasses.fields(owner)}
    for key, value in hyp.items():
        if key not in fields:
            raise UserError(f"{hyp.where(key)}: unknown key '{key}'.{closest(key, fields)}")
        low, high = fields[key].metadata.get("min", -math.inf), fields[key].metadata.get("max", math.inf)
        if not low <= value <= high:
            raise UserError(f"{hyp.where(key)}: '{key}' is {value:g}, expected {low:g} to {high:g}.")
    defaults = {key: f.default for key, f in fields.items() if f.default is not dataclasses.MISSING}
    return Hyp({**defaults, **hyp}, hyp.file)


def owned(owner: type[OwnerT], hyp: Mapping[str, float]) -> OwnerT:
    """The owner's own hyper-parameters, as an instance of it."""
    names = [f.name for f in dataclasses.fields(owner)]  # type: ignore[arg-type]
    return owner(**{name: hyp[name] for name in names if name in hyp})


# --------------------------------------------------------------------------------------------------------- command line


class ArgumentParser(argparse.ArgumentParser):
    """argparse with abbreviations, whose mistakes end in one line with a suggestion and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(
                f"unknown argument {unknown[0]}.{closest(unknown[0].split('=')[0], self._option_string_actions)}"
            )
        return options

    def given(self, args: Any = None) -> dict[str, Any]:
        """The options that a command line names, without those it leaves as they are."""
        untouched = object()
        options = argparse.Namespace(**{action.dest: untouched for action in self._actions if action.dest != "help"})
        return {key: value for key, value in vars(self.parse_args(args, options)).items() if value is not untouched}

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        matches = super()._get_option_tuples(option_string)
        same = all(match[0] is matches[0][0] for match in matches)  # --im: --img and --imgsz are one flag
        return matches[:1] if same else matches

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} See `python {self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


def check_minimum(options: argparse.Namespace, **minimum: int) -> None:
    """Refuse options below their smallest sensible value: `check_minimum(options, epochs=1)`."""
    for name, least in minimum.items():
        value = getattr(options, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more.")


def options_from(parser: argparse.ArgumentParser, overrides: Mapping[str, Any]) -> argparse.Namespace:
    """The parser's defaults with `run(**overrides)` applied, every value converted as on the command line.

    So `classes=0`, `conf_thres="0.3"` and `data=Path("a.yaml")` work. Flags without a value are True or False; those
    that may go without one are, with True. What only Python can say (`PYTHON_ONLY`) stays as it is.

    Raises:
        UserError: a keyword the parser has no flag for, or a value the flag does not take.
    """
    options = parser.parse_args([])
    actions = {action.dest: action for action in parser._actions}
    for key, value in overrides.items():
        if not hasattr(options, key):
            raise UserError(f"unknown option '{key}'.{closest(key, vars(options))}")
        setattr(options, key, _option_value(actions[key], value))
    return options


def _option_value(action: argparse.Action, value: Any) -> Any:
    """What the command line would have made of the value; UserError where it would have refused it."""
    if value is None and action.default is None:
        return None
    if action.nargs == 0 and isinstance(value, bool):
        return value
    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else action.default
    if isinstance(value, PYTHON_ONLY.get(action.dest, ())) and not isinstance(value, WORDS):
        return value
    if action.nargs == "+" and isinstance(value, (list, tuple, set, range)):
        values = [_converted(action, one) for one in value]
        if not values and values != action.default:
            raise UserError(f"{action.dest}={value!r}: expected at least one.")
        return values
    return [_converted(action, value)] if action.nargs == "+" else _converted(action, value)


def _converted(action: argparse.Action, value: Any) -> Any:
    kind: Any = action.type or str
    if action.nargs != 0 and isinstance(value, WORDS) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            converted = kind(os.fspath(value) if isinstance(value, os.PathLike) else str(value))
            if action.choices is None or converted in action.choices:
                return converted
    expected = {int: "a whole number", float: "a number"}.get(kind, "text")
    if action.choices is not None:
        expected = f"one of {', '.join(map(str, action.choices))}"
    elif action.nargs == 0:
        expected = "True or False"
    raise UserError(f"{action.dest}={' '.join(repr(value).split())[:80]}: expected {expected}.")
