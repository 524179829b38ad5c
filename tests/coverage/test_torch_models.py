"""Every model of PyTorch's own quantization tests: itself after `prepare_qat`, and exported, or refused by name.

Of the 148 models that its 100 classes make, 138 come out of ONNX Runtime as of torch; 7 are refused when they are
prepared, and 3 when they are exported.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat import calibrate, convert, export_onnx, fake_quant_disabled, freeze_batch_norm, prepare_qat
from hf_qat.errors import CaptureError, ExportError
from tests.coverage.torch_models import CASES, TorchCase, found


#: What every run tries: one of each kind; the others are slow together.
SAMPLE = (
    "AnnotatedConvBnReLUModel()",
    "ConvTransposeModel()",
    "LinearBnLeakyReluModel()",
    "RNNDynamicModel(mod_type=LSTM)",
    "TestHelperModules.Conv2dWithTwoCat()",
    "EmbBagWrapper(num_embeddings=10, embedding_dim=5)",
)

#: Model → what the refusal to prepare it says. Each takes one batch size only, or decides by data what it computes.
NOT_PREPARED = {
    "TestHelperModules.Conv2dThenConv1d()": "Expected 2D .unbatched. or 3D .batched. input to conv1d",
    "TestHelperModules.Conv2dWithTwoLinear()": "shape '.2, 64.' is invalid",
    "RNNDynamicModel(mod_type=GRU)": "fixes dimension 0 of its input 0 to 2",
    "RNNDynamicModel(mod_type=LSTM)": "fixes dimension 0 of its input 0 to 2",
    "LSTMwithHiddenDynamicModel()": r"Expected hidden.0. size \(1, 3, 2\), got .2, 3, 2.",
    "EmbeddingBagModule()": "fixes dimension 0 of its input 1 to 2",
    "TestHelperModules.ControlFlow()": "Boolean value of Tensor with more than one value is ambiguous",
}

#: Model → what the refusal to export it says: rows of several lengths, of which the first axis is no batch.
NOT_EXPORTED = {
    "EmbeddingWithStaticLinear()": "inputs of 4, 2, 2 rows do not fit a file for a batch of 1",
    "EmbBagWrapper(num_embeddings=10, embedding_dim=5)": "inputs of 4, 2 rows do not fit a file for a batch of 1",
    "SparseNNModel()": "inputs of 4, 2, 2 rows do not fit a file for a batch of 1",
}

#: Relative to the largest value of a tensor, and to the largest gradient: another order of sums.
TOLERANCE, NOISE = 1e-3, 1e-5

#: Relative error of the outputs that rounding to codes of another kernel may come to.
ROUNDING = 0.05


def run(model: nn.Module, names: list[str], inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of the inputs and of the parameters with these names."""
    inputs = pytree.tree_map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, inputs)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    outputs = [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    sum((y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outputs if y.requires_grad).backward()
    parameters = dict(model.named_parameters())
    gradients = [x.grad for x in pytree.tree_leaves(inputs)] + [parameters[name].grad for name in names]
    return [y.detach() for y in outputs], gradients


def assert_same(ours: list[Tensor | None], theirs: list[Tensor | None], noise: float = 0.0) -> None:
    assert [y is None for y in ours] == [y is None for y in theirs]
    largest = max((float(y.abs().max()) for y in theirs if y is not None), default=0.0)
    for mine, expected in zip(ours, theirs, strict=True):
        if mine is not None and expected is not None:
            allowed = TOLERANCE * float(expected.abs().max()) + noise * largest
            torch.testing.assert_close(mine, expected, rtol=0.0, atol=allowed)


def param(case: TorchCase) -> Any:
    return pytest.param(case, id=case.title, marks=[] if case.title in SAMPLE else [pytest.mark.slow])


def test_every_model_class_that_this_version_of_torch_has_is_in_the_table():
    assert found().keys() == {case.name for case in CASES}
    titles = {case.title for case in CASES}
    assert len(titles) == len(CASES) and titles >= {*SAMPLE, *NOT_PREPARED, *NOT_EXPORTED}


@pytest.mark.parametrize("case", [param(case) for case in CASES])
def test_a_model_of_torchs_own_tests_is_itself_and_is_exported_or_is_refused_by_name(case, tmp_path: Path):
    float_model = case.make()
    model = copy.deepcopy(float_model)
    if case.title in NOT_PREPARED:
        with pytest.raises(CaptureError, match=NOT_PREPARED[case.title]):
            prepare_qat(model, example_inputs=case.inputs(2))
        return
    prepare_qat(model, example_inputs=case.inputs(2))
    assert_is_the_float_model(case, model, float_model)
    model = prepare_qat(copy.deepcopy(float_model.eval()), example_inputs=case.inputs(2))
    convert(calibrate(model, [case.inputs(4)]))
    if case.title in NOT_EXPORTED:
        with pytest.raises(ExportError, match=NOT_EXPORTED[case.title]):
            export_onnx(model, tmp_path / "model.onnx", case.inputs(2))
        return
    report = export_onnx(model, tmp_path / "model.onnx", case.inputs(2))
    assert report.plain.relative_error <= ROUNDING and report.optimized.relative_error <= ROUNDING


def assert_is_the_float_model(case: TorchCase, model: nn.Module, float_model: nn.Module) -> None:
    """In both modes, at two batch sizes, with quantizers off."""
    freeze_batch_norm(model, False)
    names = [name for name, _ in float_model.named_parameters()]
    for training in (False, True):
        for batch in (4, 3):
            with fake_quant_disabled(model):
                ours = run(model.train(training), names, case.inputs(batch))
            theirs = run(float_model.train(training), names, case.inputs(batch))
            assert_same(ours[0], theirs[0])
            assert_same(ours[1], theirs[1], NOISE)
    buffers = dict(model.named_buffers())
    torch.testing.assert_close([buffers[name] for name, _ in float_model.named_buffers()], [*float_model.buffers()])
