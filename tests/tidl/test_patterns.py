from __future__ import annotations

import gc
import weakref

from hf_qat.tidl.graph import Graph
from hf_qat.tidl.patterns import places
from tests.tidl.layers import from_text


def test_a_graph_goes_once_nobody_asks_about_it_any_more():
    """A graph holds all the weights of a model. In it, SiLU is x · sigmoid(x), of which the product comes last."""
    graph = Graph(from_text("g (float[1, 8] x) => (float[1, 8] z) { a = Sigmoid(x) z = Mul(x, a) }"))
    assert {name: place.last for name, place in places(graph).items()} == {"a": False, "z": True}
    assert places(graph) is places(graph)
    left = weakref.ref(graph)
    del graph
    gc.collect()
    assert left() is None
