import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_qat.graph.capture.call_record import is_with_loss
from hf_qat.graph.capture.capture import capture
from hf_qat.graph.capture.losses import returns_loss


X = torch.randn(4, 8)


class Reconstruction(nn.Module):
    """Its loss needs no labels: how well the input is guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        guessed = self.decoder(self.encoder(x))
        return {"loss": (guessed - x).square().mean(), "guessed": guessed}


class Around(nn.Module):
    """Hands everything on, as a wrapper for adapters does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Supervised()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.inner(*args, **kwargs)
        return out


class Supervised(nn.Module):
    """Has a loss if there is something called `goal`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, goal: Tensor | None = None) -> dict[str, Tensor]:
        out = self.layer(x)
        return {"out": out} if goal is None else {"loss": (out - goal).square().mean(), "out": out}


def test_a_loss_is_a_single_number_of_that_name():
    assert is_with_loss({"loss": torch.tensor(1.0)})
    assert is_with_loss(ImageClassifierOutput(loss=torch.tensor([1.0]), logits=X))
    assert not is_with_loss(ImageClassifierOutput(logits=X))
    assert not is_with_loss({"loss": torch.ones(4)}) and not is_with_loss({"loss": torch.tensor(1)})
    assert not is_with_loss((torch.tensor(1.0), X))


def test_a_model_is_asked_without_labels_and_with_them():
    assert returns_loss(Reconstruction(), {"x": X}, {})
    assert not returns_loss(Supervised(), {"x": X}, {})
    assert returns_loss(Supervised(), {"x": X}, {"goal": torch.randn(4, 4)})


def test_the_parts_of_a_model_with_a_loss_are_captured_and_not_the_loss():
    assert list(capture(Reconstruction(), {"x": X})) == ["encoder", "decoder"]


def test_so_are_those_of_a_part_with_a_loss():
    assert list(capture(Around(), {"x": X}, labels={"goal": torch.randn(4, 4)})) == ["inner.layer"]
