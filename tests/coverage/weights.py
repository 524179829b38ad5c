"""Weights that keep the activations of a fresh model spread out, so that comparing its outputs proves something.

Default initializers leave logits of 1e-16 to 1e-32 on some tiny nets: comparing those proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)

#: Layers that say where deformable attention looks.
OFFSETS = ("sampling_offsets", "sampling_offset")

#: Standard deviation of biases, embeddings, tokens and other parameters of a model's own.
SMALL = 0.2


def spread(model: nn.Module, run: Callable[[], Any], seed: int = 0) -> nn.Module:
    """Kaiming weights, norms around 1, and batch norm statistics of the batch that `run` feeds; the same per seed."""
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            _initialize(module, name, parameter, generator)
        if path.endswith(OFFSETS):
            # As its authors start it: where deformable attention looks depends little on the image.
            nn.init.normal_(module.weight, 0.0, 0.01, generator=generator)
    _set_statistics(model, run)
    return model


def _initialize(module: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    if name == "weight" and isinstance(module, LAYERS):
        nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    elif name == "weight" and (isinstance(module, NORMS) or "Norm" in type(module).__name__):
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    elif "scale" in name or "gamma" in name or "lambda" in name:
        nn.init.uniform_(parameter, 0.3, 0.7, generator=generator)
    else:
        nn.init.normal_(parameter, 0.0, SMALL, generator=generator)


def _set_statistics(model: nn.Module, run: Callable[[], Any]) -> None:
    """One forward in which each batch norm takes over the statistics of what it sees; nothing else trains."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    frozen = [m for m in model.modules() if hasattr(m, "running_mean") and m not in norms]
    hooks = [module.register_forward_pre_hook(_take_statistics) for module in frozen]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        # A batch of tiny images may leave a channel that never varies.
        norm.running_var.clamp_(min=1e-2)


def _take_statistics(module: nn.Module, args: tuple[Any, ...]) -> None:
    """DETR's frozen batch norms never learn their statistics."""
    if module.running_mean is None:
        return
    module.running_mean.copy_(args[0].mean((0, 2, 3)))
    module.running_var.copy_(args[0].var((0, 2, 3)).clamp(min=1e-2))
