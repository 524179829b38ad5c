"""From a converted model to a verified ONNX file."""

from hf_qat.export.onnx import export_onnx
from hf_qat.export.report import Agreement, ExportReport
from hf_qat.export.verify import require_agreement, verify_onnx


__all__ = ["Agreement", "ExportReport", "export_onnx", "require_agreement", "verify_onnx"]
