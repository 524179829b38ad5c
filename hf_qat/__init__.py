"""Int8 quantization-aware training for Hugging Face vision models: the table of contents.

After `import hf_qat`, `from_pretrained` of transformers knows our checkpoints. Every name but `targets` is loaded on
first use, and so is PyTorch: what registers with a table is loaded together with that table.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from hf_qat.config.targets import targets
from hf_qat.version import __version__


#: The module of a table → the module of ours that enters itself there when it is imported.
_REGISTRANTS = {
    "transformers.quantizers.auto": "hf_qat.checkpoints.hf_quantizer",  # the table that from_pretrained reads
    "hf_qat.config.observers": "hf_qat.quantization.observers",  # the observers that a recipe can name
}


class _RegisterOnceLoaded(MetaPathFinder):
    """Has a registrant imported as soon as the module of its table is loaded, whoever imports that."""

    def __init__(self) -> None:
        self.waiting = dict(_REGISTRANTS)

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that all other finders give, with one more thing to do after loading."""
        registrant = self.waiting.pop(fullname, None)
        spec = None if registrant is None else find_spec(fullname)
        if registrant is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            import_module(registrant)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _RegisterOnceLoaded())
for _table in _REGISTRANTS.keys() & sys.modules.keys():
    import_module(_REGISTRANTS[_table])


#: The module that each public name lives in.
_HOME = {
    "QATArguments": "cli.arguments",
    "QATConfig": "config.qat_config",
    "QATFxModule": "model.fx_module",
    "QATSchedule": "model.schedule",
    "QATTrainer": "trainer.trainer",
    "analyze": "model.analysis.analyze",
    "analyze_onnx": "export.onnx_analysis",
    "calibrate": "model.calibration",
    "check_tidl": "tidl.check",
    "compute_in_integers": "model.integer_arithmetic",
    "convert": "model.conversion",
    "export_onnx": "export.onnx",
    "export_tidl": "tidl.bundle",
    "fake_quant_disabled": "model.switches",
    "freeze_batch_norm": "model.switches",
    "freeze_ranges": "model.switches",
    "load_weights": "checkpoints.load_weights",
    "parameter_groups": "model.parameter_groups",
    "prepare_qat": "model.prepare",
    "read_recipe": "config.recipes",
    "verify_onnx": "export.verify",
}

__all__ = ["__version__", "targets", *_HOME]  # noqa: PLE0604

if TYPE_CHECKING:
    from hf_qat.checkpoints.load_weights import load_weights as load_weights
    from hf_qat.cli.arguments import QATArguments as QATArguments
    from hf_qat.config.qat_config import QATConfig as QATConfig
    from hf_qat.config.recipes import read_recipe as read_recipe
    from hf_qat.export.onnx import export_onnx as export_onnx
    from hf_qat.export.onnx_analysis import analyze_onnx as analyze_onnx
    from hf_qat.export.verify import verify_onnx as verify_onnx
    from hf_qat.model.analysis.analyze import analyze as analyze
    from hf_qat.model.calibration import calibrate as calibrate
    from hf_qat.model.conversion import convert as convert
    from hf_qat.model.fx_module import QATFxModule as QATFxModule
    from hf_qat.model.integer_arithmetic import compute_in_integers as compute_in_integers
    from hf_qat.model.parameter_groups import parameter_groups as parameter_groups
    from hf_qat.model.prepare import prepare_qat as prepare_qat
    from hf_qat.model.schedule import QATSchedule as QATSchedule
    from hf_qat.model.switches import fake_quant_disabled as fake_quant_disabled
    from hf_qat.model.switches import freeze_batch_norm as freeze_batch_norm
    from hf_qat.model.switches import freeze_ranges as freeze_ranges
    from hf_qat.tidl.bundle import export_tidl as export_tidl
    from hf_qat.tidl.check import check_tidl as check_tidl
    from hf_qat.trainer.trainer import QATTrainer as QATTrainer
else:  # hidden from type checkers, to which a module with `__getattr__` has every name there is

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
