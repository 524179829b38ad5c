import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, fake_quant_disabled, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.graph.capture.capture import capture
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers


class Decoder(nn.Module):
    """Queries look at each other, as far as a mask lets them, and at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(0.1)

    def forward(self, queries: Tensor, memory: Tensor, tgt_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.linear1(queries).chunk(3, -1)
        scores = query @ key.transpose(-1, -2) / 8**0.5
        if tgt_mask is not None:
            scores = scores.masked_fill(tgt_mask, -1e4)
        seen = self.dropout(scores.softmax(-1)) @ value
        return self.norm(queries + seen + self.linear2(memory).mean(1, keepdim=True))


class MoreQueries(nn.Module):
    """RT-DETR, D-FINE: training adds queries that are made of the labels, and a mask between them and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.query, self.head = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 2)

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        queries, mask = self.query.expand(len(pixel_values), -1, -1), None
        if self.training and labels is not None:
            count = max(len(label["class_labels"]) for label in labels)
            padded = [nn.functional.pad(label["boxes"], (0, 4, 0, count - len(label["boxes"]))) for label in labels]
            queries = torch.cat([torch.stack(padded), queries], 1)
            mask = torch.zeros(queries.shape[1], queries.shape[1], dtype=torch.bool)
            mask[count:, :count] = True
        scores = self.head(self.decoder(queries, pixel_values, tgt_mask=mask))
        return {"scores": scores} if labels is None else {"scores": scores, "loss": scores.square().mean()}


def boxes(*counts: int) -> list[dict[str, Tensor]]:
    return [{"class_labels": torch.arange(n), "boxes": torch.rand(n, 4)} for n in counts]


class Auxiliary(nn.Module):
    """DETR with losses on every layer of the decoder: with labels, the norm and the head see one axis more."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.body(pixel_values)
        results = {"scores": self.head(self.norm(x))}
        if labels is not None:
            results["loss"] = self.head(self.norm(torch.stack([x, x * 0.5]))).square().mean()
        return results


class Groups(nn.Module):
    """LW-DETR: more queries in training than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.query = nn.Linear(8, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(8, 8))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        query = self.query if self.training else self.query[:4]
        scores = self.head(self.stem(pixel_values)[:, :1] + query)
        return {"scores": scores} if labels is None else {"scores": scores, "loss": scores.square().mean()}


def step(model: nn.Module, x: Tensor, labels: object, training: bool) -> dict[str, Tensor]:
    """Outputs and gradients, with random numbers that are always the same."""
    model.train(training).zero_grad(set_to_none=True)
    torch.manual_seed(3)
    found = model(pixel_values=x, labels=labels)
    found.get("loss", found["scores"].square().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in found.items()}, **gradients}


CASES = [
    pytest.param(MoreQueries, boxes(1, 4), [boxes(1, 4), boxes(2, 9), boxes(0, 3), None], id="queries of labels"),
    pytest.param(MoreQueries, boxes(0, 0), [boxes(1, 4), boxes(2, 2)], id="no object in the first batch"),
    pytest.param(Auxiliary, torch.zeros(2), [torch.zeros(2), None], id="an axis more"),
    pytest.param(Groups, torch.zeros(2), [torch.zeros(2), None], id="groups of queries"),
]


@pytest.mark.parametrize("cls, example, trained", CASES)
def test_a_model_whose_parts_are_called_otherwise_with_labels_trains_as_in_float(cls, example, trained):
    torch.manual_seed(0)
    model, x = cls(), torch.randn(2, 6, 8)
    twin = copy.deepcopy(model)
    prepare_qat(model, QATConfig(), {"pixel_values": x, "labels": example})
    for labels in trained:
        for training in (True, False):
            expected = step(twin, x, labels, training)
            with fake_quant_disabled(model):
                found = step(model, x, labels, training)
            assert expected.keys() <= found.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=f"{name}, {training}")


def test_without_labels_a_call_that_only_labels_make_is_refused_with_advice():
    model, x = MoreQueries(), torch.randn(2, 6, 8)
    prepare_qat(model, QATConfig(), {"pixel_values": x})
    with pytest.raises(CaptureError, match="tgt_mask .* example_inputs= that contain"):
        model.train()(x, boxes(1, 2))


def test_labels_of_other_names_are_given_apart():
    class Named(MoreQueries):
        def forward(self, pixel_values: Tensor, objects: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
            return super().forward(pixel_values, objects)

    x = torch.randn(2, 6, 8)
    model = prepare_qat(Named(), QATConfig(), {"pixel_values": x}, labels={"objects": boxes(1, 2)})
    assert float(model.train()(x, boxes(3, 1))["loss"].detach()) > 0


def test_all_graphs_have_the_same_quantizers_and_learn_the_same_scales():
    model, x = MoreQueries(), torch.randn(2, 6, 8)
    inputs = {"pixel_values": x, "labels": boxes(1, 2)}
    plain, labelled = (
        prepare_qat(copy.deepcopy(model), QATConfig(), {"pixel_values": x}),
        prepare_qat(model, QATConfig(), inputs),
    )
    assert list(fake_quantizers(plain)) == list(fake_quantizers(labelled))
    calibrate(labelled, [x])
    assert [graph.training for graph in labelled.decoder.graphs] == [False, True, True]
    scales = {name: p for name, p in labelled.named_parameters() if name.endswith("log2_scale")}
    labelled.train()(**inputs)["loss"].backward()
    decoder = [name for name, scale in scales.items() if name.startswith("decoder.linear") and scale.grad is not None]
    assert decoder or not scales


def test_a_rehearsal_leaves_buffers_gradients_and_random_numbers_alone():
    class Counts(MoreQueries):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm1d(6)

        def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
            self.calls += 1
            return super().forward(self.norm(pixel_values), labels)

    model, labels = Counts(), boxes(1, 2)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    capture(model, {"pixel_values": torch.randn(2, 6, 8, generator=torch.Generator()), "labels": labels})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    assert all(parameter.grad is None for parameter in model.parameters())


class AboveAThreshold(nn.Module):
    """SuperPoint: how many key points there are depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.describe = nn.Conv2d(1, 1, 1), nn.Linear(2, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        points = torch.nonzero(self.score(pixel_values)[:, 0] > 0.5)[:, 1:].float()
        return self.describe(points).relu().mean(0)


@torch.no_grad()
def test_sizes_that_depend_on_the_image_are_dynamic():
    torch.manual_seed(0)
    model = AboveAThreshold()
    twin = copy.deepcopy(model)
    prepare_qat(model, QATConfig(), torch.rand(2, 1, 8, 8))
    for mode in (True, False):
        x = torch.rand(3, 1, 8, 8)
        with fake_quant_disabled(model):
            torch.testing.assert_close(model.train(mode)(x), twin(x))
            torch.testing.assert_close(copy.deepcopy(model)(x), twin(x))


class FewerInTheDark(nn.Module):
    """LightGlue: how many key points there are, which it asks for, is often the same by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.describe, self.head = nn.Linear(1, 4), nn.Linear(4, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        dark = (pixel_values == 0).float().mean().item() > 0.5
        points = pixel_values[:, 0, 0, -4 if dark else -5 :, None]
        return self.head(self.describe(points).relu()).mean(1)


@torch.no_grad()
def test_a_size_that_is_the_same_for_a_changed_image_by_chance_is_dynamic():
    torch.manual_seed(0)
    model = FewerInTheDark()
    twin = copy.deepcopy(model)
    prepare_qat(model, QATConfig(), torch.randn(2, 1, 9, 9))
    dark = torch.zeros(3, 1, 9, 9)
    dark[..., -4:] = 1.0
    with fake_quant_disabled(model):
        for x in (torch.randn(3, 1, 9, 9), dark):
            torch.testing.assert_close(model(x), twin(x))


class Reshapes(nn.Module):
    """Is told the shape that it shall return, which has the size of the batch in it: DETR's position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, shape: torch.Size) -> Tensor:
        return self.inner(x).view(shape)


class TellsTheShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = Reshapes(), nn.Linear(2, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.child(x, torch.Size([len(x), 2, 2])))


def test_a_part_that_is_told_the_size_of_the_batch_stays_python_and_its_layers_are_quantized(caplog):
    torch.manual_seed(0)
    model = TellsTheShape()
    twin = copy.deepcopy(model)
    with caplog.at_level("WARNING"):
        prepare_qat(model, QATConfig(), torch.randn(2, 4))
    assert "child is called otherwise at another size of the batch, or with other labels (shape differ)" in caplog.text
    assert list(qat_layers(model)) == ["child.inner", "head"]
    x = torch.randn(7, 4)
    with fake_quant_disabled(model):
        torch.testing.assert_close(model.train()(x), twin(x))


class AddsAConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.1, self.training) + torch.tensor([5.0, 6.0, 7.0, 8.0])
        return self.last(self.first(x) + torch.arange(4.0))


def test_a_constant_has_one_name_and_one_quantizer_in_all_graphs():
    module = capture(AddsAConstant(), torch.randn(2, 4))[""]
    names = [[node.target for node in way.graph.nodes if node.op == "get_attr"] for way in module.graphs]
    constants = [[name for name in found if name.startswith("_constant_")] for found in names]
    assert constants[0] == constants[1] and len(constants[0]) == 2
