"""Rehearsals: the model is run as training will run it, so that all calls of its parts are seen before it begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_qat.graph.capture.call_record import Records, Search, add_run, record_run
from hf_qat.graph.capture.inputs import device_of
from hf_qat.graph.capture.meta_device import MetaCapture, without_weights
from hf_qat.graph.capture.modes import buffers_kept, modes_kept
from hf_qat.graph.random_state import random_state_kept


logger = logging.getLogger(__name__)

#: Calls the model that it is given.
Run = Callable[[nn.Module], Any]


def rehearse(model: nn.Module, training: bool, runs: Sequence[Run], search: Search) -> Records | None:
    """How the parts of a model are called in a mode, with its buffers, its modes and the random state untouched.

    It runs on a copy that has shapes but no weights, or where a value is asked for that such a copy does not have, as
    matching does, on the model itself.

    Args:
        model: stays as it is.
        training: the mode.
        runs: what is done with it, one after the other.
        search: which modules are its parts.

    Returns:
        The records of all runs; `None` if one fails: code for training may want labels.
    """
    try:
        return _rehearse(without_weights(model), training, runs, search)
    except Exception as error:
        logger.debug("The model does not run on the meta device (%s).", error)
    try:
        with buffers_kept(model):
            return _rehearse(model, training, runs, search)
    except Exception as error:
        logger.debug("The model does not run in a rehearsal (%s).", error)
        return None


def _rehearse(model: nn.Module, training: bool, runs: Sequence[Run], search: Search) -> Records:
    recorded: Records = {}
    with torch.no_grad(), random_state_kept(device_of(model)), modes_kept(model):
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        for ordinal, run in enumerate(runs):
            with MetaCapture(part=1 / (1 + ordinal)):
                add_run(recorded, record_run(model, search, partial(run, model)), ordinal)
    return recorded
