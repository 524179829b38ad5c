"""Int8 quantization-aware training for Hugging Face vision models: the table of contents.

`import hf_qat` registers the quantizer with transformers, so that `from_pretrained` knows our checkpoints. Every name
but `targets` is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Registers with transformers, which has no other way to find it than that it is imported.
from hf_qat.checkpoints import hf_quantizer as _hf_quantizer  # noqa: F401
from hf_qat.config.targets import targets

# Registers the observers that a recipe can name.
from hf_qat.quantization import observers as _observers  # noqa: F401
from hf_qat.version import __version__


#: The module that each public name lives in.
_HOME = {
    "QATConfig": "config.qat_config",
    "QATFxModule": "model.fx_module",
    "QATSchedule": "model.schedule",
    "QATTrainer": "trainer.trainer",
    "analyze": "model.analysis.analyze",
    "calibrate": "model.calibration",
    "check_tidl": "tidl.check",
    "convert": "model.conversion",
    "export_onnx": "export.onnx",
    "export_tidl": "tidl.bundle",
    "fake_quant_disabled": "model.switches",
    "freeze_batch_norm": "model.switches",
    "freeze_ranges": "model.switches",
    "load_weights": "checkpoints.load_weights",
    "parameter_groups": "model.parameter_groups",
    "prepare_qat": "model.prepare",
    "verify_onnx": "export.verify",
}

__all__ = ["__version__", "targets", *_HOME]  # noqa: PLE0604

if TYPE_CHECKING:
    from hf_qat.checkpoints.load_weights import load_weights as load_weights
    from hf_qat.config.qat_config import QATConfig as QATConfig
    from hf_qat.export.onnx import export_onnx as export_onnx
    from hf_qat.export.verify import verify_onnx as verify_onnx
    from hf_qat.model.analysis.analyze import analyze as analyze
    from hf_qat.model.calibration import calibrate as calibrate
    from hf_qat.model.conversion import convert as convert
    from hf_qat.model.fx_module import QATFxModule as QATFxModule
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
