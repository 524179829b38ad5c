"""Mutants of the numerics, the passes and the checkpoints: which small faults in the code would the tests not see?

    python -m tests.benchmarks.mutation [--mutants 90] [--seed 0] [--only fake_quantize]

A mutant is one change of one file: another comparison, operator, number or truth value, a condition turned round, a
result that is not returned. For each, the tests of that file run in a process that is forked, which imports the
changed code in place of the file. A mutant that no test fails for is printed, and is to be read: it needs a test, or
changes nothing that can be seen. Nothing is written to the disk.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType
from typing import Any


PACKAGE = Path(__file__).parents[2] / "hf_qat"

#: What is mutated, and the tests that are to see it, beside those of the same name.
TARGETS = {
    "quantization/scales.py": (),
    "quantization/fake_quantize.py": ("tests/quantization/test_learned.py",),
    "quantization/folding.py": ("tests/quantization/test_layers.py",),
    "quantization/packing.py": ("tests/quantization/test_saved_codes.py",),
    "quantization/bias.py": ("tests/quantization/test_converted.py", "tests/quantization/test_layers.py"),
    "graph/passes/connect.py": ("tests/graph/passes/test_place.py",),
    "graph/passes/fuse.py": (),
    "graph/passes/graph_facts.py": ("tests/graph/passes/test_place.py", "tests/graph/passes/test_rewrite.py"),
    "graph/passes/place.py": (),
    "graph/passes/quantizer_names.py": ("tests/graph/passes/test_place.py",),
    "graph/passes/quantizer_specs.py": ("tests/graph/passes/test_place.py", "tests/graph/passes/test_softmax.py"),
    "graph/passes/rewrite.py": ("tests/graph/passes/test_place.py",),
    "graph/passes/sharing.py": ("tests/graph/passes/test_place.py",),
    "graph/passes/softmax.py": (),
    "graph/passes/twins.py": ("tests/graph/passes/test_fuse.py", "tests/graph/capture/test_ways.py"),
    "graph/passes/weights.py": ("tests/graph/passes/test_place.py",),
    "checkpoints/stored_format.py": ("tests/checkpoints/test_validation.py", "tests/checkpoints/test_fuzz.py"),
    "checkpoints/validation.py": ("tests/checkpoints/test_fuzz.py",),
    "checkpoints/load_weights.py": (),
    "checkpoints/sources.py": ("tests/checkpoints/test_load_weights.py",),
    "checkpoints/key_names.py": ("tests/checkpoints/test_load_weights.py",),
    "checkpoints/dequantization.py": (),
    "checkpoints/rebuild.py": ("tests/checkpoints/test_hf_quantizer.py",),
}

#: What an operator becomes.
OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        name: of the file, in the package.
        line: where.
        change: the expression before, and after.
        code: of the whole file with it.
    """

    name: str
    line: int
    change: str
    code: CodeType


def mutated(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    other = deepcopy(node)
    match other:
        case ast.Compare(ops=[operator]) if type(operator) in OPERATORS:
            other.ops = [OPERATORS[type(operator)]()]
            yield other
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) | ast.AugAssign(op=operator) if (
            type(operator) in OPERATORS
        ):
            other.op = OPERATORS[type(operator)]()
            yield other
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield other.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.If() | ast.IfExp() | ast.While():
            other.test = ast.UnaryOp(ast.Not(), other.test)
            yield other
        case ast.Return(value=ast.expr()):
            other.value = ast.Constant(None)
            yield other


def is_code(node: ast.AST, parents: dict[ast.AST, tuple[ast.AST, str]]) -> bool:
    """Whether it runs: no annotation, no message of an error, no bound of a type, nothing for a type checker only."""
    while node in parents:
        parent, field = parents[node]
        if field in ("annotation", "returns", "decorator_list") or isinstance(parent, (ast.Raise, ast.JoinedStr)):
            return False
        if isinstance(parent, ast.If) and ast.unparse(parent.test) == "TYPE_CHECKING":
            return False
        node = parent
    return True


def mutants_of(name: str) -> list[Mutant]:
    """All that there are of a file."""
    source = (PACKAGE / name).read_text(encoding="utf-8")
    tree, found = ast.parse(source), []
    parents = {child: (parent, field) for parent in ast.walk(tree) for child, field in _children(parent)}
    for node in [node for node in ast.walk(tree) if node in parents and is_code(node, parents)]:
        parent, field = parents[node]
        for other in mutated(node):
            before, after = (ast.unparse(x).splitlines()[0] for x in (node, other))
            ast.copy_location(other, node)
            _replace(parent, field, node, other)
            changed = ast.fix_missing_locations(deepcopy(tree))
            _replace(parent, field, other, node)
            code = compile(changed, str(PACKAGE / name), "exec")
            found.append(Mutant(name, getattr(node, "lineno", 0), f"{before}  →  {after}", code))
    return found


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child, field


def _replace(parent: ast.AST, field: str, old: ast.AST, new: ast.AST) -> None:
    value = getattr(parent, field)
    if isinstance(value, list):
        value[value.index(old)] = new
    else:
        setattr(parent, field, new)


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a mutant in the place of its file."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.module = "hf_qat." + mutant.name.removesuffix(".py").replace("/", ".")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Only of that module."""
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, PACKAGE / self.mutant.name, loader=self)

    def exec_module(self, module: Any) -> None:
        """Run the changed code."""
        exec(self.mutant.code, module.__dict__)


def tests_of(name: str) -> list[str]:
    """The files of tests."""
    own = PACKAGE.parent / "tests" / name
    own = own.with_name(f"test_{own.name}")
    others = TARGETS[name]
    return ([str(own)] if own.exists() else []) + [str(PACKAGE.parent / other) for other in others]


def is_killed(mutant: Mutant | None, tests: Sequence[str], limit: float) -> bool:
    """Whether any test fails, or does not end in time."""
    child = os.fork()
    if child == 0:
        _run_tests(mutant, tests)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run_tests(mutant: Mutant | None, tests: Sequence[str]) -> None:
    """In a group of processes of its own, which ends here."""
    os.setsid()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    status = 3
    try:
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, Changed(mutant))
        options = ["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--no-header"]
        status = int(pytest.main([*options, *tests]))
    finally:
        os._exit(status)


def drawn(count: int, seed: int, only: str) -> list[Mutant]:
    """So many mutants at random, of files whose name holds `only`."""
    every = [mutant for name in TARGETS if only in name for mutant in mutants_of(name)]
    print(f"{len(every)} mutants, of which {min(count, len(every))} are tried (seed {seed})", flush=True)
    return random.Random(seed).sample(every, min(count, len(every)))


def main() -> None:
    """Try them; print each that survives, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the files")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for the tests of one mutant")
    options = parser.parse_args()
    for heavy in ("torch", "transformers", "onnx", "onnxruntime", "datasets", "hypothesis", "torch.export"):
        with contextlib.suppress(ImportError):
            importlib.import_module(heavy)
    tried: Counter[str] = Counter()
    killed: Counter[str] = Counter()
    for mutant in drawn(options.mutants, options.seed, options.only):
        dead = is_killed(mutant, tests_of(mutant.name), options.limit)
        tried[mutant.name] += 1
        killed[mutant.name] += dead
        print(f"{'killed  ' if dead else 'SURVIVED'} {mutant.name}:{mutant.line}  {mutant.change}", flush=True)
    for name in sorted(tried):
        print(f"{name:40} {killed[name]:3} of {tried[name]:3}")
    print(f"{'all':40} {killed.total():3} of {tried.total():3}: {killed.total() / max(1, tried.total()):.0%}")


if __name__ == "__main__":
    main()
