"""From the recipe and a captured model to the plan: what holds for each module, decided here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from hf_qat.config.qat_config import QATConfig
from hf_qat.config.targets import TensorScheme
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.edges import find_edges, find_inputs
from hf_qat.graph.plan import Edges, ModulePlan, Plan


logger = logging.getLogger(__name__)

#: What decides on a module that `exclude` of the recipe names.
EXCLUDED = "excluded by the recipe"


def make_plan(model: nn.Module, captured: Mapping[str, CapturedModule], config: QATConfig, inputs: Inputs) -> Plan:
    """Resolve the target, all globs, and the edges of the model, right after capture.

    Args:
        model: captured; it is run once if the target treats its edges otherwise than the rest.
        captured: its captured children by path.
        config: the recipe.
        inputs: that the model was captured with.
    """
    bits = config.target_spec.edge_bits
    if bits is not None:
        edges = find_edges(model, captured, inputs, config.excludes)
    else:
        edges = Edges(inputs=find_inputs(captured, config.excludes))
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    plan = Plan(config.target_spec, {path: _module_plan(path, config, edges) for path in paths}, edges)
    for path in (edges.first_layer, *sorted(edges.last_layers)) if bits is not None else ():
        if path is not None:
            module = plan.modules[path]
            logger.info("%s: %d bits, %s", path or type(model).__name__, module.weights.bits, module.why)
    return plan


def _module_plan(path: str, config: QATConfig, edges: Edges) -> ModulePlan:
    weights, activations = config.schemes_for(path)
    changes, bits = config.overrides_for(path), config.target_spec.edge_bits
    edge = _edge(path, edges) if bits is not None else None
    why = f"target {config.target}"
    if config.excludes(path):
        why = EXCLUDED
    elif any(changes.values()):
        why = "overrides of the recipe"
    elif edge is not None:
        why = edge
    return ModulePlan(
        weights=weights if edge is None else _widened(weights, bits, "bits" in changes["weights"]),
        activations=activations,
        wide_activations=_widened(activations, bits, "bits" in changes["activations"]),
        excluded=config.excludes(path),
        why=why,
    )


def _edge(path: str, edges: Edges) -> str | None:
    """What makes a layer one at the edge of the model, in words; `None` for any other."""
    if path == edges.first_layer:
        return "the first layer"
    return "feeds an output of the model" if path in edges.last_layers else None


def _widened(scheme: TensorScheme, bits: int | None, overridden: bool) -> TensorScheme:
    """The scheme at an edge: with the bits that the target has there, unless the recipe names those of this module."""
    if bits is None or overridden:
        return scheme
    return replace(scheme, bits=max(bits, scheme.bits))
