"""The package as a table of contents. What an import does is seen only in a fresh interpreter."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_qat


ROOT = Path(hf_qat.__file__).parent

#: Spares a program the seconds that importing transformers takes, where it is about the names of the package alone.
UNREGISTERED = "import sys, types; sys.modules['hf_qat.checkpoints.hf_quantizer'] = types.ModuleType('hf_quantizer')"


def run(program: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_qat",
        "import hf_qat; import hf_qat.config.targets",
        "import hf_qat.config.targets; import hf_qat",
        "from hf_qat.config.targets import Target; import hf_qat",
        "import hf_qat; from hf_qat.config.targets import Target",
        "import hf_qat, importlib; importlib.import_module('hf_qat.config.targets')",
    ],
)
def test_targets_stays_a_function_whoever_imports_the_submodule(imports):
    assert run(f"{UNREGISTERED}\n{imports}\nprint(hf_qat.targets()[0])") == "int8"


def test_importing_the_package_loads_no_model_code_and_nothing_that_only_some_need():
    heavy = ("transformers.modeling_utils", "transformers.trainer", "onnx", "onnxruntime", "datasets")
    assert run(f"import sys, hf_qat; print([name for name in {heavy} if name in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_qat; from transformers.quantizers.auto import *",
        pytest.param("from transformers.quantizers.auto import *; import hf_qat", marks=pytest.mark.slow),
        pytest.param(
            "import hf_qat; from transformers import PreTrainedModel; from transformers.quantizers.auto import *",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_importing_the_package_registers_it_with_transformers(imports):
    program = (
        f"{imports}; "
        "print(AUTO_QUANTIZER_MAPPING['hf_qat'].__module__, AUTO_QUANTIZATION_CONFIG_MAPPING['hf_qat'].__name__)"
    )
    assert run(program) == "hf_qat.checkpoints.hf_quantizer QATConfig"


@pytest.mark.parametrize(
    "imports",
    [
        "from hf_qat.config.qat_config import QATConfig",
        pytest.param("from hf_qat import QATConfig", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_knows_our_observers_wherever_it_is_imported_from(imports):
    program = f"{imports}; print(QATConfig(activations={{'observer': 'percentile'}}).activation_scheme.observer)"
    assert run(program) == "percentile"


def test_importing_the_package_loads_neither_pytorch_nor_transformers():
    assert run("import sys, hf_qat; print({'torch', 'transformers'} & sys.modules.keys())") == "set()"


def test_the_config_loads_neither_onnx_nor_datasets():
    heavy = ("onnx", "onnxruntime", "onnxscript", "datasets")
    program = f"import sys, hf_qat; hf_qat.QATConfig; print([name for name in {heavy} if name in sys.modules])"
    assert run(program) == "[]"


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == {name: f"hf_qat.{module}" for name, module in hf_qat._HOME.items()}


def test_every_name_in_the_table_of_contents_can_be_imported():
    for name in hf_qat.__all__:
        assert getattr(hf_qat, name) is not None


def test_dir_lists_names_that_are_not_loaded_yet():
    assert (
        run(f"{UNREGISTERED}\nimport hf_qat; print('QATTrainer' in dir(hf_qat), 'targets' in dir(hf_qat))")
        == "True True"
    )


def test_a_misspelled_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'QATConfg'"):
        _ = hf_qat.QATConfg


def test_a_lazy_name_is_the_object_of_its_module():
    from hf_qat.config.qat_config import QATConfig

    assert hf_qat.QATConfig is QATConfig


#: Forks a process for each module, so that what all of them need is loaded once.
EACH_FIRST = """
import importlib, os, sys
import torch, transformers, onnx, numpy
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(failed)
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
def test_every_module_can_be_the_first_that_is_imported():
    skipped = set() if find_spec("triton") else {"activation", "arithmetic", "weight", "weights_together"}
    names = [
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        for path in sorted(ROOT.rglob("*.py"))
        if "templates" not in path.parts and path.name != "__main__.py"
        if not (path.parent.name == "kernels" and path.stem in skipped)
    ]
    command = [sys.executable, "-c", EACH_FIRST, *(name.removesuffix(".__init__") for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert len(names) > 200
