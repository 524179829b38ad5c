from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from hf_qat import fake_quant_disabled, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.graph.captured import captured_modules
from hf_qat.graph.generated_code import function_of, is_plain


#: A name that ends the quotes around it, and then calls the shell; module names may not have a dot.
HOSTILE = 'a" + str(getattr(__import__("os"), "system")("touch made")) + "b'

#: Names that nothing runs of: as they are in the code, they stay one string.
UNUSUAL = ("it's", "x y", "{x}", "x;y", "ümläut", "0")


class Named(nn.Module):
    """Calls a layer, and reads a parameter, of a given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Conv2d(3, 4, 3)})
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.rand(4, 1, 1))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.layers.items():
            x = (layer(x) * self.scales[name]).relu()
        return x


@pytest.mark.parametrize("name", [HOSTILE, "a\nimport os", "a\\", 'a"'], ids=["call", "line", "backslash", "quote"])
def test_a_module_whose_name_could_be_read_as_code_stays_in_python(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    float_model, x = Named(name).eval(), torch.randn(2, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), float_model(x))
    assert "" not in captured_modules(model)
    assert "cannot be named in a graph" in caplog.text
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_name_is_captured_all_the_same(name: str):
    float_model, x = Named(name).eval(), torch.randn(2, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    assert [*captured_modules(model)] == [""]
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), float_model(x))


def _hostile_graph(place: str) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder(HOSTILE if place == "placeholder" else "x")
    if place == "call_method":
        x = graph.call_method(HOSTILE, (x,))
    elif place == "kwargs":
        x = graph.call_function(torch.relu, (x,), {HOSTILE: 1})
    elif place in ("call_module", "get_attr"):
        x = graph.create_node(place, HOSTILE, (x,) if place == "call_module" else ())
    elif place == "name":
        x = graph.call_function(torch.relu, (x,))
        x.name = HOSTILE
    graph.output(x)
    return graph


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("place", ["placeholder", "call_method", "kwargs", "call_module", "get_attr", "name"])
def test_no_name_in_a_graph_becomes_code(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CaptureError, match="could be read as code"):
        function_of(_hostile_graph(place))
    assert not (tmp_path / "made").exists()


def test_a_hostile_constant_stays_the_string_that_it_is():
    graph = fx.Graph()
    graph.output((graph.placeholder("x"), {HOSTILE: [HOSTILE, 'a"\nb\\']}))
    assert function_of(graph)(None, 1) == (1, {HOSTILE: [HOSTILE, 'a"\nb\\']})


@pytest.mark.parametrize("name", [*UNUSUAL, "layer.0.conv", ""])
def test_a_plain_name_is_one_that_python_reads_back_between_quotes(name: str):
    assert is_plain(name)
    assert eval(f'"{name}"') == name
