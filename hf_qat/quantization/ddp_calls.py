"""What a call inside `DistributedDataParallel` must be for its processes to wait for each other's gradients alike.

DDP fails a step later, and in words that say nothing of ranges; or it goes on with numbers of another message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_qat.errors import StageError, listed
from hf_qat.quantization.collectives import is_active


#: What makes DDP look, in every step, for what gets no gradient.
REMEDY = (
    "DistributedDataParallel(model, find_unused_parameters=True); with accelerate, "
    "Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])"
)

#: DDP with a static graph → parameters of a part of its model (by id) → those without a gradient in the first step.
_FIRST: WeakKeyDictionary[nn.Module, dict[int, frozenset[str]]] = WeakKeyDictionary()


def active_ddp() -> Any:
    """The `DistributedDataParallel` of several processes whose forward is running; `None` if none is."""
    if torch.compiler.is_compiling() or not is_active():
        return None
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def refuse_join() -> None:
    """To be called where a forward pass sends messages of its own.

    Raises:
        StageError: processes may end at different steps, and the messages of the others would be taken for gradients.
    """
    config = getattr(active_ddp(), "_join_config", None)
    if config is not None and config.enable:
        raise StageError(
            "inside Join (join_uneven_inputs of accelerate) a process that has no batches left answers DDP's messages "
            "only, not those by which QATSchedule, sync_batch_norm and ranges that follow the data see the batches of "
            "all: give all processes equally many batches (even_batches=True of accelerate, DistributedSampler, "
            "drop_last=True)."
        )


def require_gradients(part: nn.Module, without: Iterable[nn.Parameter]) -> None:
    """To be called in a step of training of `part` that computes no gradients for the parameters `without`.

    Raises:
        StageError: DDP would wait for them.
    """
    ddp = active_ddp()
    if ddp is None or not ddp.require_backward_grad_sync:
        return
    if ddp.find_unused_parameters and not ddp.static_graph:
        return
    unused = _expected(ddp, without)
    if not ddp.static_graph:
        if unused:
            raise StageError(f"{_fact(unused)}. Wrap the model by {REMEDY}.")
        return
    first = _FIRST.setdefault(ddp, {}).setdefault(id(part), unused)
    if first != unused:
        raise StageError(
            f"{_fact(unused or first)}, which was otherwise in the first step, and static_graph=True takes that for "
            f"all: wrap the model anew where ranges or batch norm freeze, or by {REMEDY} instead."
        )


def _expected(ddp: Any, parameters: Iterable[nn.Parameter]) -> frozenset[str]:
    """Names of those among `parameters` that DDP takes gradients of."""
    wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
    if not wanted:
        return frozenset()
    names = {name for name, parameter in ddp.module.named_parameters() if id(parameter) in wanted}
    return frozenset(names - set(ddp.parameters_to_ignore))


def _fact(names: Iterable[str]) -> str:
    return (
        "learned scales get no gradient while ranges are frozen, a net from scratch learns in float, or a batch norm "
        f"without a layer is live ({listed(sorted(names))}), and DistributedDataParallel waits for them"
    )
