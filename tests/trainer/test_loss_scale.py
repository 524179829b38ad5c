import torch

from hf_qat.trainer.loss_scale import Watch


def test_computing_with_a_number_is_seen():
    number, x = torch.tensor(4), torch.ones(3)
    for use in (
        lambda: x / number,
        lambda: int(number),
        lambda: number.to(torch.float32),
        lambda: torch.div(x, number),
    ):
        with Watch(number) as watch:
            use()
        assert watch.used


def test_looking_at_its_attributes_or_computing_with_another_is_not():
    number, other = torch.tensor(4), torch.tensor(4)
    with Watch(number) as watch:
        assert number.device.type == "cpu" and number.shape == () and torch.is_tensor(number)
        other / 2
    assert not watch.used
