"""The house keeps its shape: rooms, the one way of imports, names, sizes; and CONTRIBUTING.md says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.structure import (
    MAY_IMPORT,
    ROOT,
    arrows,
    circle,
    code_files,
    main,
    modules_of,
    sizes,
    untested,
    upward,
)


PACKAGE = ROOT / "hf_qat"

#: What may lie beside the rooms.
LOOSE = {"__init__.py", "__main__.py", "errors.py", "version.py", "py.typed"}

#: Says nothing about what is in there.
EMPTY_NAMES = {"support", "common", "utils", "util", "helpers", "helper", "misc"}


@pytest.fixture(scope="module")
def modules():
    return modules_of(PACKAGE)


def test_imports_between_rooms_run_one_way(modules):
    assert upward(modules) == []
    assert len(arrows(modules)) > 40


def test_every_room_has_its_place_in_the_flow(modules):
    assert {module.room for module in modules} == set(MAY_IMPORT)


def test_no_files_import_each_other_in_a_circle(modules):
    assert circle({module.name: set(module.imports) for module in modules}) == []


def test_no_import_is_relative(modules):
    assert {module.name: module.relative_imports for module in modules if module.relative_imports} == {}


def test_every_tensor_that_is_made_has_a_type_of_its_own(modules):
    """A program may have set `torch.set_default_dtype`, and kernels write float32 into what they are given."""
    assert {module.name: module.untyped_tensors for module in modules if module.untyped_tensors} == {}


def test_the_top_of_the_package_is_rooms_and_four_files():
    top = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert {path.name for path in top if path.is_file()} == LOOSE
    folders = [path for path in top if path.is_dir()]
    assert len(folders) <= 11 and all((folder / "__init__.py").is_file() for folder in folders)


def test_no_room_or_file_has_a_name_that_says_nothing():
    for root in (PACKAGE, ROOT / "tests"):
        names = [path.stem.strip("_").removeprefix("test_") for path in root.rglob("*") if path.suffix in ("", ".py")]
        assert EMPTY_NAMES & set(names) == set()


def test_files_and_functions_are_no_longer_than_before_there_were_rooms(modules):
    """114 lines had the median file then; 20 the function at the 90th percentile, 61 the longest."""
    files, functions = sizes(code_files(modules))
    assert files[0] <= 114 and functions[1] <= 20 and functions[2] <= 61


def test_every_public_function_says_what_it_does_and_what_it_returns(modules):
    silent = [
        f"{module.name}.{function.name}"
        for module in modules
        for function in module.functions
        if function.public and not (function.documented and function.typed)
    ]
    assert silent == []


def test_contributing_has_the_same_rooms_and_arrows():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)[/.]\S* \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    may_import: dict[str, set[str]] = {}
    for room, may in rows:
        sentence = re.fullmatch(r"nothing|all above(?: but (.+))?", may)
        assert sentence, may
        above = set(may_import) if may != "nothing" else set()
        may_import[room] = above - set(re.findall(r"`(\w+)`", sentence[1] or ""))
    assert may_import == MAY_IMPORT


class TestTheScript:
    """On packages made up for it."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        """Two rooms; `low` imports `high` in a function, and two of its files import each other."""
        files = {
            "__init__.py": "",
            "low/__init__.py": "",
            "low/first.py": "import house.low.second\n",
            "low/second.py": "def late():\n    from house.low import first\n    from house.high.file import thing\n",
            "low/third.py": "import os.path\nfrom other.high import thing\nfrom .first import x\n",
            "high/__init__.py": "",
            "high/file.py": "from house.low.first import x, y\nfrom house.low import third\n",
        }
        for name, text in files.items():
            (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "house" / name).write_text(text)
        return tmp_path / "house"

    def test_arrows_are_found_inside_functions_too(self, package):
        assert arrows(modules_of(package)) == {
            ("low", "high"): ["low.second → high.file"],
            ("high", "low"): ["high.file → low.first", "high.file → low.third"],
        }

    def test_an_arrow_that_runs_up_is_named(self, package):
        may_import = {"low": set(), "high": {"low"}}
        assert upward(modules_of(package), may_import) == ["low.second → high.file"]

    def test_a_circle_is_named(self, package):
        graph = {module.name: set(module.imports) for module in modules_of(package)}
        assert set(circle(graph)) >= {"low.first", "low.second"}
        assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []

    def test_a_relative_import_is_named(self, package):
        assert [one.name for one in modules_of(package) if one.relative_imports] == ["low.third"]

    def test_a_tensor_without_a_type_is_found(self, tmp_path):
        (tmp_path / "one").mkdir()
        lines = [
            "x = torch.zeros(3)",
            "y = torch.full((), 1.0, dtype=torch.float32)",
            "z = f(torch.tensor(x, device=y))",
        ]
        (tmp_path / "one" / "file.py").write_text("\n".join(lines))
        assert [module.untyped_tensors for module in modules_of(tmp_path / "one")] == [[1, 3]]

    def test_a_file_with_logic_needs_a_test_at_the_mirrored_path(self, package, tmp_path):
        assert untested(modules_of(package), tmp_path / "tests") == ["low.second"]
        (tmp_path / "tests" / "low").mkdir(parents=True)
        (tmp_path / "tests" / "low" / "test_second.py").touch()
        assert untested(modules_of(package), tmp_path / "tests") == []

    def test_functions_are_measured_and_their_docstrings_counted(self, tmp_path):
        (tmp_path / "one").mkdir()
        shown = ["def shown(x) -> int:", '    """Says."""', "    return x"]
        text = "\n".join([*shown, "class _Hidden:", "    def method(self):", "        pass"])
        (tmp_path / "one" / "file.py").write_text(text)
        (module,) = modules_of(tmp_path / "one")
        assert [(f.name, f.lines, f.public, f.documented, f.typed) for f in module.functions] == [
            ("shown", 3, True, True, True),
            ("_Hidden.method", 2, False, False, False),
        ]
        assert module.lines == 6

    def test_it_prints_the_house(self, capsys):
        main()
        printed = capsys.readouterr().out
        assert "\ngraph         config, errors, quantization\n" in printed
        assert "those that run up:\nnone\n" in printed and "in a circle: none\n" in printed
