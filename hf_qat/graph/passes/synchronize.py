"""Batch norms that stay operations of a graph, by the batch of all processes where their modules are.

Most are calls of their module, or of the layer that they are folded into, which looks at its own class. Not those
without running statistics, nor those that only training calls, as in auxiliary heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.nodes import module_path
from hf_qat.quantization.synchronized_norm import SynchronizedBatchNorm, synchronized_batch_norm


#: What normalises by the batch of all processes: by us, and by PyTorch, which does so on GPUs only.
SYNCHRONIZED = (SynchronizedBatchNorm, nn.SyncBatchNorm)


def synchronize(captured: CapturedModule, ways: Iterable[CapturedGraph]) -> None:
    """Exchange, in the graphs of training among `ways`, the batch norms of synchronized modules, in place.

    Args:
        captured: the child whose modules they are.
        ways: graphs of its calls.
    """
    modules = dict(captured.named_modules())
    for way in ways:
        found = [node for node in way.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
        norms = [node for node in found if isinstance(modules.get(module_path(node)), SYNCHRONIZED)]
        if way.training and norms:
            for node in norms:
                node.target = synchronized_batch_norm
            way.recompile()
