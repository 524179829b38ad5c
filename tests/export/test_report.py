from __future__ import annotations

from pathlib import Path

import torch

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.export.report import Agreement, ExportReport
from hf_qat.model.in_float import FloatOperation
from tests.models import hand_written


def test_a_report_reads_as_text():
    report = ExportReport(
        path=Path("out/model.onnx"),
        size=2_345_000,
        opset=17,
        num_quantize_nodes=12,
        float_ops={"Conv": ["stem/Conv", "body/Conv"], "Gemm": ["head/Gemm"]},
        samples=8,
        plain=Agreement(top1_agreement=1.0, max_output_lsb=1, max_abs_diff=0.0125),
        optimized=Agreement(top1_agreement=0.875, max_output_lsb=3, max_abs_diff=0.0375),
    )
    assert str(report).splitlines() == [
        "out/model.onnx: opset 17, 12 quantizers, 2.35 MB",
        "  in float: 2 Conv (stem/Conv, …), Gemm (head/Gemm)",
        "  ONNX Runtime against torch on 8 inputs:",
        "    optimizations off:  top-1 agreement 100.00%, largest difference 0.0125 (1 LSB)",
        "    optimizations on:   top-1 agreement 87.50%, largest difference 0.0375 (3 LSB)",
    ]
    assert (report.top1_agreement, report.max_output_lsb, report.max_abs_diff) == (0.875, 3, 0.0375)


def test_a_report_without_verification_has_no_figures_and_says_so():
    report = ExportReport(Path("model.onnx"), size=1000, opset=18, num_quantize_nodes=0)
    assert (report.top1_agreement, report.max_output_lsb, report.max_abs_diff) == (None, None, None)
    assert str(report).splitlines()[1:] == ["  in float: nothing", "  not verified on ONNX Runtime"]


def test_outputs_without_classes_or_quantizer_give_only_a_difference():
    agreement = Agreement(top1_agreement=None, max_output_lsb=None, max_abs_diff=0.5)
    report = ExportReport(Path("m.onnx"), 1, 17, 3, samples=2, plain=agreement, optimized=agreement)
    assert (report.top1_agreement, report.max_output_lsb) == (None, None)
    assert str(report).splitlines()[-1] == "    optimizations on:   largest difference 0.5"


def test_reasons_are_those_that_the_graphs_of_the_model_know():
    operations = (
        FloatOperation("body.conv", "conv2d", "excluded"),
        FloatOperation("a.attention", "add", "belongs to the softmax"),
        FloatOperation("b.attention", "add", "belongs to the softmax"),
    )
    report = ExportReport(Path("m.onnx"), 1, 17, 3, {"Conv": ["body/Conv"]}, operations)
    assert str(report).splitlines()[1:4] == [
        "  in float: Conv (body/Conv)",
        "    excluded: conv2d (body.conv)",
        "    belongs to the softmax: 2 add (a.attention, …)",
    ]
    report = ExportReport(Path("m.onnx"), 1, 17, 3, {}, operations[1:])
    assert str(report).splitlines()[1] == "  in float: only between quantizers"


def test_an_export_reports_the_operations_and_reasons_of_its_model(tmp_path):
    model = prepare_qat(hand_written(), QATConfig("int8", exclude="body"), torch.randn(4, 3, 16, 16))
    convert(calibrate(model, [torch.randn(8, 3, 16, 16)]))
    for verify in (False, True):
        report = export_onnx(model, tmp_path / "model.onnx", verify=verify)
        assert report.float_operations == (FloatOperation("body", "conv2d", "excluded by the recipe"),)
