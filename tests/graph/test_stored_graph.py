from __future__ import annotations

import pickle

import torch
from torch import nn

from hf_qat.graph.nodes import MODULE_PATH
from hf_qat.graph.stored_graph import restore_graph, store_graph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.conv(x).split([1, 3], dim=1)
        return torch.cat([second * 2, first], 1).view(x.shape[0], -1)


def test_a_graph_that_went_through_a_pickle_computes_the_same_and_knows_shapes_and_modules():
    traced = torch.fx.symbolic_trace(Net().eval())
    first, conv = list(traced.graph.nodes)[:2]
    first.meta["val"] = torch.empty(2, 3, 8, 8)
    conv.meta[MODULE_PATH] = "conv"
    restored = restore_graph(pickle.loads(pickle.dumps(store_graph(traced.graph))))
    restored.lint()
    again = torch.fx.GraphModule(traced, restored)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(again(x), traced(x))
    first, conv = list(restored.nodes)[:2]
    value = first.meta["val"]
    assert (tuple(value.shape), value.dtype, value.device.type) == ((2, 3, 8, 8), torch.float32, "meta")
    assert conv.meta == {MODULE_PATH: "conv"}
