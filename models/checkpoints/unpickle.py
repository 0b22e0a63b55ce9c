"""The pickle inside a `.pt` file as data: nothing in it is ever run.

Python's `pickle` is not used: a subclass can refuse globals, but a memo index of two billion or the hash of deeply
nested tuples still takes the memory or the time. So the opcodes are decoded with `pickletools.genops`, which executes
nothing, and the few that torch writes are carried out on a stack of our own. Containers and tensors become real; every
other global becomes a `Record`, which holds what the file says about it.
"""

from __future__ import annotations

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from utils.config import HashBudget

MAX_OPERATIONS = 1_000_000  # yolov5n has 35,000; a million empty sets would already be 216 MB
MAX_ELEMENTS = 1 << 40  # of a tensor; torch computes sizes and strides in 64 bits
KEY_TYPES = (str, int, float, bytes, type(None))
MAX_INT_BITS = 256  # numpy's random state holds 128-bit integers
STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; the thing itself is never looked up."""

    module: str
    name: str


class Record:
    """What a file says about an object of a class it names: constructor arguments, state, list and dict content."""

    __slots__ = ("args", "items", "mapping", "module", "name", "state")

    def __init__(self, kind: Global, args: tuple[Any, ...] = ()) -> None:
        self.module = kind.module
        self.name = kind.name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []
        self.mapping: dict[Any, Any] = {}

    @property
    def attributes(self) -> dict[str, Any]:
        """The object's `__dict__` as it was saved; empty if it had none."""
        state = self.state[0] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
        return state if isinstance(state, dict) else {}


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers inside the file: member `data/<key>` with `numel` elements."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that still lies in the file. Its bounds were checked; `Archive.tensor` reads it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


class PickleProblem(ValueError):
    """The pickle says something that no honest file says; `models.checkpoints.archive` adds the path."""


def _shown(value: Any) -> str:
    """A few characters for a message; never the text of a container, which can be longer than the memory."""
    word = value.name if isinstance(value, Global) else value if isinstance(value, str) else type(value).__name__
    return repr(word[:40])


def _counts(value: Any, what: str) -> tuple[int, ...]:
    """A size or stride as a tuple of non-negative ints that torch can compute with."""
    if not isinstance(value, tuple) or len(value) > 16 or any(type(v) is not int or v < 0 for v in value):
        raise PickleProblem(f"a tensor's {what} is not a short tuple of non-negative integers")
    if max(value, default=0) > MAX_ELEMENTS or (what == "size" and math.prod(max(v, 1) for v in value) > MAX_ELEMENTS):
        raise PickleProblem(f"a tensor's {what} is more than {MAX_ELEMENTS:,}")
    return value


class PickleMachine:
    """Carries out the opcodes of a pickle on plain containers, `Record` and `StoredTensor`; calls nothing it names.

    Args:
        data: the bytes of `data.pkl`.
        member_bytes: the bytes of each storage in the file, by key.
    """

    def __init__(self, data: bytes, member_bytes: Mapping[str, int]) -> None:
        self.data = data
        self.member_bytes = member_bytes
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copies_left = len(data)  # honest files spend an opcode per element, so copying more is a bomb
        self.hashes = HashBudget()
        self.operations = self._operations()
        self.real = self._real_globals()

    def run(self) -> Any:
        """The object the pickle describes.

        Raises:
            PickleProblem: truncated, unknown opcodes, wrong stack, impossible tensors, keys that cannot be hashed fast.
        """
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.data)):
                if count > MAX_OPERATIONS:
                    raise PickleProblem(f"it takes more than {MAX_OPERATIONS:,} operations to read (a pickle bomb?)")
                operation = self.operations.get(opcode.name)
                if operation is None:
                    raise PickleProblem(f"it uses the opcode {opcode.name}, which torch.save does not write")
                operation(argument)
        except PickleProblem:
            raise
        except (IndexError, KeyError, ValueError, UnicodeError) as error:
            raise PickleProblem(f"its opcodes are damaged ({' '.join(str(error).split())[:80]})") from None
        if len(self.stack) != 1 or self.marks:
            raise PickleProblem("its opcodes do not end with one object")
        return self.stack[0]

    def _operations(self) -> dict[str, Callable[[Any], None]]:
        """Opcode name -> what to do with its argument."""
        push = self.stack.append
        table: dict[str, Callable[[Any], None]] = {
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_SET": lambda _: push(set()),
            "EMPTY_TUPLE": lambda _: push(()),
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "TUPLE": lambda _: push(tuple(self._to_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "LIST": lambda _: push(self._to_mark()),
            "DICT": lambda _: push(self._set_items({}, self._to_mark())),
            "FROZENSET": lambda _: push(frozenset(self._elements(self._to_mark()))),
            "APPEND": lambda _: self._extend([self._pop()]),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._update([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._update(self._to_mark()),
            "ADDITEMS": lambda _: self._add(self._to_mark()),
            "POP": lambda _: self._discard(),
            "POP_MARK": lambda _: self._forget(self._to_mark()),
            "DUP": lambda _: push(self._top()),
            "MEMOIZE": lambda _: self._memoize(len(self.memo)),
            "GLOBAL": lambda name: push(Global(*name.split(" ", 1))),
            "STACK_GLOBAL": lambda _: self._stack_global(),
            "REDUCE": lambda _: self._call(),
            "NEWOBJ": lambda _: self._call(),
            "NEWOBJ_EX": lambda _: self._call(keywords=True),
            "BUILD": lambda _: self._build(self._pop()),
            "BINPERSID": lambda _: push(self._storage(self._pop())),
        }
        table |= dict.fromkeys(["PROTO", "FRAME", "STOP"], self._forget)
        table |= dict.fromkeys(["BINPUT", "LONG_BINPUT"], self._memoize)
        table |= dict.fromkeys(["BINGET", "LONG_BINGET"], lambda index: push(self.memo[index]))
        table |= dict.fromkeys(["BININT", "BININT1", "BININT2", "LONG1", "LONG4"], self._push_int)
        texts = ["SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING"]
        blobs = ["SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"]
        return table | dict.fromkeys(["BINFLOAT", *texts, *blobs], push)

    def _real_globals(self) -> dict[Global, Callable[..., Any]]:
        """The globals that become something: containers and tensors. Their arguments are checked, none is called."""
        table: dict[Global, Callable[..., Any]] = {
            Global("collections", "OrderedDict"): self._ordered_dict,
            Global("torch", "Size"): lambda sizes=(): tuple(self._copied(sizes)),
            Global("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            Global("torch._utils", "_rebuild_tensor"): self._tensor,
            Global("torch._utils", "_rebuild_parameter"): self._parameter,
            Global("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
            Global("torch._tensor", "_rebuild_from_type_v2"): self._typed_tensor,
        }
        for module in ("builtins", "__builtin__"):
            table[Global(module, "list")] = lambda values=(): list(self._copied(values))
            table[Global(module, "tuple")] = lambda values=(): tuple(self._copied(values))
            table[Global(module, "set")] = lambda values=(): self._elements(self._copied(values))
            table[Global(module, "frozenset")] = lambda values=(): frozenset(self._elements(self._copied(values)))
        return table

    # ------------------------------------------------------------------------------------------------------ the stack

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleProblem("its opcodes take more than they put")
        return self.stack.pop()

    def _top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleProblem("its opcodes take more than they put")
        return self.stack[-1]

    def _to_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _discard(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self._pop()

    def _forget(self, _: Any) -> None:
        """For opcodes that leave nothing behind."""

    def _tuple(self, length: int) -> None:
        self.stack.append(tuple([self._pop() for _ in range(length)][::-1]))

    def _push_int(self, value: int) -> None:
        if value.bit_length() > MAX_INT_BITS:
            raise PickleProblem("it holds an integer of more than 256 bits")
        self.stack.append(value)

    def _memoize(self, index: int) -> None:
        self.memo[index] = self._top()

    # ------------------------------------------------------------------------------------------------------ containers

    def _copied(self, values: Any) -> Any:
        if not isinstance(values, (list, tuple, set, frozenset)):
            raise PickleProblem("a container is made from something that is not one")
        self.copies_left -= len(values)
        if self.copies_left < 0:
            raise PickleProblem("it copies containers until the memory is full (a pickle bomb)")
        return values

    def _key(self, value: Any, size: int) -> Any:
        """A key for a container of `size` keys whose hash costs little: that of nested tuples can take for ever."""
        if type(value) is tuple:
            parts = self._copied(value)
        else:
            parts = (value,)
        for part in parts:
            if not isinstance(part, KEY_TYPES):
                raise PickleProblem(f"it uses a {type(part).__name__} inside a dict key")
        if not self.hashes.allows(value, size):
            raise PickleProblem("it uses too many numbers or tuples as dict keys (a hash bomb?)")
        return value

    def _elements(self, values: Iterable[Any]) -> set[Any]:
        return {self._key(value, size) for size, value in enumerate(values)}

    def _set_items(self, target: dict[Any, Any], flat: list[Any]) -> dict[Any, Any]:
        if len(flat) % 2:
            raise PickleProblem("a dict has a key without a value")
        for key, value in zip(flat[::2], flat[1::2]):
            target[self._key(key, len(target))] = value
        return target

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        target = target.items if isinstance(target, Record) else target
        if not isinstance(target, list):
            raise PickleProblem(f"it appends to a {type(target).__name__}")
        target.extend(values)

    def _update(self, flat: list[Any]) -> None:
        target = self._top()
        target = target.mapping if isinstance(target, Record) else target
        if not isinstance(target, dict):
            raise PickleProblem(f"it sets an item of a {type(target).__name__}")
        self._set_items(target, flat)

    def _add(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, set):
            raise PickleProblem(f"it adds an element to a {type(target).__name__}")
        target.update([self._key(value, len(target) + more) for more, value in enumerate(values)])

    def _ordered_dict(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        flat: list[Any] = []
        for pair in self._copied(pairs):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise PickleProblem("an OrderedDict is made from something that is not pairs")
            flat.extend(pair)
        result: OrderedDict[Any, Any] = OrderedDict()
        self._set_items(result, flat)
        return result

    # --------------------------------------------------------------------------------------------------------- objects

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleProblem("the name of a global is not text")
        self.stack.append(Global(module, name))

    def _call(self, *, keywords: bool = False) -> None:
        if keywords:  # known to no class that becomes real
            self._pop()
        args, kind = self._pop(), self._pop()
        if not isinstance(args, tuple):
            raise PickleProblem("the arguments of an object are not a tuple")
        self.stack.append(self._made(kind, args))

    def _made(self, kind: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(kind, Record):  # the result of a call is called: still only noted
            return Record(Global(kind.module, kind.name), args)
        if not isinstance(kind, Global):
            raise PickleProblem(f"it calls a {type(kind).__name__}")
        maker = self.real.get(kind)
        if maker is None:
            return Record(kind, args)
        try:
            return maker(*args)
        except TypeError:  # the number of arguments
            raise PickleProblem(f"{kind.module}.{kind.name} has arguments that torch does not write") from None

    def _build(self, state: Any) -> None:
        target = self._top()
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, OrderedDict | StoredTensor):  # state dicts carry `_metadata`, not needed here
            raise PickleProblem(f"it sets the state of a {type(target).__name__}")

    def _storage(self, identity: Any) -> Storage:
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise PickleProblem("it refers to something outside that is not a storage")
        _, kind, key, _, numel = identity
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Global) and kind.module == "torch" else None
        if dtype is None:
            raise PickleProblem(f"a storage has the unknown type {_shown(kind)}")
        if not isinstance(key, str) or key not in self.member_bytes:
            raise PickleProblem(f"the storage {_shown(key)} is not in the file")
        if type(numel) is not int or numel < 0 or numel * dtype.itemsize > self.member_bytes[key]:
            raise PickleProblem(f"the storage {key!r} is said to hold {numel} elements, more than its bytes")
        return Storage(dtype, key, numel)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
        if not isinstance(storage, Storage):
            raise PickleProblem("a tensor has no storage")
        size, stride = _counts(size, "size"), _counts(stride, "stride")
        (offset,) = _counts((offset,), "offset")
        if len(size) != len(stride):
            raise PickleProblem("a tensor's size and stride differ in length")
        numel = math.prod(size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if numel else offset
        if end > storage.numel:
            found = f"size {str(size)[:60]}, stride {str(stride)[:60]}, offset {str(offset)[:20]}"
            raise PickleProblem(f"a tensor with {found} exceeds its storage of {storage.numel} elements")
        return StoredTensor(storage, offset, size, stride)

    def _parameter(self, tensor: Any, *_: Any) -> StoredTensor:
        if not isinstance(tensor, StoredTensor):
            raise PickleProblem("a parameter has no tensor")
        return tensor

    def _typed_tensor(self, rebuild: Any, _kind: Any, args: Any, _state: Any) -> Any:
        return self._parameter(self._made(rebuild, args if isinstance(args, tuple) else ()))
