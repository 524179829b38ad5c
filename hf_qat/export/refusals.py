"""What a captured graph computes that ONNX has no operator for, though PyTorch's exporter writes one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hf_qat.errors import ExportError
from hf_qat.graph.nodes import module_path
from hf_qat.graph.plan import join_path
from hf_qat.model.state import captured_children


#: Position of `training` among the arguments of `batch_norm`.
TRAINING = 5


def require_expressible(model: nn.Module) -> None:
    """Refuse a model whose file would compute something else.

    Raises:
        ExportError: a batch norm uses the statistics of the batch in evaluation, too.
    """
    for path in _batch_statistics(model):
        raise ExportError(
            f"{path or type(model).__name__} normalises by the statistics of each batch in evaluation, too, which "
            "ONNX cannot: give it running statistics, or use an instance, group or layer norm."
        )


def _batch_statistics(model: nn.Module) -> Iterator[str]:
    """Paths of the batch norms without running statistics, and of what calls `F.batch_norm(training=True)`."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            yield path
    for child, captured in captured_children(model).items():
        for node in captured.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default and node.args[TRAINING] is True:
                yield join_path(child, module_path(node))
