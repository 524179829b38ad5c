"""The rooms of the package and what each may import; and its sizes.

    python -m tests.structure

prints rooms, arrows, arrows that run up, files without a test at the mirrored path, and sizes. `test_structure.py`
requires what must hold.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median, quantiles


ROOT = Path(__file__).parents[1]

#: The way that imports flow. A room may import those of the lines before its own, none on its own line.
FLOW = (
    ("errors", "version"),
    ("files", "config"),
    ("quantization",),
    ("graph",),
    ("model",),
    ("checkpoints", "export"),
    ("tidl",),
    ("publish",),
    ("trainer",),
    ("cli",),
    ("__init__", "__main__"),
)

#: Room → the rooms that it may import.
MAY_IMPORT = {
    room: {earlier for before in FLOW[:level] for earlier in before}
    for level, line in enumerate(FLOW)
    for room in line
}

#: What makes a tensor of the default type, unless it is told another one.
TENSOR_MAKERS = frozenset(
    f"torch.{name}" for name in "empty eye full linspace ones rand randn scalar_tensor tensor zeros".split()
)

#: The table of contents, which names what is loaded later; it registers with transformers when it is imported.
CONTENTS = "__init__"


@dataclass(frozen=True)
class Function:
    """A function or method, and what it says about itself."""

    name: str
    lines: int
    public: bool
    documented: bool
    typed: bool


@dataclass(frozen=True)
class Module:
    """A file of a package.

    Attributes:
        name: dotted, without the package; of `room/__init__.py` that of the room, of the package's own `__init__`.
        path: of the file.
        package: of which the file is a part.
        modules: the names of all files of the package.
    """

    name: str
    path: Path
    package: str
    modules: frozenset[str]

    @property
    def room(self) -> str:
        """The first part of the name."""
        return self.name.partition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def lines(self) -> int:
        """Of the file."""
        return len(self.path.read_text(encoding="utf-8").splitlines())

    @cached_property
    def imports(self) -> frozenset[str]:
        """The files of the package that this one imports, also inside functions and for types only."""
        return frozenset(found for name in self._imported() if (found := self._file_of(name))) - {self.name}

    def _imported(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def _file_of(self, dotted: str) -> str | None:
        """The longest beginning of `dotted` that is a file of the package; `None` of another package."""
        first, _, rest = dotted.partition(".")
        if first != self.package:
            return None
        parts = rest.split(".") if rest else []
        beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((name for name in beginnings if name in self.modules), CONTENTS)

    @property
    def untyped_tensors(self) -> list[int]:
        """Lines where PyTorch makes a tensor whose type is what the program has set as its default."""
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        return [
            call.lineno
            for call in calls
            if ast.unparse(call.func) in TENSOR_MAKERS and "dtype" not in {keyword.arg for keyword in call.keywords}
        ]

    @property
    def relative_imports(self) -> list[int]:
        """Lines with `from .… import`, which `imports` does not follow."""
        return [node.lineno for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom) and node.level]

    @cached_property
    def functions(self) -> list[Function]:
        """All of the file; a method is public if its class is."""
        return list(_functions(self.tree, public=True, within=""))

    @property
    def has_logic(self) -> bool:
        """Whether there is a function with more than a docstring in it."""
        return any(function.lines > 2 for function in self.functions)


def _functions(tree: ast.AST, public: bool, within: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Of overloads the implementation counts; what Triton compiles is a kernel, and no function of Python's.
            if any(ast.unparse(decorator) in ("overload", "triton.jit") for decorator in node.decorator_list):
                continue  # says nothing of its own
            shown = public and not node.name.startswith("_")
            yield Function(
                name=within + node.name,
                lines=(node.end_lineno or node.lineno) - node.lineno + 1,
                public=shown,
                documented=ast.get_docstring(node) is not None,
                typed=node.returns is not None,
            )
            yield from _functions(node, False, f"{within}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, public and not node.name.startswith("_"), f"{within}{node.name}.")
        else:
            yield from _functions(node, public, within)


def modules_of(root: Path) -> list[Module]:
    """The files of the package at `root`, templates that are copied elsewhere among them."""
    files = {_name(file, root): file for file in sorted(root.rglob("*.py"))}
    return [Module(name, file, root.name, frozenset(files)) for name, file in files.items()]


def _name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def arrows(modules: list[Module]) -> dict[tuple[str, str], list[str]]:
    """(importing room, imported room) → `file → file`, of all imports from one room to another."""
    rooms = {module.name: module.room for module in modules}
    found: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        for imported in sorted(module.imports):
            if rooms[imported] != module.room:
                found.setdefault((module.room, rooms[imported]), []).append(f"{module.name} → {imported}")
    return found


def upward(modules: list[Module], may_import: dict[str, set[str]] = MAY_IMPORT) -> list[str]:
    """`file → file` of the imports that their rooms may not make."""
    return [
        line
        for (importing, imported), lines in arrows(modules).items()
        if imported not in may_import.get(importing, set())
        for line in lines
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that import each other in a circle, the first of them again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def untested(modules: list[Module], tests: Path) -> list[str]:
    """Names of files with logic that have no test at the mirrored path: `room/test_file.py` of `room/file.py`."""
    return [module.name for module in modules if module.has_logic and not (tests / _mirror(module.name)).exists()]


def _mirror(name: str) -> str:
    *folders, file = name.split(".")
    return "/".join([*folders, f"test_{file.strip('_')}.py"])


def sizes(modules: list[Module]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Median, 90th percentile and largest number of lines: of the files, and of the functions in them."""
    files = [module.lines for module in modules]
    functions = [function.lines for module in modules for function in module.functions]
    return _spread(files), _spread(functions)


def _spread(numbers: list[int]) -> tuple[float, ...]:
    return median(numbers), quantiles(numbers, n=10, method="inclusive")[-1], max(numbers)


def code_files(modules: list[Module]) -> list[Module]:
    """Without `__init__.py`."""
    return [module for module in modules if module.path.stem != "__init__"]


def main() -> None:
    """Print the house as it stands."""
    modules = modules_of(ROOT / "hf_qat")
    found = arrows(modules)
    print("room          imports")
    for room in MAY_IMPORT:
        print(f"{room:13} {', '.join(sorted({to for start, to in found if start == room})) or '-'}")
    print(f"\n{len(found)} arrows between rooms; those that run up:")
    print("\n".join(upward(modules)) or "none")
    print("\nfiles in a circle:", " → ".join(circle({one.name: set(one.imports) for one in modules})) or "none")
    missing = untested(modules, ROOT / "tests")
    print("\nfiles with logic without a test at the mirrored path:", *missing or ["none"], sep="\n")
    files, functions = sizes(code_files(modules))
    print("\nlines (median / 90th percentile / longest)")
    for what, numbers in (("files", files), ("functions", functions)):
        print(f"{what:10}{' / '.join(f'{number:.0f}' for number in numbers)}")
    shown = [function for module in code_files(modules) for function in module.functions if function.public]
    for what, count in (("docstring", sum(f.documented for f in shown)), ("return type", sum(f.typed for f in shown))):
        print(f"public functions with a {what}: {count} of {len(shown)} ({count / len(shown):.0%})")


if __name__ == "__main__":
    main()
