"""One row of the coverage table: how to make a tiny model from its config, its images and its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.coverage.weights import spread


LABELS = 5

#: Makes the labels of a batch: (batch size, image size) → what the model's forward takes besides pixels.
Labels = Callable[[int, int], dict[str, Any]]


#: Why a class is not exported.
SIZES_FROM_DATA = "PyTorch exports the float net neither: shapes depend on values"


@dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        task: the heading it stands under in the table.
        cls: name of the class in `transformers`, or the class of a plain module.
        config: makes its config, or `None` for a plain module.
        size: of the square images.
        labels: makes the labels; without one there is no loss, and training is on the mean square of the outputs.
        name: to tell several configs of one class apart.
        inputs: what goes in, where that is more than pixels.
        loss_in_evaluation: whether the class itself takes labels in evaluation.
        not_exported: why the chain does not go on to ONNX; empty where it does.
        images: how many the exported file is compared on.
        heavy: exported for the table only, not in every test run: it takes long, or is much like another one.
    """

    task: str
    cls: str | type[nn.Module]
    config: Callable[[], Any] | None
    size: int = 32
    labels: Labels | None = None
    name: str = ""
    inputs: Callable[[Tensor], dict[str, Any]] = field(default=lambda pixels: {"pixel_values": pixels})
    loss_in_evaluation: bool = True
    not_exported: str = ""
    images: int = 16
    heavy: bool = False

    @property
    def title(self) -> str:
        """Class and variant."""
        cls = self.cls if isinstance(self.cls, str) else self.cls.__name__
        return f"{cls} ({self.name})" if self.name else cls

    def make(self) -> nn.Module:
        """The model in evaluation mode, with weights that spread its activations."""
        torch.manual_seed(0)
        cls = getattr(transformers, self.cls) if isinstance(self.cls, str) else self.cls
        model = cls() if self.config is None else cls(self.config())
        return spread(model.eval(), lambda: self.forward(model, 16))

    def forward(self, model: nn.Module, batch: int) -> Any:
        """One call on random images."""
        return model(**self.batch(batch))

    def batch(self, size: int, seed: int = 0) -> dict[str, Any]:
        """Random images of standard normal pixels, as the model takes them."""
        generator = torch.Generator().manual_seed(seed)
        return self.inputs(torch.randn(size, 3, self.size, self.size, generator=generator))

    def labelled(self, size: int, seed: int = 0) -> dict[str, Any]:
        """The same with labels, where the model takes any."""
        labels = self.labels(size, self.size) if self.labels is not None else {}
        return {**self.batch(size, seed), **labels}


def classes(batch: int, size: int) -> dict[str, Any]:
    """One class an image."""
    return {"labels": torch.arange(batch) % LABELS}


def masks(batch: int, size: int) -> dict[str, Any]:
    """One class a pixel."""
    return {"labels": (torch.arange(size * size) % LABELS).view(1, size, size).repeat(batch, 1, 1)}


def boxes(batch: int, size: int) -> dict[str, Any]:
    """Two boxes an image."""
    box = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1]])
    return {"labels": [{"class_labels": torch.tensor([k % LABELS, 1]), "boxes": box.clone()} for k in range(batch)]}
