import copy

import torch
from torch import Tensor, nn

from hf_qat import QATConfig, fake_quant_disabled, prepare_qat
from hf_qat.graph.capture.call_record import Search
from hf_qat.graph.capture.called_modules import called_modules, opened_by_callers
from hf_qat.quantization.layers import qat_layers


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class ReachesInside(nn.Module):
    """DetrForSegmentation: parts of a part are called, and the part is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.last(self.inner.heads[1](self.inner.body(x)))


def test_what_is_called_inside_a_part_that_is_not_called_itself_is_quantized():
    torch.manual_seed(0)
    model, x = ReachesInside(), torch.randn(2, 4)
    twin = copy.deepcopy(model)
    prepare_qat(model, QATConfig(), x)
    assert list(qat_layers(model)) == ["inner.body", "inner.heads.1", "last"]
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), twin(x))


def test_only_modules_that_are_never_called_are_opened():
    model = ReachesInside()
    with called_modules(model) as called:
        model(torch.randn(2, 4))
    assert called == {"", "inner.body", "inner.heads.1", "last"}
    assert set(opened_by_callers(model, Search(), called).opened) == {"", "inner"}
    assert opened_by_callers(model, Search(), {"", "inner", "inner.body", "last"}) == Search()
    assert opened_by_callers(model, Search(lambda path: path == "inner"), called).opened == ("",)


class Stage(nn.Module):
    """A stage of ResNet: calls the layers of an `nn.Sequential` one by one, and not the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_of_a_sequential_that_is_not_called_itself_are_quantized_in_a_part_that_stays_python():
    torch.manual_seed(0)
    model, x = nn.Sequential(Stage(), nn.Linear(4, 2)), torch.randn(2, 4)
    twin = copy.deepcopy(model)
    model[0].layers[1].register_forward_hook(lambda module, inputs, output: None)
    prepare_qat(model, QATConfig(), x)
    assert list(qat_layers(model)) == ["0.layers.0", "0.layers.1", "1"]
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), twin(x))
