"""Configuration as data: YAML that remembers its lines, hyper-parameter files, command-line options.

Everything here needs only PyYAML, so that `--help` and a typing mistake are answered without importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

ROOT = Path(__file__).resolve().parents[1]  # the repository, or where it was installed: the YAMLs lie below it
# Where `runs/` and `datasets/` are: the repository, and for an installed copy the working directory.
WORK = ROOT if (ROOT / "pyproject.toml").is_file() else Path()
# Options of `run(...)` that take more than their text: a dataset or hyper-parameters as a mapping, several sources, a
# torch.device.
PYTHON_ONLY: dict[str, type | tuple[type, ...]] = {
    "data": Mapping,
    "hyp": Mapping,
    "source": (list, tuple),
    "device": object,
}
WORDS = (str, os.PathLike, Real)  # what a word of a command line can stand for
MAX_YAML_BYTES = 512 << 10  # 13,000 class names, the most of any dataset known, are 0.3 MB and 26,000 values
MAX_YAML_NODES = 50_000  # the parser takes two seconds for so many; aliases inside aliases grow exponentially
MAX_YAML_DEPTH = 50
MAX_NUMBER_CHARACTERS = 100  # a number in base 60 takes time that is quadratic in its length
MAX_MESSAGE = 500  # characters
YAML_MERGE = "tag:yaml.org,2002:merge"
SCALAR_ERRORS = (ValueError, ArithmeticError, LookupError, AttributeError, TypeError)  # impossible dates, `!!int x`
OwnerT = TypeVar("OwnerT")


class UserError(ValueError):
    """A mistake in what the user gave us: the scripts print its one line and exit with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` with unprintable characters escaped, and without its middle where it has more than 500 characters."""
    return _shortened("".join(c if c.isprintable() else ascii(c)[1:-1] for c in _shortened(text)))


def _shortened(text: str) -> str:
    half = (MAX_MESSAGE - 5) // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} ... {text[-half:]}"


class HashBudget:
    """Bounds the keys of a file's dicts and sets whose hashes the file can choose.

    The hash of text is salted, that of a number or a tuple is not: a million of them with one hash take hours to
    insert. Numbers that count up (0, 1, 2, ...) have different hashes and are free.
    """

    def __init__(self, keys: int = 1000) -> None:
        self.left = keys

    def allows(self, key: object, size: int) -> bool:
        """Whether `key` may still enter a container of `size` keys."""
        if isinstance(key, str | bytes | None) or (type(key) is int and 0 <= key <= size + 100):
            return True
        self.left -= 1
        return self.left >= 0


def closest(word: object, choices: Iterable[object]) -> str:
    """`" Did you mean 'x'?"` for the most similar choice, or an empty string where nothing is similar."""
    words, asked = [str(choice) for choice in choices], str(word)[:100]
    same = [choice for choice in words if choice.casefold() == asked.casefold()]
    matches = same or difflib.get_close_matches(asked, words, n=1, cutoff=0.6)
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
        UserError: not there, not UTF-8, not YAML, not a mapping, a key given twice, or more than a file of ours needs:
            megabytes, deep nesting, aliases that explode, keys with chosen hashes.
    """
    path = Path(path)
    text = _yaml_text(path)
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        place = f"{display_path(path)}:{text.count(chr(10), 0, error.position) + 1}"
        found = chr(int(error.character))
        raise UserError(f"{place}: YAML does not allow the character {found!r}. Remove it.") from None
    try:
        root = loader.get_single_node()
        construction = _Construction(loader, path)
        data = construction.value(root, ()) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{display_path(path)}:{line}: not valid YAML: {error.problem}.") from None
    except (ValueError, OverflowError) as error:  # the scanner: an escape above Unicode, a version of 5,000 digits
        if isinstance(error, UserError):
            raise
        raise UserError(f"{display_path(path)}:{loader.line + 1}: not valid YAML: {error}.") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{display_path(path)}: expected `key: value` lines, found {found}.")
    return YamlFile(path, data, construction.lines)


def _yaml_text(path: Path) -> str:
    shown = display_path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device might never end
            raise UserError(f"{shown}: not a regular file. Give a YAML file.")
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}).") from None
    if len(data) > MAX_YAML_BYTES:
        raise UserError(f"{shown}: larger than {MAX_YAML_BYTES >> 10} KB. Give a configuration file, not data.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{shown}:{line}: not UTF-8 text. Save the file with UTF-8 encoding.") from None


class _Loader(yaml.SafeLoader):
    """A safe loader that stops at too many or too deep nodes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_YAML_NODES or self._depth > MAX_YAML_DEPTH:
            problem = f"more than {MAX_YAML_NODES:,} values, or values nested deeper than {MAX_YAML_DEPTH}"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


@dataclass
class _Construction:
    """Makes plain data from the nodes of one file, and notes their lines."""

    loader: yaml.SafeLoader
    path: Path
    lines: dict[tuple[Hashable, ...], int] = field(default_factory=dict)
    visited: int = 0
    hashes: HashBudget = field(default_factory=HashBudget)

    def value(self, node: yaml.Node, keys: tuple[Hashable, ...]) -> Any:
        """What the node below the key path stands for."""
        self._count(len(keys))
        self.lines.setdefault(keys, node.start_mark.line + 1)
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise self._refusal(node, f"the tag '{node.tag}' is refused; write plain values.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*keys, i)) for i, child in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, keys: tuple[Hashable, ...]) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node, merged in self._pairs(node, len(keys)):
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else []
            if not isinstance(key, Hashable):
                raise self._refusal(key_node, "a key must be a plain word or number.")
            if not self.hashes.allows(key, len(mapping)):
                raise self._refusal(key_node, f"{key!r} is one more of too many keys that are numbers. Number from 0.")
            if key in mapping:
                if merged:
                    continue
                first = self.lines[(*keys, key)]
                raise self._refusal(key_node, f"'{key}' is given twice (first on line {first}).")
            self.lines[(*keys, key)] = key_node.start_mark.line + 1
            mapping[key] = self.value(value_node, (*keys, key))
        return mapping

    def _pairs(self, node: yaml.MappingNode, depth: int) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Key, value and whether `<<` took them from another mapping; the mapping's own come first."""
        self._count(depth)
        yield from ((key, value, False) for key, value in node.value if key.tag != YAML_MERGE)
        for _, value in (pair for pair in node.value if pair[0].tag == YAML_MERGE):
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise self._refusal(source, "`<<` takes a mapping or a list of mappings.")
                yield from ((inner, value, True) for inner, value, _ in self._pairs(source, depth + 1))

    def _scalar(self, node: yaml.Node) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > MAX_NUMBER_CHARACTERS:
            problem = (
                f"a number of {len(node.value):,} characters, expected at most {MAX_NUMBER_CHARACTERS}. Shorten it."
            )
            raise self._refusal(node, problem)
        try:
            return self.loader.construct_object(node)
        except SCALAR_ERRORS as error:
            problem = f"{node.value[:40]!r} is no {kind} ({error}). Correct it, or write it in quotes."
            raise self._refusal(node, problem) from None

    def _count(self, depth: int) -> None:
        self.visited += 1
        if self.visited > MAX_YAML_NODES or depth > MAX_YAML_DEPTH:
            raise UserError(
                f"{display_path(self.path)}: its aliases expand to more than {MAX_YAML_NODES:,} values, or contain"
                " themselves; refused."
            )

    def _refusal(self, node: yaml.Node, problem: str) -> UserError:
        return UserError(f"{display_path(self.path)}:{node.start_mark.line + 1}: {problem}")


def display_path(path: str | Path) -> str:
    """The path relative to the working directory where it lies below it, otherwise as it is."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError, RuntimeError):  # not below, not a possible path, links in a circle
        return str(path)


def user_path(name: str | Path) -> Path:
    """`name` as a path, `~` expanded.

    Raises:
        UserError: no file can have this name: a NUL or half a character, too long, `~` of an unknown user.
    """
    text = os.path.expanduser(name)
    try:
        too_long = len(os.fsencode(text)) > 4095 or any(len(os.fsencode(part)) > 255 for part in Path(text).parts)
    except UnicodeEncodeError:
        too_long = True
    if too_long or "\0" in text:
        raise UserError(f"{str(name)[:200]}: no file can have this name: it is too long, or holds a NUL.")
    if text.startswith("~") and not os.path.lexists(Path(text).parts[0]):
        raise UserError(f"{name}: there is no user {Path(text).parts[0][1:]!r} here. Write the folder in full.")
    return Path(text)


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
    path = user_path(name)
    for candidate in (path, ROOT / path):
        if os.path.isfile(candidate):  # Path.is_file raises where a folder may not be read
            return candidate
    everything = [file for folder in folders for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]
    hits = [file for file in everything if file.parts[-len(path.parts) :] == path.parts]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise UserError(f"{name}: stands for {' and '.join(display_path(hit) for hit in hits)}. Give the whole path.")
    alike = [file.name for file in everything if file.suffix == path.suffix]
    looked = ", ".join(display_path(ROOT / folder) for folder in folders)
    raise UserError(f"{name}: no such file, here or below {looked}.{closest(path.name, alike)}")


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

    An owner is a dataclass whose fields are keys of the file; a field's metadata may hold `min` and `max`, or `values`.

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
        if value not in (values := fields[key].metadata.get("values", (value,))):
            raise UserError(f"{hyp.where(key)}: '{key}' is {value:g}, expected {' or '.join(map(str, values))}.")
    defaults = {key: f.default for key, f in fields.items() if f.default is not dataclasses.MISSING}
    return Hyp({**defaults, **hyp}, hyp.file)


def owned(owner: type[OwnerT], hyp: Mapping[str, float]) -> OwnerT:
    """The owner's own hyper-parameters, as an instance of it."""
    names = [f.name for f in dataclasses.fields(owner)]  # type: ignore[arg-type]
    return owner(**{name: hyp[name] for name in names if name in hyp})


# --------------------------------------------------------------------------------------------------------- command line


def installed_command() -> bool:
    """Whether this process was started as `yolov5-attention` and not as `python train.py`."""
    return Path((sys.argv or [""])[0]).name.startswith("yolov5-attention")


def command_of(script: str) -> str:
    """How the user started a script: `python train.py`, `python ../train.py` or `yolov5-attention train`."""
    if installed_command():
        return f"yolov5-attention {Path(script).stem.removesuffix('_gates')}"
    typed = (sys.argv or [""])[0]  # a path to the script from whatever folder
    return f"python {one_line(typed if Path(typed).name == Path(script).name else script)}"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with abbreviations, whose mistakes end in one line with a suggestion and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)
        self.command = command_of(self.prog)
        if installed_command():
            self.prog = self.command

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
        sentence = message if message.endswith((".", "?", "!")) else f"{message}."
        print(f"error: {one_line(sentence)} See `{self.command} --help`.", file=sys.stderr)
        raise SystemExit(2)


def check_minimum(options: argparse.Namespace, **minimum: int) -> None:
    """Refuse options below their smallest sensible value, None apart: `check_minimum(options, epochs=1)`."""
    for name, least in minimum.items():
        value = getattr(options, name)
        if value is not None and value < least:
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
