"""Decomposing without a trace, against PyTorch's own, which traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hf_qat import export_onnx
from hf_qat.export import decomposing
from hf_qat.export.decomposing import decompose, decomposing_in_place


aten = torch.ops.aten

#: Pooling of one axis is the one operator here that the exporter has no translation for.
TABLE = {
    aten.adaptive_avg_pool1d.default: torch.export.default_decompositions()[aten.adaptive_avg_pool1d.default],
}


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def program_of(function: Callable[[Tensor], Any], **options: Any) -> ExportedProgram:
    return torch.export.export(Function(function), (IMAGES,), **options)


def calls(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """What becomes a node of ONNX: operators, the numbers they are given, and the shapes of what they make.

    Copies and checks become none, and both kinds of views the same one.
    """
    return [
        (
            aten.view.default if node.target is aten._unsafe_view.default else node.target,
            [argument for argument in node.args if not isinstance(argument, torch.fx.Node)],
            node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else None,
        )
        for node in program.graph.nodes
        if node.op == "call_function" and node.target not in (aten.clone.default, aten._assert_tensor_metadata.default)
    ]


IMAGES = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)

FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.reshape(2, -1, 6) + 1,
    "reshape of what is transposed": lambda x: x.transpose(1, 3).reshape(2, 6, -1) + 1,
    "flatten": lambda x: (x.flatten(1) + 1).flatten(),
    "flatten of what is permuted": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2) * 2,
    "contiguous, of both kinds": lambda x: (x.contiguous() + 1).transpose(1, 2).contiguous() * 2,
    "another type and back": lambda x: (x.to(torch.float64) + 1).to(torch.float32) * 2,
    "dropout in evaluation": lambda x: nn.functional.dropout(x, 0.5, False) + 1,
    "pooling of one axis": lambda x: nn.functional.adaptive_avg_pool1d(x.flatten(2), 1) + 1,
    "views that stay": lambda x: x.transpose(1, 2).unsqueeze(0).select(1, 1).expand(1, 4, 3, 6) + x[:1, :1, :3],
    "several results": lambda x: x.relu().split(1, dim=1),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_node_by_node_comes_what_a_trace_makes(function, monkeypatch):
    traced = program_of(function).run_decompositions(dict(TABLE))
    monkeypatch.setattr(decomposing, "_by_tracing", None)

    found = decompose(program_of(function), TABLE)

    assert calls(found) == calls(traced)
    torch.testing.assert_close(found.module()(IMAGES), function(IMAGES))


@pytest.mark.parametrize(
    "function",
    [lambda x: x.to(torch.float32), lambda x: (x, x.contiguous()), lambda x: nn.functional.dropout(x, 0.5, False)],
    ids=["of this type", "contiguous", "no dropout"],
)
def test_a_result_that_nothing_is_done_to_is_still_one(function, monkeypatch):
    monkeypatch.setattr(decomposing, "_by_tracing", None)
    found = decompose(program_of(function), TABLE)
    torch.testing.assert_close(found.module()(IMAGES), function(IMAGES))
    names = {node.name for node in found.graph.nodes}
    assert {spec.arg.name for spec in found.graph_signature.output_specs} <= names


def write(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 0] = 0
    return y


TO_TRACE: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any], dict[Any, Any]]] = {
    "a write in place": (write, {}, {}),
    "a free size": (lambda x: x.reshape(-1, 6), {"dynamic_shapes": ({0: Dim("batch")},)}, {}),
    "dropout in training": (lambda x: nn.functional.dropout(x, 0.5, True), {}, {}),
    "an operator of the table": (
        lambda x: nn.functional.hardswish(x),
        {},
        {aten.hardswish.default: torch.export.default_decompositions()[aten.hardswish.default]},
    ),
    "another composite view": (lambda x: x.swapaxes(0, 1) + 1, {}, {}),
}


@pytest.mark.parametrize(("function", "options", "table"), TO_TRACE.values(), ids=TO_TRACE.keys())
def test_what_rules_do_not_cover_is_traced(function, options, table):
    program = program_of(function, **options)
    before = calls(program)

    found = decompose(program, table)

    assert found is not program and calls(program) == before
    assert calls(found) == calls(program_of(function, **options).run_decompositions(dict(table)))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v2", "swin", "segformer", "yolos")]


@pytest.mark.parametrize("name", ["resnet", "vit", *SLOW])
def test_models_are_exported_without_a_second_trace(name, converted, monkeypatch, tmp_path):
    def refuse(*arguments: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(decomposing, "_by_tracing", refuse)
    assert export_onnx(converted(name), tmp_path / "model.onnx", verify=False).num_quantize_nodes > 5


def test_pytorch_decomposes_as_ever_after_an_export_that_failed():
    own = ExportedProgram.run_decompositions
    with pytest.raises(ZeroDivisionError), decomposing_in_place():
        assert ExportedProgram.run_decompositions is decompose
        raise ZeroDivisionError
    assert ExportedProgram.run_decompositions is own
