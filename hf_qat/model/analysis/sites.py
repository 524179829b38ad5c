"""Sites: the places of a prepared or converted model that are looked at, one for each layer and each rounded value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import COMPUTE, called_module, module_path, operation_name
from hf_qat.graph.plan import join_path
from hf_qat.model.state import captured_children
from hf_qat.quantization.converted import QuantizeDequantize, QuantizedLayer
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.weight_quantizer import WeightQuantizer


#: How the paths of quantizers end, which their sites are named without.
SUFFIX = "_quantizer"

LAYERS = (QATLayer, QuantizedLayer)
QUANTIZERS = (FakeQuantize, QuantizeDequantize)


@dataclass(frozen=True)
class Site:
    """A layer with the quantizer of its result, or a quantizer alone.

    Attributes:
        path: of the layer, or that of the quantizer without its last word.
        operation: PyTorch's name of what computes the value, as `conv2d`.
        layer: path of the layer in the model; `None` for the result of another operation.
        quantizer: path of the quantizer; `None` where the result of a layer is not rounded.
    """

    path: str
    operation: str
    layer: str | None
    quantizer: str | None

    @property
    def module(self) -> str:
        """Path of the module whose schemes hold here."""
        return self.layer if self.layer is not None else (self.quantizer or "").rpartition(".")[0]

    @property
    def output(self) -> str:
        """Path of the module that returns the value."""
        return self.quantizer or self.layer or ""


def find_sites(model: nn.Module) -> list[Site]:
    """The sites of a prepared or converted model, in the order in which they are computed in evaluation."""
    sites: dict[str, Site] = {}
    for child, captured in captured_children(model).items():
        for site in _sites(child, captured):
            sites.setdefault(site.path, site)
    return list(sites.values())


def _sites(child: str, captured: CapturedModule) -> Iterator[Site]:
    calls = Counter(node.target for node in captured.graph.nodes if node.op == "call_module")
    taken: set[fx.Node] = set()
    for node in captured.graph.nodes:
        module = called_module(captured, node)
        if isinstance(module, LAYERS):
            layer = child if node.target == COMPUTE else join_path(child, str(node.target))
            follower = _own_quantizer(captured, node, calls)
            if follower is not None:
                taken.add(follower)
            quantizer = None if follower is None else join_path(child, str(follower.target))
            yield Site(layer, _layer_operation(module), layer, quantizer)
        elif isinstance(module, QUANTIZERS) and not isinstance(module, WeightQuantizer) and node not in taken:
            quantizer = join_path(child, str(node.target))
            yield Site(_shortened(quantizer), _operation(node), None, quantizer)


def _own_quantizer(captured: CapturedModule, node: fx.Node, calls: Mapping[Any, int]) -> fx.Node | None:
    """The call of a quantizer that takes nothing but what this layer returns in its one call, or `None`."""
    (follower,) = node.users if len(node.users) == 1 else (None,)
    if follower is None or not isinstance(called_module(captured, follower), QUANTIZERS):
        return None
    return follower if calls[follower.target] == calls[node.target] == 1 else None


def _layer_operation(module: QATLayer | QuantizedLayer) -> str:
    return str(getattr(module.operation, "_opname", None) or getattr(module.operation, "__name__", "layer"))


def _operation(node: fx.Node) -> str:
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op == "get_attr":
        return "parameter"
    if source.op == "placeholder":
        return "input"
    return operation_name(source) if source.op == "call_function" else f"result of {module_path(source) or 'a layer'}"


def _shortened(path: str) -> str:
    return path.removesuffix(SUFFIX).removesuffix("activation").removesuffix(".")
