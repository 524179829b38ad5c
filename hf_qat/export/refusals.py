"""What a captured graph computes that ONNX has no operator for, though PyTorch's exporter writes one."""

from __future__ import annotations

import torch
from torch import fx, nn

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
    for child, captured in captured_children(model).items():
        for node in captured.graph.nodes:
            if _normalises_by_batch(node):
                path = join_path(child, module_path(node)) or type(model).__name__
                raise ExportError(
                    f"{path} normalises by the statistics of each batch in evaluation, too (training=True), which "
                    "ONNX cannot: give it running statistics, or use an instance, group or layer norm."
                )


def _normalises_by_batch(node: fx.Node) -> bool:
    is_norm = node.target is torch.ops.aten.batch_norm.default
    return is_norm and node.args[TRAINING] is True
