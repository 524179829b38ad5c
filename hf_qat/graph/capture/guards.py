"""Batch sizes at which a graph of `torch.export` may be another than the module: those at which a guard fails.

The exporter follows one branch of `if x.shape[0] > 10`, and writes down for which sizes it is the right one. It
writes down much that changes nothing, too (a reshape asks whether sizes divide), so a size is named here, and tried
out by the proof.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor


#: Batch sizes that are looked at, and how many of them are named at most.
SIZES, MOST = (*range(2, 65), 128, 256, 512, 1024), 4

#: Inputs of so many values take long to compute with, and are left out.
LARGEST = 2**24

Shape = tuple[int, ...]

#: What a guard may compute. It is never run as Python: the names in it are those of the model, which may be a file's.
OPERATORS: Mapping[type[ast.AST], Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS: Mapping[str, Callable[..., int | float]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": round,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.sqrt": math.sqrt,
    "math.trunc": math.trunc,
}

#: A power of sizes is computed up to this exponent: beyond, it could take for ever.
LARGEST_EXPONENT = 8


class _UnknownError(Exception):
    """A guard asks for something other than sizes."""


def doubtful_sizes(guards: Sequence[str], first: Sequence[Tensor], last: Sequence[Tensor]) -> tuple[int, ...]:
    """The smallest batch sizes from 2 at which a guard fails, a few at most.

    Args:
        guards: Python expressions, such as `L['tensors'][0].size()[0] <= 10`.
        first, last: the inputs at batch sizes of 2 and 3.
    """
    found = {size for guard in guards for size in _first_failure(guard, first, last)}
    return tuple(sorted(found)[:MOST])


def _first_failure(guard: str, first: Sequence[Tensor], last: Sequence[Tensor]) -> Iterator[int]:
    try:
        expression = ast.parse(guard.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for size in SIZES:
        shapes = [shape_at(size, x, y) for x, y in zip(first, last, strict=True)]
        if sum(map(math.prod, shapes)) > LARGEST:
            return
        if not _holds(expression, shapes):
            yield size
            return


def shape_at(size: int, first: Tensor, last: Tensor) -> Shape:
    """The shape of an input at a batch of `size`, of which two are given, at 2 and 3."""
    return tuple(max(1, n + (m - n) * (size - 2)) for n, m in zip(first.shape, last.shape, strict=True))


def _holds(expression: ast.expr, shapes: Sequence[Shape]) -> bool:
    try:
        return bool(_value(expression, shapes))
    except (_UnknownError, ArithmeticError, IndexError, TypeError, ValueError, RecursionError):
        return True


def _value(node: ast.expr, shapes: Sequence[Shape]) -> int | float:
    """The value of an expression of sizes, numbers, `OPERATORS` and `FUNCTIONS`.

    Raises:
        _UnknownError: there is something else in it.
    """
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op, operand):
            return _operator(op)(_value(operand, shapes))
        case ast.BinOp(left, ast.Pow(), right):
            return _power(_value(left, shapes), _value(right, shapes))
        case ast.BinOp(left, op, right):
            return _operator(op)(_value(left, shapes), _value(right, shapes))
        case ast.BoolOp(op, values):
            among = all if isinstance(op, ast.And) else any
            return among(_value(value, shapes) for value in values)
        case ast.Compare(left, ops, comparators):
            terms = [_value(term, shapes) for term in (left, *comparators)]
            return all(_operator(op)(*pair) for op, pair in zip(ops, zip(terms, terms[1:], strict=False), strict=True))
        case ast.IfExp(test, body, orelse):
            return _value(body if _value(test, shapes) else orelse, shapes)
        case ast.Subscript(ast.Call(ast.Attribute(tensor, "size"), [], []), ast.Constant(int() as axis)):
            return shapes[_position(tensor)][axis]
        case ast.Call(function, args, []) if (name := ast.unparse(function)) in FUNCTIONS:
            return FUNCTIONS[name](*(_value(argument, shapes) for argument in args))
    raise _UnknownError


def _operator(op: ast.AST) -> Callable[..., int | float]:
    if type(op) not in OPERATORS:
        raise _UnknownError
    return OPERATORS[type(op)]


def _power(base: float, exponent: float) -> float:
    if not 0 <= exponent <= LARGEST_EXPONENT:
        raise _UnknownError
    power: float = base**exponent
    return power


def _position(node: ast.expr) -> int:
    """That of the input which `L['tensors'][…]` is."""
    match node:
        case ast.Subscript(ast.Subscript(ast.Name("L"), ast.Constant("tensors")), ast.Constant(int() as position)):
            return position
    raise _UnknownError
