"""From a converted model to a verified ONNX file."""

from hf_qat.export.onnx import export_onnx
from hf_qat.export.report import Agreement, ExportReport
from hf_qat.export.verify import verify_onnx


__all__ = ["Agreement", "ExportReport", "export_onnx", "verify_onnx"]
