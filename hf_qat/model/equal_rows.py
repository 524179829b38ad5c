"""Rows that rounding makes equal before a layer norm: said after calibration, with what to do.

A row whose values all fall on one code has no variance, and layer norm hands its gradient on `1 / sqrt(eps)` times as
large: a million times, at the `eps` of a ViT, which overflows within a few layers. Float models do the same with such
rows, and have none. They are small values beside large ones, as those of a class token beside the patches of an image.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from hf_qat.errors import listed
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import called_module
from hf_qat.graph.plan import join_path
from hf_qat.graph.rules import Kind, rule_of
from hf_qat.model.batches import run_batches
from hf_qat.model.state import captured_children
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.quantizer import FakeQuantize


logger = logging.getLogger(__name__)

aten = torch.ops.aten


#: Bits that a recipe can give to activations, beyond those of 4-bit targets.
BYTE, MOST_BITS = 8, 16

#: From 8 bits on rows are seldom equal (a BEiT has some): they are looked for, which takes a pass of a batch, only
#: where a norm can make gradients ten thousand times as large.
TINY_EPS = 1e-8


@dataclass(frozen=True)
class RoundedNorm:
    """A layer norm of rounded values.

    Attributes:
        weight: path of its weight in the model.
        eps: what it adds to the variance.
        quantizer: path of what rounds its input.
        bits: to so many.
    """

    weight: str
    eps: float
    quantizer: str
    bits: int

    @property
    def path(self) -> str:
        """Of its module."""
        return self.weight.rpartition(".")[0]


def warn_of_equal_rows(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Say so if rounding makes rows equal, which are not so in float, before layer norms of a calibrated model."""
    norms = [norm for norm in rounded_norms(model) if norm.bits < MOST_BITS]
    if not any(norm.bits < BYTE or norm.eps < TINY_EPS for norm in norms):
        return
    rounded = _equal_rows(model, batches)
    if not rounded.total():
        return
    with fake_quant_disabled(model):
        in_float = _equal_rows(model, batches)
    weights = {norm: id(model.get_parameter(norm.weight)) for norm in norms}
    lost = [norm for norm, weight in weights.items() if rounded[weight] > in_float[weight]]
    if lost:
        _warn(lost)


def rounded_norms(model: nn.Module) -> list[RoundedNorm]:
    """The layer norms of a prepared model that have a weight, and that a quantizer rounds the input of."""
    return [norm for child, captured in captured_children(model).items() for norm in _rounded_norms(child, captured)]


def _rounded_norms(child: str, captured: CapturedModule) -> Iterator[RoundedNorm]:
    for node in captured.graph.nodes:
        if node.target is not aten.layer_norm.default or len(node.args) < 5:
            continue
        weight: Any = node.args[2]
        source = _quantizer_before(captured, node)
        if source is not None and isinstance(weight, fx.Node) and weight.op == "get_attr":
            bits = called_module(captured, source).spec.bits
            yield RoundedNorm(
                join_path(child, str(weight.target)), node.args[4], join_path(child, str(source.target)), bits
            )


def _quantizer_before(captured: CapturedModule, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and not isinstance(called_module(captured, source), FakeQuantize):
        source = source.args[0] if rule_of(source).kind is Kind.PASS and source.args else None
    return source if isinstance(source, fx.Node) else None


class _EqualRows(TorchFunctionMode):
    """Inside, counts the rows of one value each that layer norms are given, by the `id` of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.layer_norm and len(args) > 2:
            x, shape, weight = args[:3]
            low, high = x.flatten(-len(shape)).aminmax(dim=-1)
            self.counts[id(weight)] += int((low == high).sum())
        return func(*args, **(kwargs or {}))


def _equal_rows(model: nn.Module, batches: Sequence[Inputs]) -> Counter[int]:
    found = _EqualRows()
    with found:
        for _ in run_batches(model, batches):
            pass
    return found.counts


def _warn(norms: list[RoundedNorm]) -> None:
    bits = max(norm.bits for norm in norms)
    modules = dict.fromkeys(norm.quantizer.rpartition(".")[0] for norm in norms)
    logger.warning(
        "Rounding to %d bits leaves rows of one value each to %d layer norms (%s): gradients through them grow up to "
        "%.0e times at each, and training can end in NaN. Let what they read have %d bits: QATConfig(…, overrides="
        "{path: {'activations': {'bits': %d}} for path in %s}).",
        bits,
        len(norms),
        listed([norm.path for norm in norms]),
        max(1 / math.sqrt(norm.eps) for norm in norms),
        *[BYTE if bits < BYTE else MOST_BITS] * 2,
        list(modules),
    )
