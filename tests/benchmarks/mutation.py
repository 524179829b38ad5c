"""Mutants of the numerics, the passes and the checkpoints: which small faults in the code would the tests not see?

    python -m tests.benchmarks.mutation [--mutants 90] [--seed 0] [--only fake_quantize]

A mutant is one change of one file: another comparison, operator, number or truth value, a condition turned round, a
result that is not returned. For each, the tests of that file run in a process that is forked, which imports the
changed code in place of the file. The tests that fail run once more at the end, on the code as it is, where they have
to pass. A mutant that no test fails for is printed, and is to be read: it needs a test, or changes nothing that can be
seen. Nothing is written to the disk.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import itertools
import os
import random
import resource
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

#: Seconds to wait for a second of a core: others may use it, too.
PATIENCE = 20

#: Of pytest. Its plugins are imported already, by libraries.
OPTIONS = ["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "-o", "timeout=0"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]

#: Libraries that are imported once, for all processes.
HEAVY = (
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
    "transformers.trainer",
    "transformers.image_processing_utils",
)
HEAVY += ("onnx", "onnxruntime", "onnxscript", "datasets", "hypothesis", "networkx", "PIL.Image")

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


def places_in(name: str) -> list[tuple[str, int]]:
    """All mutants that there are of a file, by number."""
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    return [(name, number) for number, _ in enumerate(_changes_of(tree))]


def mutant_of(name: str, number: int) -> Mutant:
    """One of them."""
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    node, other, parent, field = next(itertools.islice(_changes_of(tree), number, None))
    before, after = (ast.unparse(x).splitlines()[0] for x in (node, other))
    _replace(parent, field, node, ast.copy_location(other, node))
    code = compile(ast.fix_missing_locations(tree), str(PACKAGE / name), "exec")
    return Mutant(name, getattr(node, "lineno", 0), f"{before}  →  {after}", code)


def _changes_of(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, ast.AST, str]]:
    """A node, what may stand in its place, its parent, and the field of that."""
    parents = {child: (parent, field) for parent in ast.walk(tree) for child, field in _children(parent)}
    for node in [node for node in ast.walk(tree) if node in parents and is_code(node, parents)]:
        for other in mutated(node):
            yield node, other, *parents[node]


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


class FirstFailure:
    """A plugin of pytest that writes what fails into a pipe: a test, or a file of tests that cannot be imported."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test, or what it needs, has run."""
        if report.failed:
            os.write(self.pipe, f"{report.nodeid}\n".encode())

    pytest_collectreport = pytest_runtest_logreport


def outcome(mutant: Mutant | None, tests: Sequence[str], limit: int) -> tuple[str, str]:
    """What becomes of it, and the first test that fails, if one does.

    It is `"killed"`: a test fails; `"timed out"`: they take more than `limit` seconds of a core; or `"survived"`.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run_tests(mutant, tests, limit, writing)
    os.close(writing)
    end = _end_of(child, time.monotonic() + PATIENCE * limit)
    with open(reading, encoding="utf-8") as pipe:
        return end, pipe.readline().strip()


def _end_of(child: int, deadline: float) -> str:
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "timed out" if code == -signal.SIGXCPU else "killed" if code else "survived"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out"


def _run_tests(mutant: Mutant | None, tests: Sequence[str], limit: int, pipe: int) -> None:
    """In a group of processes of its own, which ends here."""
    import pytest

    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    status = 3
    try:
        if mutant is not None:
            sys.meta_path.insert(0, Changed(mutant))
        status = int(pytest.main([*OPTIONS, *tests], plugins=[FirstFailure(pipe)]))
    finally:
        os._exit(status)


def failing_anyway(failed: set[str], limit: int) -> str:
    """What fails without a mutant as well, of tests and of files that could not be imported; `""` is nothing."""
    tests, files = sorted(x for x in failed if "::" in x), sorted(x for x in failed if "::" not in x)
    for again in (tests, ["--collect-only", *files] if files else []):
        end, what = outcome(None, again, limit * len(failed)) if again else ("survived", "")
        if end != "survived":
            return what or " ".join(again)
    return ""


def drawn(count: int, seed: int, only: str) -> list[Mutant]:
    """So many mutants at random, of files whose name holds `only`."""
    every = [place for name in TARGETS if only in name for place in places_in(name)]
    print(f"{len(every)} mutants, of which {min(count, len(every))} are tried (seed {seed})", flush=True)
    return [mutant_of(*place) for place in random.Random(seed).sample(every, min(count, len(every)))]


def main() -> None:
    """Try them; print each that survives, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the files")
    parser.add_argument("--limit", type=int, default=150, help="seconds of a core for the tests of one mutant")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # as in tests/conftest.py
    for heavy in HEAVY:
        importlib.import_module(heavy)
    tried: Counter[str] = Counter()
    killed: Counter[str] = Counter()
    failed = set()
    for mutant in drawn(options.mutants, options.seed, options.only):
        tests = tests_of(mutant.name)
        end, what = outcome(mutant, tests, options.limit)
        if end == "timed out" and outcome(None, tests, options.limit)[0] == "timed out":
            sys.exit(f"without a mutant of {mutant.name}, its tests take more than {options.limit} s as well: --limit")
        failed.add(what)
        tried[mutant.name] += 1
        killed[mutant.name] += end != "survived"
        print(f"{end:9} {mutant.name}:{mutant.line}  {mutant.change}  {what}", flush=True)
    if what := failing_anyway(failed - {""}, options.limit):
        sys.exit(f"this fails without a mutant as well: {what}")
    for name in sorted(tried):
        print(f"{name:40} {killed[name]:3} of {tried[name]:3}")
    print(f"{'all':40} {killed.total():3} of {tried.total():3}: {killed.total() / max(1, tried.total()):.0%}")


if __name__ == "__main__":
    main()
