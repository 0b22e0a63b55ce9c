"""What text may stand for in a model YAML: literals, known names, arithmetic, and one call that makes an activation.

The text is parsed, checked against a list of allowed syntax and computed here; Python never runs it.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from utils.config import UserError, closest

MAX_TEXT = 200  # characters
# what torch's constructors and layers raise for arguments or maps they cannot take
LAYER_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
)
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def literal(value: Any, names: Mapping[str, Any], where: str = "yaml") -> Any:
    """The value of one argument: numbers, None, True, False, lists, known names, arithmetic; other text is itself.

    Raises:
        UserError: arithmetic with an unknown name beside a known one, or that has no value (division by zero).
    """
    if isinstance(value, (list, tuple)):
        return [literal(item, names, where) for item in value]
    if not isinstance(value, str):
        return value
    try:
        tree = ast.parse(value.strip(), mode="eval").body if len(value) <= MAX_TEXT else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return value
    if tree is None or not _in_grammar(tree):
        return value
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    unknown = sorted(words - names.keys())
    if unknown and not words & names.keys():
        return value  # a plain word such as nearest, or nearest-exact
    if unknown:
        raise UserError(f"{where}: '{value}' uses '{unknown[0]}', which is none of {', '.join(names)}.")
    try:
        return copy.deepcopy(_value(tree, names))
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{where}: '{value}' has no value ({error}).") from None


def _in_grammar(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is None or isinstance(node.value, (bool, int, float, str))
    if isinstance(node, (ast.List, ast.Tuple)):
        return all(_in_grammar(item) for item in node.elts)
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS and _in_grammar(node.left) and _in_grammar(node.right)
    if isinstance(node, ast.UnaryOp):
        return type(node.op) in _OPERATORS and _in_grammar(node.operand)
    return isinstance(node, ast.Name)


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]  # type: ignore[attr-defined]
    values = [_value(operand, names) for operand in operands]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{value!r} is not a number")
    return _OPERATORS[type(node.op)](*values)  # type: ignore[attr-defined]


def activation(text: str, where: str = "yaml") -> nn.Module:
    """The module that `activation: nn.LeakyReLU(0.1)` stands for.

    Raises:
        UserError: not a call of one of torch.nn's activations with literal arguments.
    """
    known = {f"nn.{name}": c for name, c in vars(nn).items() if _is_activation(c)}
    known["nn.Identity"] = nn.Identity
    if len(str(text)) > MAX_TEXT:
        raise UserError(f"{where}: activation is a text of {len(str(text)):,} characters. Write, say, nn.SiLU().")
    try:
        call = ast.parse(str(text).strip().removeprefix("torch."), mode="eval").body
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else str(text)
        if not isinstance(call, ast.Call) or name not in known:
            raise UserError(
                f"{where}: activation '{text}' is not one of torch's. Write, say, nn.SiLU().{closest(name, known)}"
            )
        args = [ast.literal_eval(arg) for arg in call.args]
        return known[name](*args, **{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
    except (SyntaxError, *LAYER_ERRORS) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: activation '{text}' cannot be built: {error}. Write, say, nn.SiLU().") from None


def first_line(error: BaseException) -> str:
    """What torch says, without the places in its C++ code."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _is_activation(item: object) -> bool:
    attention = nn.MultiheadAttention  # takes three inputs, and any amount of memory
    return isinstance(item, type) and item.__module__ == nn.SiLU.__module__ and item is not attention
