"""A Hugging Face image processor in the words of edgeai-benchmark: resize, crop, channel order, mean and scale.

Nothing is taken on trust: the recipe is run beside the processor on a test image, and must give the same numbers. It
means what TI computes: where the margin of a centre crop is odd, it starts one pixel later than the processor's.
Schema: edgeai-benchmark, edgeai_benchmark/preprocess/__init__.py, `get_transform_base`; functional.py, `center_crop`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from hf_qat.errors import ExportError, ProcessorError
from hf_qat.tidl.templates.infer import preprocess_image, resized


#: From this size on, ConvNeXt's processor resizes to a square instead of cropping (its documentation, `crop_pct`).
CROP_PCT_BELOW = 384

#: Height and width of the test image: neither square nor a multiple of anything.
TEST_SIZE = (331, 487)

BILINEAR = int(Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Recipe:
    """A processor in the words of `config.yaml`.

    Attributes:
        preprocess: the entries of that name.
        session: those of `session` that concern the input.
        label_offset: what the data call class 0 of the model: 1 where the processor takes 1 off all labels, and leaves
            0 out of training (`do_reduce_labels`); edgeai-benchmark adds it to predictions (`label_offset_pred`).
    """

    preprocess: dict[str, Any]
    session: dict[str, Any]
    label_offset: int = 0


def recipe_of(processor: BaseImageProcessor) -> Recipe:
    """What a processor does to an image, and to labels.

    Raises:
        ProcessorError: it does something that the schema has no words for; its result and the recipe's differ.
        ExportError: it is no image processor.
    """
    processor = require_image_processor(processor)
    settings = processor.to_dict()
    resize, crop = _sizes(settings, type(processor).__name__)
    resample = int(settings.get("resample", BILINEAR))
    preprocess = {
        "resize": resize,
        "crop": crop,
        "data_layout": "NCHW",
        "reverse_channels": bool(settings.get("do_flip_channel_order", False)),
        "backend": "pil",
        "interpolation": None if resample == BILINEAR else resample,
        "resize_with_pad": False,
        "add_flip_image": False,
        "pad_color": 0,
    }
    mean, scale = _normalization(settings)
    session = {"input_data_layout": "NCHW", "input_mean": mean, "input_scale": scale, "input_optimization": False}
    _check(processor, preprocess, session)
    return Recipe(preprocess, session, label_offset=int(bool(settings.get("do_reduce_labels"))))


def require_image_processor(processor: Any) -> Any:
    """The image processor, also of a composite of one and a tokenizer.

    Raises:
        ExportError: it is none.
    """
    found = getattr(processor, "image_processor", processor)
    if not hasattr(found, "to_dict"):
        given = f"{type(found).__name__} {found!r}" if isinstance(found, str) else type(found).__name__
        raise ExportError(f"processor is to be an image processor, as AutoImageProcessor loads one, not {given}.")
    return found


def check_size(preprocess: Mapping[str, Any], shape: Sequence[int]) -> None:
    """The recipe must end in images of the size that the model takes.

    Args:
        preprocess: of a `Recipe`.
        shape: of the model's input, (N, C, H, W).

    Raises:
        ProcessorError: a size that depends on the image.
        ExportError: another one: the calibration data was made otherwise.
    """
    made = preprocess["crop"] if preprocess["crop"] is not None else preprocess["resize"]
    if made is None or (preprocess["crop"] is None and isinstance(made, int)):
        raise ProcessorError(
            "the processor makes images of many sizes; give one with a crop, or with height and width."
        )
    made = [made, made] if isinstance(made, int) else made
    if list(shape[-2:]) != made:
        raise ExportError(
            f"the processor makes images of {made[0]}x{made[1]}, the calibration data has {shape[-2]}x{shape[-1]}: "
            "give the processor that the data was made with."
        )


def _sizes(settings: Mapping[str, Any], name: str) -> tuple[int | list[int] | None, int | list[int] | None]:
    """`resize` (a number is the shorter edge, a pair is height and width) and `crop`; `None` does nothing."""
    resize = _size(settings.get("size"), name) if settings.get("do_resize") else None
    crop = _size(settings.get("crop_size"), name) if settings.get("do_center_crop") else None
    if resize is not None and "crop_pct" in settings and isinstance(resize, int):
        if resize >= CROP_PCT_BELOW:
            return [resize, resize], crop
        return int(resize / settings["crop_pct"]), [resize, resize]
    return resize, crop if crop is not None else (resize if isinstance(resize, list) else None)


def _size(size: Any, name: str) -> int | list[int]:
    """A number for the shorter edge, or height and width."""
    if isinstance(size, int):
        return [size, size]
    keys = {key for key, value in dict(size or {}).items() if value is not None}
    if keys == {"shortest_edge"}:
        return int(size["shortest_edge"])
    if keys == {"height", "width"}:
        return [int(size["height"]), int(size["width"])]
    raise ProcessorError(
        f"{name} resizes to {dict(size or {})}, for which config.yaml has no words: give a processor whose size is "
        '{"height": …, "width": …} or {"shortest_edge": …}, since the model takes images of one size.'
    )


def _normalization(settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """`input_mean` and `input_scale`, for pixels from 0 to 255: `(pixel − mean) · scale`.

    EfficientNet's processor can take 1 off rescaled pixels (`rescale_offset`), and divides by the standard deviation a
    second time (`include_top`).
    """
    rescaled = bool(settings.get("do_rescale"))
    factor = float(settings.get("rescale_factor", 1 / 255)) if rescaled else 1.0
    offset = 1.0 if rescaled and settings.get("rescale_offset") else 0.0
    mean, std = (_triple(settings.get(key) or default) for key, default in (("image_mean", 0.0), ("image_std", 1.0)))
    divisions = bool(settings.get("do_normalize")) + bool(settings.get("include_top"))
    if not settings.get("do_normalize"):
        mean = [0.0] * 3
    return [(value + offset) / factor for value in mean], [factor / value**divisions for value in std]


def _triple(value: float | Sequence[float]) -> list[float]:
    return [float(value)] * 3 if isinstance(value, (int, float)) else [float(number) for number in value]


def _check(processor: BaseImageProcessor, preprocess: Mapping[str, Any], session: Mapping[str, Any]) -> None:
    """Run both on noise with sharp edges, where every wrong size, order or filter shows.

    Compared is what both crop, where the one starts a pixel later.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (*TEST_SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((TEST_SIZE[1] * 2, TEST_SIZE[0] * 2), Image.Resampling.BICUBIC)
    name = type(processor).__name__
    try:
        wanted = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
    except Exception as error:  # processors say in many ways that an image is not all that they want
        raise ProcessorError(f"{name} takes more than an image: {' '.join(str(error).split())}") from error
    got = preprocess_image(image, dict(preprocess), dict(session))
    if wanted.shape != got.shape:
        raise ProcessorError(
            f"{name} makes {list(wanted.shape)} of an image, config.yaml's recipe {list(got.shape)}: it does "
            "something that edgeai-benchmark has no words for. Give one that resizes, crops and normalizes only."
        )
    rows, columns = _odd_margins(resized(image, dict(preprocess)).size[::-1], preprocess["crop"])
    shared = wanted[..., rows:, columns:] - got[..., : got.shape[-2] - rows, : got.shape[-1] - columns]
    steps = np.abs(shared).max(axis=(0, 2, 3)) / np.array(session["input_scale"])
    if steps.max() > 1.0 + 1e-3:
        raise ProcessorError(
            f"{name} and config.yaml's recipe differ by {steps.max():.1f} steps of 8 bits on a test image: it does "
            "something that edgeai-benchmark has no words for. Give a processor that resizes, crops and normalizes "
            "only, in that order."
        )


def _odd_margins(size: tuple[int, int], crop: int | list[int] | None) -> list[int]:
    """For height and width, 1 where a centre crop leaves an odd margin, and 0 elsewhere."""
    cut = [crop, crop] if isinstance(crop, int) else crop
    return [0, 0] if cut is None else [(whole - part) % 2 for whole, part in zip(size, cut, strict=True)]
