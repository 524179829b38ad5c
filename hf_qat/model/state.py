"""What a prepared or converted model remembers of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import StageError
from hf_qat.graph.captured import CapturedModule
from hf_qat.model.eager import uncompiled
from hf_qat.quantization.quantizer import fake_quantizers


STATE = "_hf_qat_state"


@dataclass
class QATState:
    """What a prepared or converted model remembers of itself, under the attribute `_hf_qat_state`.

    Attributes:
        config: the recipe.
        stage: how far the model has come.
        captured: paths of the captured children, in the order of their first call.
        in_python: (module path, operation, reason) of layers and products that run outside them, in float.
    """

    config: QATConfig
    stage: Stage
    captured: list[str]
    in_python: list[tuple[str, str, str]] = field(default_factory=list)


def state_of(model: nn.Module) -> QATState | None:
    """The state of a prepared or converted model, `None` for any other."""
    state: QATState | None = getattr(model, STATE, None)
    return state


def require_stage(model: nn.Module, stage: str, action: str) -> QATState:
    """The state of `model`, which must be at `stage` for `action`.

    Raises:
        StageError: it is not; the message says which call is missing.
    """
    state = state_of(model)
    if state is None:
        raise StageError(f"cannot {action}: {_why_without_state(model)}")
    if state.stage != stage:
        still_trains = state.stage is Stage.PREPARED
        hint = "call convert(model) first" if still_trains else "it is for inference only; prepare a copy"
        raise StageError(f"cannot {action}: the model is {state.stage} already, not {stage}: {hint}.")
    for captured in captured_children(model).values():
        captured.require_intact()
    return state


def quantized_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The prepared and converted models in `model`, which may be one itself, by path."""
    return {path: module for path, module in model.named_modules() if STATE in vars(module)}


def _why_without_state(model: nn.Module) -> str:
    name, parts = type(model).__name__, quantized_parts(model)
    if parts:
        path, part = next(iter(parts.items()))
        return (
            f"{name} is a module around {type(part).__name__}, which is {vars(part)[STATE].stage}: pass its `{path}`."
        )
    return f"{name} is a float model. Call prepare_qat(model, config) first."


def captured_children(model: nn.Module) -> dict[str, CapturedModule]:
    """The captured children of a prepared or converted model, by path, in the order of their first call.

    Raises:
        StageError: one of them was exchanged for another module.
    """
    state, model = state_of(model), uncompiled(model)
    found: dict[str, CapturedModule] = {}
    for path in [] if state is None else state.captured:
        module = model.get_submodule(path)
        if not isinstance(module, CapturedModule):
            raise StageError(
                f"{path} of {type(model).__name__} was exchanged for another {type(module).__name__} after "
                "prepare_qat, and has no quantizers. Exchange it in the float model, and prepare that."
            )
        found[path] = module
    return found


def require_ranges(model: nn.Module, action: str) -> None:
    """Raise `StageError` if a quantizer of a prepared model has no range yet, which `action` needs."""
    empty = [path for path, quantizer in fake_quantizers(model).items() if int(quantizer.observed) == 0]
    if empty:
        raise StageError(
            f"cannot {action}: {len(empty)} quantizers have no range yet, for instance {empty[0]}. Call "
            "calibrate(model, batches) first."
        )
