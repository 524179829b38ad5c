"""The plan: what the recipe says of every module of one model, resolved once, right after capture.

The passes read it, and nothing else of the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_qat.config.targets import Target, TensorScheme
from hf_qat.quantization.spec import QuantizerSpec


#: An input or an output of a captured child: its path, and the position among its inputs or its outputs.
Port = tuple[str, int]


@dataclass(frozen=True)
class Edges:
    """Where data enter and leave a model: what is rounded there, the whole model feels.

    Attributes:
        inputs: of captured children, those that come from outside the model.
        outputs: of captured children, those that the model returns, perhaps after some more computing.
        first_layer: path of the first quantized layer that is called; `None` if there is none.
        last_layers: paths of the quantized layers that feed such an output, with no other one on the way.
    """

    inputs: frozenset[Port] = frozenset()
    outputs: frozenset[Port] = frozenset()
    first_layer: str | None = None
    last_layers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModulePlan:
    """What holds for one module.

    Attributes:
        weights: scheme of its weight.
        activations: scheme of the activations that are rounded in its forward.
        wide_activations: scheme of those among them that lie at an edge of the model, or that layer norms read where
            the target wants these wide.
        excluded: it stays float.
        why: what decided, in a few words.
    """

    weights: TensorScheme
    activations: TensorScheme
    wide_activations: TensorScheme
    excluded: bool
    why: str

    def weight_spec(self, channel_axis: int | None) -> QuantizerSpec:
        """The spec of its weight: signed, symmetric, without the lowest code.

        Args:
            channel_axis: the axis of the weight that output channels run along; `None` where they run along none.
        """
        scheme = self.weights
        return QuantizerSpec(
            bits=scheme.bits,
            narrow_range=True,
            axis=channel_axis if scheme.per_channel else None,
            power_of_two=scheme.power_of_two,
            learned=scheme.learned,
            observer="minmax" if scheme.observer == "moving_average" else scheme.observer,
        )


@dataclass(frozen=True)
class Plan:
    """What holds for a whole model.

    Attributes:
        target: the row of the table of targets.
        modules: path from the model, "" for the model itself → its plan.
        edges: where data enter and, where the target makes a difference there, where they leave.
    """

    target: Target
    modules: Mapping[str, ModulePlan]
    edges: Edges

    def below(self, child: str) -> dict[str, ModulePlan]:
        """The plans of a captured child and of the modules inside it, by their paths below it."""
        prefix = f"{child}." if child else ""
        inside = {path[len(prefix) :]: plan for path, plan in self.modules.items() if path.startswith(prefix)}
        return {**inside, "": self.modules[child]}


def join_path(*parts: str) -> str:
    """Dotted path of the parts that are not empty."""
    return ".".join(part for part in parts if part)
