"""What the processes of a distributed training must have in common, beyond what DDP and FSDP2 see to.

Scales and offsets are left out of both: FSDP2 takes no parameters of dimension 0, and in DDP a frozen scale, which has
no gradient, would call for `find_unused_parameters`. Their gradients are averaged here, in one message a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_qat.graph.model_outputs import variables_of
from hf_qat.quantization.collectives import is_active, mean_over_ranks
from hf_qat.quantization.quantizer import fake_quantizers


@torch.no_grad()
def copy_from_first_rank(model: nn.Module, device: torch.device) -> None:
    """Give all processes the weights and buffers of the first one: a new head is random, and differs.

    Args:
        device: what the process group sends from.
    """
    if not is_active():
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        message = tensor.detach().to(device).contiguous()
        dist.broadcast(message, src=0)
        tensor.copy_(message)


def leave_out_of_ddp(model: nn.Module) -> None:
    """Make DistributedDataParallel ignore the quantizers of `model`, whose state is kept alike here."""
    names = [name for path, q in fake_quantizers(model).items() for name in _names_in(path, q)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _names_in(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{name}" for name, _ in [*module.named_parameters(), *module.named_buffers()]]


def scales_in_training(model: nn.Module) -> list[nn.Parameter]:
    """Learned scales and offsets that are not frozen: the same in all processes, which freeze at the same step."""
    quantizers = [quantizer for quantizer in fake_quantizers(model).values() if not quantizer.frozen]
    return [parameter for q in quantizers for parameter in q.parameters() if parameter.requires_grad]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes, in one message; one that has none counts as 0.

    A parameter that no process has a gradient of keeps none: it is frozen, and optimizers leave it alone. Whether
    others have one is read, which waits for a GPU, only where one is missing here.
    """
    wanted = list(parameters)
    if not wanted or not is_active():
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
    have = wanted[0].new_tensor([float(p.grad is not None) for p in wanted])
    mean = mean_over_ranks(torch.cat([have, *(gradient.flatten() for gradient in gradients)]))
    sizes = [gradient.numel() for gradient in gradients]
    everywhere = all(parameter.grad is not None for parameter in wanted)
    shares = [1.0] * len(wanted) if everywhere else mean[: len(wanted)].tolist()
    for parameter, share, values in zip(wanted, shares, mean[len(wanted) :].split(sizes), strict=True):
        if share > 0:
            parameter.grad = values.view_as(parameter).clone()


def without_gradient(model: nn.Module, loss: Tensor) -> list[str]:
    """Names of the trainable parameters, scales apart, that `loss` does not depend on: `backward()` skips them.

    Args:
        loss: () of `model`, with its graph.
    """
    reached = variables_of(loss)
    scales = {id(parameter) for q in fake_quantizers(model).values() for parameter in q.parameters()}
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in reached and id(p) not in scales]
