"""FSDP2: weights, gradients and optimizer state split over the processes (`torch.distributed.fsdp.fully_shard`).

The whole model is one unit: a captured graph reads weights without calling the layers they belong to, so nothing
inside it could be gathered on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard

from hf_qat.graph.capture.meta_device import without_weights
from hf_qat.graph.captured import captured_modules
from hf_qat.graph.passes.synchronize import synchronize
from hf_qat.model.parameter_groups import scale_parameters
from hf_qat.quantization.synchronized_norm import synchronize_batch_norms


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has split the model."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Split a prepared model over all processes, in place, before its optimizer is made; accelerate then leaves it.

    Scales and buffers stay whole. Batch norms use the batch of all processes: FSDP2 broadcasts no buffers, so nothing
    else would keep running statistics alike. Weights are gathered in float32, as they are folded and quantized in it.
    `copy.deepcopy` gives a whole model, if all processes call it together.
    """
    synchronize_batch_norms(model)
    for captured in captured_modules(model).values():
        synchronize(captured, captured.graphs)
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    else:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    skeleton = without_weights(model, keep_buffers=True)
    offload = accelerator.state.fsdp_plugin.cpu_offload
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=set(scale_parameters(model)))
    vars(model)["__deepcopy__"] = partial(_whole_copy, model, skeleton)


def _whole_copy(model: nn.Module, skeleton: nn.Module, memo: object) -> nn.Module:
    """What `copy.deepcopy(model)` gives for a split model, in every process."""
    whole = copy.deepcopy(skeleton)
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), assign=True)
    return whole.train(model.training)


@contextmanager
def saved_whole(accelerator: Accelerator) -> Iterator[None]:
    """Inside, `Trainer.save_model` gathers a split model: with `SHARDED_STATE_DICT` it would write nothing at all."""
    plugin = accelerator.state.fsdp_plugin
    chosen, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = chosen


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, the weights are whole, to read; all processes come here together. Nothing, if nothing is split."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
