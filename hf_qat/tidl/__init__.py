"""From a verified ONNX file to what Texas Instruments' compiler takes: a check of every layer, and a bundle."""

from hf_qat.tidl.artifacts import pack_artifacts
from hf_qat.tidl.bundle import export_tidl
from hf_qat.tidl.check import check_tidl
from hf_qat.tidl.report import Issue, LayerReport, TidlReport


__all__ = ["Issue", "LayerReport", "TidlReport", "check_tidl", "export_tidl", "pack_artifacts"]
