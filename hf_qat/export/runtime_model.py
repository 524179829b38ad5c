"""An exported file in the place of its model, so that Trainer's own evaluation measures it on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import ExportError
from hf_qat.export.io_names import bind, distinct, input_names, input_tensors, named_outputs
from hf_qat.export.verify import Session


class RuntimeModel(nn.Module):
    """Gives what the converted model gives, with every output that the file has computed by ONNX Runtime instead.

    The converted model runs too: for a loss, and for outputs that only exist beside labels, which some metrics count
    on (`loss_dict` of detection models). None of that is in the file. It is called as the model is, and has its public
    attributes: Trainer and a user's own evaluation ask for some.

    Args:
        model: converted; a Hugging Face one.
        path: the file that was exported from it.
    """

    def __init__(self, model: nn.Module, path: Path) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)
        self._session = Session(path, optimized=True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # what accelerate has noted of the model is not true of this one
                raise
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """The outputs of the model's forward, on its device."""
        outputs = self.model(*args, **inputs)
        if not isinstance(outputs, Mapping):
            raise ExportError(
                f"{type(self.model).__name__} returns a {type(outputs).__name__} instead of a ModelOutput: leave "
                "return_dict as it is, so that it can be told which output is which."
            )
        bound = bind(self.model, args, inputs)
        given = dict(zip(input_names(bound), input_tensors(bound), strict=True))
        missing = [name for name in self._session.inputs if name not in given]
        if missing:
            raise ExportError(
                f"the file takes {', '.join(missing)}, which the batch has not; it has {', '.join(given)}."
            )
        computed = self._session.run([given[name].cpu().numpy() for name in self._session.inputs])
        by_name = dict(zip(self._session.outputs, computed, strict=True))
        names = iter(distinct((name for name, _ in named_outputs(outputs)), self._session.inputs))
        leaves, structure = pytree.tree_flatten(outputs)
        exchanged = [_exchange(leaf, next(names), by_name) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if by_name:
            raise ExportError(f"the file has outputs that the model has not: {', '.join(by_name)}.")
        return pytree.tree_unflatten(exchanged, structure)


def _exchange(leaf: Tensor, name: str, by_name: dict[str, Any]) -> Tensor:
    """ONNX Runtime's value of an output, which `by_name` then lacks; the model's own, if the file has it not."""
    return torch.from_numpy(by_name.pop(name)).to(leaf.device) if name in by_name else leaf
