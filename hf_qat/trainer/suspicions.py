"""What is no error, and often a mistake that nothing else would show: each is warned of once, by its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from hf_qat.config.qat_config import QATConfig
from hf_qat.model.parameter_groups import scale_parameters
from hf_qat.model.untrained import has_batch_norms, is_untrained, untrained_batch_norms
from hf_qat.publish.accuracy import Accuracy
from hf_qat.quantization.layers import qat_layers
from hf_qat.trainer.fsdp import gathered


logger = logging.get_logger(__name__)

#: Images of a batch, and steps, from which statistics of batch norm are worth something: of fewer images, mean and
#: variance are those of the few; after fewer steps, a tenth each (PyTorch's momentum), much is what was there before.
FEWEST_IMAGES, FEWEST_STEPS = 4, 10

#: How far the images of evaluation may be from those of training: in standard deviations, and as a ratio of these.
#: Augmentation and a small batch stay below; pixels from 0 to 1 beside normalised ones do not.
FAR, WIDER = 1.5, 2.5

#: The largest share of a metric that ONNX Runtime may change, and how many images more: both are near-ties.
LARGEST_CHANGE, NEAR_TIES = 0.02, 2

#: From so many bits on, codes are fine enough to be trained as an 8-bit net is.
FINE_BITS = 8

#: The share of a layer's weights (root of the mean square) that a step of Adam may change at 8 bits. Measured: ResNet
#: in batches of 32, one epoch at int8: 0.035 kept 94.2 points (float 93.7), 0.14 left 8.3, which is chance.
LARGEST_STEP = 0.05

#: Keeps the size of a layer without weights from being divided by.
TINY = 1e-12


class ImageStatistics:
    """Mean and standard deviation of the first images of training and of evaluation, to see whether they are alike."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}

    def look_at(self, model: nn.Module, inputs: Any, where: str) -> None:
        """Note the first batch of `where`, `"training"` or `"evaluation"`; with both, compare them, once."""
        name = getattr(model, "main_input_name", "pixel_values")
        images = inputs.get(name) if isinstance(inputs, Mapping) else None
        if where in self._seen or not isinstance(images, Tensor) or not _are_images(images):
            return
        values = images.detach().float()
        mean, deviation = torch.stack([values.mean(), values.std()]).tolist()
        self._seen[where] = (mean, deviation)
        if len(self._seen) == 2:
            self._compare(*self._seen["training"], *self._seen["evaluation"])

    def _compare(self, mean: float, deviation: float, other_mean: float, other_deviation: float) -> None:
        wide, narrow = max(deviation, other_deviation), min(deviation, other_deviation)
        if abs(mean - other_mean) <= FAR * wide and wide <= WIDER * narrow:
            return
        logger.warning(
            f"Images of evaluation are prepared otherwise than those of training: their mean is {other_mean:.3g} and "
            f"their standard deviation {other_deviation:.3g}, and in training {mean:.3g} and {deviation:.3g}. "
            "Normalise both alike: accuracy is measured on what the ranges were not made for."
        )


def _are_images(images: Tensor) -> bool:
    return images.is_floating_point() and images.dim() == 4 and images.numel() > 1


def warn_of_few_samples(
    model: nn.Module, config: QATConfig, live_until: float, args: TrainingArguments, steps: int
) -> None:
    """Say so if batch norm follows the data, and there is little of them.

    Args:
        model: prepared.
        config: its recipe.
        live_until: fraction of training for which batch norm is live.
        args, steps: of the training: images of a batch, and how many steps it has.
    """
    live_steps = int(live_until * steps)
    if live_steps == 0 or not has_batch_norms(model):
        return
    images = args.per_device_train_batch_size * (args.world_size if config.sync_batch_norm else 1)
    if images < FEWEST_IMAGES:
        logger.warning(
            f"Batch norm takes its statistics from batches of {images} for {live_steps} steps: too few samples, and "
            "evaluation will differ from training. Use batches of 8 or more, freeze_bn_at=0, or sync_batch_norm=True "
            "where there are several processes."
        )
    elif live_steps < FEWEST_STEPS and untrained_batch_norms(model):
        logger.warning(
            f"Batch norm follows the data for {live_steps} steps only: too few samples, as its statistics are those "
            "of an untrained model. Train longer, or begin with a model that is trained."
        )


def warn_against_recipe(model: nn.Module, config: QATConfig, optimizer: torch.optim.Optimizer) -> None:
    """Say so where training is set up otherwise than what was measured to work (`hf_qat.config.recipes`).

    Args:
        model: prepared.
        config: its recipe. Batch norms that are live without its asking for it have a reason.
        optimizer: that trains it; of `accelerate` perhaps.
    """
    groups = optimizer.param_groups
    scales = {id(scale) for scale in scale_parameters(model)}
    decayed = [p for group in groups if group.get("weight_decay") for p in group["params"] if id(p) in scales]
    if decayed:
        logger.warning(
            f"Weight decay draws {len(decayed)} learned scales and offsets towards 1 and 0, which nothing in the data "
            "asks for. Leave them out of it: `parameter_groups(model, ...)` makes groups for an optimizer of your own."
        )
    _warn_of_one_peak(groups, scales, config.scale_lr_multiplier)
    if is_untrained(model) or untrained_batch_norms(model):  # has much to learn before it is a matter of codes
        return
    bits = min(config.weight_scheme.bits, config.activation_scheme.bits)
    if bits < FINE_BITS and config.freeze_bn_at > 0 and has_batch_norms(model):
        logger.warning(
            f"Batch norm is live for the first {config.freeze_bn_at:.0%} of a training at {bits} bits: codes that "
            "turn back and forth keep its statistics from settling. Leave freeze_bn_at at 0."
        )
    step = relative_step(model, _rate_of_weights(optimizer, scales))
    if bits >= FINE_BITS and step > LARGEST_STEP:
        logger.warning(
            f"The learning rate changes half of the layers by more than {step:.1%} of their weights in each step, too "
            "much for what is trained already. Start from a twentieth of the float model's rate."
        )


def _warn_of_one_peak(groups: Sequence[dict[str, Any]], scales: Collection[int], multiplier: float) -> None:
    """Say so where a scheduler such as `OneCycleLR` has put its one rate in the place of those of the groups."""
    peaks = {all(id(p) in scales for p in group["params"]): group.get("max_lr") for group in groups}
    if multiplier != 1 and peaks.get(True) is not None and peaks[True] == peaks.get(False):
        logger.warning(
            f"The scheduler gives learned scales the learning rate of the weights, and not {multiplier:g} times as "
            'much as scale_lr_multiplier says. Give it a rate for each group: max_lr=[group["lr"] for group in '
            "optimizer.param_groups]."
        )


@torch.no_grad()
def relative_step(model: nn.Module, rate: float) -> float:
    """By how much a step of Adam at this learning rate changes the weights of a layer: each one by about `rate`.

    Returns:
        The rate by the root mean square of a layer's weights; of all layers that are trained, the median; 0 for none.
    """
    with gathered(model):
        sizes = [layer.weight.square().mean().sqrt() for layer in qat_layers(model).values()]
        return rate / max(float(torch.stack(sizes).median()), TINY) if sizes else 0.0


def _rate_of_weights(optimizer: torch.optim.Optimizer, scales: Collection[int]) -> float:
    """The highest learning rate of anything but scales, of a whole schedule; 0 for an optimizer that is no Adam."""
    if "adam" not in type(getattr(optimizer, "optimizer", optimizer)).__name__.lower():
        return 0.0
    of_weights = [group for group in optimizer.param_groups if any(id(p) not in scales for p in group["params"])]
    rates = [group.get("max_lr", group.get("initial_lr", group["lr"])) for group in of_weights]
    return max((float(rate or 0.0) for rate in rates), default=0.0)


def warn_of_lost_accuracy(accuracy: Accuracy, stage: str, images: int) -> None:
    """Say so if the exported file has another accuracy than the model that it was exported from.

    Args:
        accuracy: of both, on the same images.
        stage: of the model, a key of `accuracy`.
        images: how many there are; 0 where that is not known.
    """
    allowed = LARGEST_CHANGE + (NEAR_TIES / images if images else 0.0)
    for name, value in accuracy.get(stage, {}).items():
        exported = accuracy.get("onnxruntime", {}).get(name)
        if exported is not None and not abs(exported - value) <= allowed * max(abs(value), abs(exported)):
            logger.warning(
                f"The converted model differs from the trained one: {name} is {exported:.4g} on ONNX Runtime and was "
                f"{value:.4g} before. Look for the layer by analyze(), and compare the file by verify_onnx()."
            )
