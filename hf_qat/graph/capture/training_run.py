"""What a model does in training mode, seen without computing anything: on a copy that has shapes but no weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from hf_qat.graph.capture.meta_device import MetaCapture, without_weights
from hf_qat.graph.capture.modes import modes_kept


logger = logging.getLogger(__name__)

T = TypeVar("T")


def in_training(model: nn.Module, observe: Callable[[nn.Module], T]) -> T | None:
    """Run a model once in training mode, with batch norms and random state untouched.

    Args:
        model: stays as it is.
        observe: runs the module that it is given, and says what it saw. That is a copy on the meta device, or where
            a value is asked for that such a copy does not have, the model itself.

    Returns:
        What `observe` returned; `None` if the model does not run: code for training may want labels.
    """
    try:
        with MetaCapture():
            return _observe(without_weights(model), observe)
    except Exception as error:
        logger.debug("The model does not run on the meta device in training mode (%s).", error)
    try:
        return _observe(model, observe)
    except Exception as error:
        logger.debug("The model does not run in training mode on the example inputs (%s).", error)
        return None


def _observe(model: nn.Module, observe: Callable[[nn.Module], T]) -> T:
    with torch.no_grad(), torch.random.fork_rng(), modes_kept(model):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return observe(model)
