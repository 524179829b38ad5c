"""Int8 quantization-aware training for Hugging Face vision models: the table of contents.

`import hf_qat` registers the quantizer with transformers, so that `from_pretrained` knows our checkpoints. Every name
but `targets` is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Registers with transformers, which has no other way to find it than that it is imported.
from hf_qat import hf_quantizer as _hf_quantizer  # noqa: F401

# Not lazy: the first import of a submodule binds it on the package, so if that came later, the module `hf_qat.targets`
# would hide the function of that name. Now it is in `sys.modules`, and later imports of it bind nothing.
from hf_qat.targets import targets
from hf_qat.version import __version__


#: The module that each public name lives in.
_HOME = {
    "QATConfig": "config",
    "QATFxModule": "fx_module",
    "QATSchedule": "schedule",
    "QATTrainer": "trainer",
    "calibrate": "calibration",
    "check_tidl": "tidl",
    "convert": "conversion",
    "export_onnx": "export",
    "export_tidl": "tidl",
    "fake_quant_disabled": "prepare",
    "freeze_batch_norm": "prepare",
    "freeze_ranges": "prepare",
    "load_weights": "weights",
    "prepare_qat": "prepare",
    "verify_onnx": "export",
}

__all__ = ["__version__", "targets", *_HOME]  # noqa: PLE0604

if TYPE_CHECKING:
    from hf_qat.calibration import calibrate as calibrate
    from hf_qat.config import QATConfig as QATConfig
    from hf_qat.conversion import convert as convert
    from hf_qat.export import export_onnx as export_onnx
    from hf_qat.export import verify_onnx as verify_onnx
    from hf_qat.fx_module import QATFxModule as QATFxModule
    from hf_qat.prepare import fake_quant_disabled as fake_quant_disabled
    from hf_qat.prepare import freeze_batch_norm as freeze_batch_norm
    from hf_qat.prepare import freeze_ranges as freeze_ranges
    from hf_qat.prepare import prepare_qat as prepare_qat
    from hf_qat.schedule import QATSchedule as QATSchedule
    from hf_qat.tidl import check_tidl as check_tidl
    from hf_qat.tidl import export_tidl as export_tidl
    from hf_qat.trainer import QATTrainer as QATTrainer
    from hf_qat.weights import load_weights as load_weights
else:  # hidden from type checkers, to which a module with `__getattr__` has every name there is

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
