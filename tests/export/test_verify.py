from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import BatchFeature

from hf_qat import QATConfig, calibrate, convert, export_onnx, export_tidl, prepare_qat, verify_onnx
from hf_qat.errors import CaptureError, ExportError, StageError
from hf_qat.export.comparison import Comparison
from hf_qat.export.float_operators import output_steps
from hf_qat.export.report import Agreement, ExportReport
from hf_qat.export.verify import SIGNED_CODES_BUG, Session, require_agreement
from hf_qat.graph.capture.inputs import as_call
from tests.models import HUGGING_FACE, HandWritten, hand_written


@pytest.fixture(scope="module")
def own_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A plain module, converted, and its file with a static batch of 1."""
    model = prepare_qat(hand_written(), QATConfig("int8"), torch.randn(4, 3, 16, 16))
    convert(calibrate(model, [torch.randn(8, 3, 16, 16)]))
    return model, export_onnx(model, tmp_path_factory.mktemp("exported") / "model.onnx", verify=False).path


def tampered(path: Path, directory: Path, name: str, factor: float) -> Path:
    """A copy of the file with one initializer multiplied."""
    file = onnx.load(path)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(file, directory / "tampered.onnx")
    return directory / "tampered.onnx"


def test_the_figures_are_those_of_a_comparison_by_hand(own_file, tmp_path):
    model, path = own_file
    path = tampered(path, tmp_path, "head.weight_scale", 1.3)  # so that there are differences to measure
    x = torch.randn(7, 3, 16, 16)

    report = verify_onnx(model, path, [x[:3], x[3:]])

    with torch.no_grad():
        expected = model(x).numpy()
    levels = onnxruntime.GraphOptimizationLevel
    settings = ((levels.ORT_DISABLE_ALL, report.plain), (levels.ORT_ENABLE_ALL, report.optimized))
    for level, agreement in settings:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(path, options)
        result = np.concatenate([session.run(None, {"x": sample[None]})[0] for sample in x.numpy()])
        assert agreement.max_abs_diff == pytest.approx(np.abs(result - expected).max())
        step = float(model.head.activation_quantizer.scale)
        assert agreement.max_output_lsb == round(np.abs(result - expected).max() / step) > 0
        assert agreement.top1_agreement == (result.argmax(1) == expected.argmax(1)).mean()
    assert report.samples == 7
    assert report.max_output_lsb == max(report.plain.max_output_lsb, report.optimized.max_output_lsb)


def test_a_file_of_another_model_is_found_out(own_file, tmp_path):
    model, path = own_file
    x = torch.randn(16, 3, 16, 16)
    assert verify_onnx(model, path, [x]).max_output_lsb <= 1
    report = verify_onnx(model, tampered(path, tmp_path, "head.weight_scale", -1.0), [x])
    assert report.max_output_lsb > 10
    assert report.top1_agreement < 0.5


@pytest.mark.slow
def test_top1_of_a_segmentation_model_counts_pixels(exported):
    case = HUGGING_FACE["segformer"]
    model, report = exported("segformer")
    session = onnxruntime.InferenceSession(report.path)
    report = verify_onnx(model, report.path, [{"pixel_values": case.pixels(2), "labels": case.labels(2)}])
    results = np.concatenate([session.run(None, {"pixel_values": x[None]})[0] for x in case.pixels(2).numpy()])
    with torch.no_grad():
        expected = model(pixel_values=case.pixels(2)).logits.numpy()
    assert report.optimized.top1_agreement == (results.argmax(1) == expected.argmax(1)).mean()


def test_nothing_to_compare_is_an_error(own_file):
    for nothing in ([], [torch.randn(0, 3, 16, 16)]):
        with pytest.raises(ExportError, match="`batches` is empty"):
            verify_onnx(*own_file, nothing)
    assert verify_onnx(*own_file, [torch.randn(0, 3, 16, 16), torch.randn(2, 3, 16, 16)]).samples == 2


def test_one_batch_is_not_taken_for_several_and_labels_not_for_an_input(own_file):
    x = torch.randn(2, 3, 16, 16)
    for batch in (x, {"x": x}):
        with pytest.raises(ExportError, match="one batch"):
            verify_onnx(*own_file, batch)
    with pytest.raises(CaptureError, match=r"do not fit HandWritten\.forward.*without labels"):
        verify_onnx(*own_file, [(x, torch.tensor([0, 1]))])


def test_another_number_of_inputs_is_an_error(own_file):
    class Two(HandWritten):
        def forward(self, x, y):
            return super().forward(x) + y

    model = prepare_qat(Two(), QATConfig(), (torch.randn(2, 3, 16, 16), torch.randn(2, 5)))
    batch = (torch.randn(2, 3, 16, 16), torch.randn(2, 5))
    convert(calibrate(model, [batch]))
    with pytest.raises(ExportError, match=r"takes 1 inputs \(x\), the batch has 2"):
        verify_onnx(model, own_file[1], [batch])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_real_numbers_of_another_type_are_refused_by_name(dtype, own_file, tmp_path):
    model, path = own_file
    images = torch.randn(1, 3, 16, 16, dtype=dtype)
    message = f"inputs are {dtype}, and the weights of HandWritten are torch.float32.*float()"
    with pytest.raises(ExportError, match=message):
        verify_onnx(model, path, [images])
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "model.onnx", images)
    with pytest.raises(ExportError, match=message):
        export_tidl(model, tmp_path / "bundle", "AM68A", [images])
    assert not any(tmp_path.iterdir())


def test_rows_of_which_one_has_more_than_another_are_not_put_together(tmp_path):
    """Key points: as many as there are numbers above 0."""
    path = tmp_path / "found.onnx"
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])
    places = onnx.helper.make_tensor_value_info("places", onnx.TensorProto.INT64, [2, "found"])
    nodes = [onnx.helper.make_node("Relu", ["x"], ["above"]), onnx.helper.make_node("NonZero", ["above"], ["places"])]
    graph = onnx.helper.make_graph(nodes, "found", [x], [places])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    session = Session(path, optimized=False)
    assert session.run([np.float32([[1, 0, 1, 0]])])[0].tolist() == [[0, 0], [0, 2]]
    with pytest.raises(ExportError, match=r"shapes \(2, 2\), \(2, 3\) cannot be put together"):
        session.run([np.float32([[1, 0, 1, 0], [1, 1, 1, 0]])])


def test_a_file_that_is_none_is_an_error(own_file, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no onnx")
    for name in ("broken.onnx", "missing.onnx"):
        with pytest.raises(ExportError, match=f"{name} cannot be read"):
            verify_onnx(own_file[0], tmp_path / name, [torch.randn(1, 3, 16, 16)])


def test_a_float_model_is_refused(own_file):
    with pytest.raises(StageError, match="prepare_qat"):
        verify_onnx(HandWritten(), own_file[1], [torch.randn(1, 3, 16, 16)])


@pytest.mark.parametrize("threads", [1, 2])
def test_onnx_runtime_takes_as_many_threads_as_torch(threads: int, own_file, monkeypatch):
    asked = []
    start = onnxruntime.InferenceSession

    def session(path, options, **more):
        asked.append(options.intra_op_num_threads)
        return start(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    verify_onnx(*own_file, [torch.randn(1, 3, 16, 16)])
    assert asked == [threads, threads]


def test_the_session_option_that_signed_codes_may_need_is_reported(own_file, monkeypatch):
    from hf_qat.export import verify

    opened = verify.open_session

    def refuse_by_default(path, optimized, threads, entries):
        if optimized and not entries:
            raise RuntimeError(f"Node (q): {SIGNED_CODES_BUG}.")
        return opened(path, optimized, threads, entries)

    monkeypatch.setattr(verify, "open_session", refuse_by_default)
    report = verify_onnx(*own_file, [torch.randn(2, 3, 16, 16)])
    assert report.session_options == {"session.qdqisint8allowed": "1"}
    assert "add_session_config_entry('session.qdqisint8allowed', '1')" in str(report)
    assert report.max_output_lsb <= 1


@pytest.mark.slow
def test_a_symmetric_model_verifies_at_opset_21(converted, tmp_path):
    model, case = converted("swin", "int8-symmetric"), HUGGING_FACE["swin"]
    batch = {"pixel_values": case.pixels(8, seed=1)}
    report = export_onnx(model, tmp_path / "model.onnx", batch, opset_version=21)
    assert report.top1_agreement >= 0.99


def figures(wanted: np.ndarray, got: np.ndarray, step: float | None = None) -> Agreement:
    comparison = Comparison([step])
    comparison.add([("logits", wanted)], [got])
    return comparison.result()


def report_of(agreement: Agreement) -> ExportReport:
    return ExportReport(Path("model.onnx"), 1, 17, 1, plain=agreement, optimized=agreement)


@pytest.mark.parametrize("step", [None, 0.1])
@pytest.mark.parametrize("side", ["torch", "ONNX Runtime", "both"])
def test_nan_is_no_agreement(side, step):
    values, nan = np.arange(12, dtype=np.float32).reshape(4, 3), np.full((4, 3), np.nan, np.float32)
    agreement = figures(values if side == "ONNX Runtime" else nan, values if side == "torch" else nan, step)
    assert agreement == Agreement(0.0, None, math.inf, math.inf)
    with pytest.raises(ExportError, match="computes something else"):
        require_agreement(report_of(agreement))


def test_infinities_of_one_sign_agree_and_of_two_do_not():
    values = np.array([[1.0, -np.inf, 3.0]], np.float32)
    assert figures(values, values) == Agreement(1.0, None, 0.0, 0.0)
    assert figures(values, -values).relative_error == math.inf


def test_the_relative_error_is_that_of_a_calculation_by_hand_and_a_step_is_no_error():
    wanted, got = np.array([[3.0, 4.0]], np.float32), np.array([[3.1, 2.0]], np.float32)
    assert figures(wanted, got).relative_error == pytest.approx(math.sqrt((0.1**2 + 2.0**2) / 25))
    assert figures(wanted, got, step=0.1).relative_error == pytest.approx(math.sqrt(2.0**2 / 25))
    assert figures(wanted, wanted + 0.1, step=0.1).relative_error == 0.0


def test_outputs_that_differ_by_more_than_half_of_their_size_fail():
    require_agreement(report_of(Agreement(1.0, 1, 0.1, 0.5)))
    with pytest.raises(ExportError, match=r"optimizations off.* by 51% of their size, at most 50%"):
        require_agreement(report_of(Agreement(1.0, 1, 0.1, 0.51)))


class Picks(nn.Module):
    """Gives back the larger of two values, or what is behind the other: equal but for what nobody sees."""

    def forward(self, x: Tensor) -> Tensor:
        first = (x[:, :1] > x[:, 1:2]).float()
        return torch.cat([first, 1 - first], 1)


def test_a_model_that_does_so_by_itself_may_differ_from_its_file_and_another_may_not(monkeypatch):
    from hf_qat.export import verify

    def run(model, batch):
        args, kwargs = as_call(batch)
        (x,) = (*args, *kwargs.values())
        return [x.numpy()], [("y", model(x).numpy())]

    monkeypatch.setattr(verify, "_run_torch", run)
    near, far = torch.tensor([[1.0, 1.0 + 1e-7]]), torch.tensor([[1.0, 2.0]])
    assert verify.sensitivity(Picks(), near, [None]) == pytest.approx(math.sqrt(2.0))
    assert verify.sensitivity(Picks(), far, [None]) == 0.0
    of_processor = BatchFeature({"x": near})
    assert verify.sensitivity(Picks(), of_processor, [None]) == pytest.approx(math.sqrt(2.0))

    swapped = figures(np.array([[0.0, 1.0]], np.float32), np.array([[1.0, 0.0]], np.float32))
    require_agreement(replace(report_of(swapped), sensitivity=verify.sensitivity(Picks(), near, [None])))
    with pytest.raises(ExportError, match="by 141% of their size"):
        require_agreement(replace(report_of(swapped), sensitivity=verify.sensitivity(Picks(), far, [None])))


class Summed(nn.Module):
    """What comes out is no row for each image."""

    def __init__(self, how) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 3), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self.linear(x))


#: Rows of pixels; one number; both halves after one another; products of all images with all.
RESULTS = {
    "rows": lambda y: y.reshape(-1, 3),
    "number": lambda y: y.mean(),
    "halves": lambda y: torch.cat([y, 2 * y]),
    "products": lambda y: y.flatten(1) @ y.flatten(1).T,
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static batch", "dynamic batch"])
@pytest.mark.parametrize("name", RESULTS)
def test_outputs_that_are_no_row_for_each_image_are_compared_in_the_batch_of_the_file(name, dynamic, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 4)
    model = convert(calibrate(prepare_qat(Summed(RESULTS[name]), example_inputs=x), [x]))
    report = export_onnx(model, tmp_path / "model.onnx", x, dynamic_batch=dynamic)
    assert report.plain.max_abs_diff < 1e-5
    tampered_file = tampered(report.path, tmp_path, "linear.weight_scale", 0.3)
    changed = verify_onnx(model, tampered_file, [x])
    assert max(changed.plain.max_abs_diff, changed.optimized.max_abs_diff) > 0.01


class WithBag(nn.Module):
    """A bag of embeddings, and a linear layer of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.linear = nn.EmbeddingBag(10, 4, mode="sum"), nn.Linear(4, 4)

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.bag(indices, offsets) + self.linear(x)


def test_inputs_whose_first_axis_is_not_the_batch_are_refused_with_the_way_out(tmp_path):
    inputs = torch.arange(8) % 10, torch.arange(0, 8, 2), torch.randn(4, 4)
    model = convert(calibrate(prepare_qat(WithBag(), example_inputs=inputs), [inputs]))
    with pytest.raises(ExportError, match=r"inputs of 8, 4, 4 rows do not fit.*verify=False"):
        export_onnx(model, tmp_path / "bag.onnx", inputs)


@pytest.mark.parametrize("setting", ["off", "on"])
def test_a_fault_in_one_setting_alone_fails_the_export_and_leaves_no_file(setting, own_file, tmp_path, monkeypatch):
    from hf_qat.export import verify

    run = verify.Session.run

    def faulty(self, inputs):
        results = run(self, inputs)
        return [np.zeros_like(result) for result in results] if self.optimized == (setting == "on") else results

    monkeypatch.setattr(verify.Session, "run", faulty)
    with pytest.raises(ExportError, match=rf"optimizations {setting}\) computes something else"):
        export_onnx(own_file[0], tmp_path / "model.onnx", torch.randn(4, 3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_a_number_for_the_whole_batch_is_compared_as_the_mean_of_its_parts(tmp_path):
    class WithLoss(HandWritten):
        def forward(self, x):
            scores = super().forward(x)
            return scores, scores.square().mean()

    x = torch.randn(6, 3, 16, 16)
    model = convert(calibrate(prepare_qat(WithLoss(), QATConfig(), x), [x]).eval())
    report = export_onnx(model, tmp_path / "model.onnx", x)
    step = max(value for value in output_steps(onnx.load(report.path)) if value is not None)
    assert report.samples == 6 and report.plain.max_abs_diff <= step
