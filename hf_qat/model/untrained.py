"""What of a model is not trained yet: batch norms that no batch has touched, and weights that no checkpoint had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from hf_qat.graph.capture.modes import buffers_kept, modes_kept
from hf_qat.quantization.quantizer import fake_quantizers


#: What transformers sets on each tensor that `from_pretrained` has read from a checkpoint.
LOADED = "_is_hf_initialized"

#: They begin with a weight of 1 (or 0) and a bias of 0.
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def untrained_batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of `model` with the statistics that they were made with: mean 0, variance 1, no batch counted.

    A count of 0 alone says little: models that came from another library have it beside statistics of their own.
    """
    return [module for module in _batch_norms(model) if _is_untrained(module)]


def is_untrained(model: nn.Module) -> bool:
    """Whether all norms of `model` have the weight and the bias that they were made with, one number each.

    Any training moves them. A model without norms, or with one on the meta device, says nothing.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.weight is not None]
    tensors = [tensor for norm in norms for tensor in (norm.weight, getattr(norm, "bias", None)) if tensor is not None]
    return bool(norms) and not any(tensor.is_meta or not _is_constant(tensor) for tensor in tensors)


def _is_constant(tensor: Any) -> bool:
    local = tensor.detach().flatten()
    return bool((local == local[0]).all())


def new_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that `from_pretrained` did not find in the checkpoint, as those of a new head.

    Nothing of a model that was made without it, or copied: nobody knows what of that is trained.
    """
    ours = {id(parameter) for quantizer in fake_quantizers(model).values() for parameter in quantizer.parameters()}
    named = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in ours}
    new = [name for name, parameter in named.items() if not getattr(parameter, LOADED, False)]
    return new if len(new) < len(named) else []


def has_batch_norms(model: nn.Module) -> bool:
    """Whether any batch norm of `model` keeps running statistics."""
    return bool(_batch_norms(model))


@contextmanager
def batch_statistics(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, `norms` normalise by the statistics of the batch; the running ones are afterwards as before."""
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(modes_kept(norm))
            stack.enter_context(buffers_kept(norm))
            norm.training = True
        yield


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def _is_untrained(norm: Any) -> bool:
    if norm.running_mean.is_meta or (norm.num_batches_tracked is not None and int(norm.num_batches_tracked)):
        return False
    return bool((norm.running_mean == 0).all()) and bool((norm.running_var == 1).all())
