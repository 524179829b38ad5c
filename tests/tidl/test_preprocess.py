"""One PNG through the Hugging Face processor and through `config.yaml`'s recipe, done here by numpy and PIL alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from hf_qat.errors import ExportError
from hf_qat.tidl.preprocess import check_size, recipe_of
from hf_qat.tidl.templates.infer import preprocess_image


PROCESSORS = {
    "vit": transformers.ViTImageProcessorPil(),
    "deit": transformers.DeiTImageProcessorPil(),
    "convnext": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    "convnext-384": transformers.ConvNextImageProcessorPil(),
    "segformer": transformers.SegformerImageProcessorPil(size={"height": 128, "width": 160}),
    "mobilenet_v2": transformers.MobileNetV2ImageProcessorPil(),
    "mobilevit": transformers.MobileViTImageProcessorPil(size={"shortest_edge": 288}),
    "imagenet": transformers.BitImageProcessorPil(),
    "without normalization": transformers.ViTImageProcessorPil(do_normalize=False),
    "without rescaling": transformers.ViTImageProcessorPil(do_rescale=False, do_normalize=False),
    "nearest": transformers.ViTImageProcessorPil(resample=0),
    "lanczos": transformers.ViTImageProcessorPil(resample=1),
    "box": transformers.ViTImageProcessorPil(resample=4),
    "hamming": transformers.ViTImageProcessorPil(resample=5),
    "one mean for all": transformers.ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3),
    "other rescaling": transformers.ViTImageProcessorPil(rescale_factor=1 / 127.5),
    "oblong crop": transformers.DeiTImageProcessorPil(
        size={"height": 250, "width": 300}, crop_size={"height": 192, "width": 255}
    ),
    "efficientnet": transformers.EfficientNetImageProcessorPil(),
    "efficientnet with an offset": transformers.EfficientNetImageProcessorPil(
        rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False
    ),
    "efficientnet with everything": transformers.EfficientNetImageProcessorPil(
        rescale_factor=1 / 127.5, rescale_offset=True, do_center_crop=True
    ),
}

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
ALL = {"do_normalize": True, "do_resize": True}

#: `preprocessor_config.json` as Hub repositories of the models that TI's devices take hold it: many are years old.
PUBLISHED = {
    "resnet": {"crop_pct": 0.875, **ALL, **IMAGENET, "resample": 3, "size": 224},
    "resnet, new": {"crop_pct": 0.95, **ALL, **IMAGENET, "resample": 3, "size": {"shortest_edge": 224}},
    "regnet": {"crop_pct": 0.875, **ALL, **IMAGENET, "resample": 3, "size": 224},
    "regnet of 384": {"crop_pct": 1.0, **ALL, **IMAGENET, "resample": 3, "size": 384},
    "mobilenet_v2": {
        **ALL,
        "do_center_crop": True,
        "do_rescale": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 256},
    },
    "mobilenet_v2 of 96": {"do_center_crop": True, "crop_size": 96, "size": {"shortest_edge": 128}},
    "convnext": {"crop_pct": 0.875, **ALL, **IMAGENET, "resample": 3, "size": 224},
    "convnext of 384": {"crop_pct": 1.0, **ALL, **IMAGENET, "resample": 3, "size": 384},
    "vit": {**ALL, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": 224},
    "vit of 384": {**ALL, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": 384},
    "deit": {**ALL, **IMAGENET, "do_center_crop": True, "crop_size": 224, "resample": 3, "size": 256},
    "deit of 384": {**ALL, **IMAGENET, "do_center_crop": True, "crop_size": 384, "resample": 3, "size": 438},
    "segformer": {**ALL, **IMAGENET, "align": False, "do_reduce_labels": True, "resample": 2, "size": 512},
    "segformer of 128": {**ALL, **IMAGENET, "do_reduce_labels": False, "resample": 2, "size": 128},
}


def published(name: str) -> transformers.BaseImageProcessor:
    """The processor that `AutoImageProcessor` makes of it, without torchvision."""
    classes = IMAGE_PROCESSOR_MAPPING_NAMES[name.split()[0].strip(",")]
    return getattr(transformers, classes["pil"]).from_dict(PUBLISHED[name])


PROCESSORS |= {f"{name} on the Hub": published(name) for name in PUBLISHED}


@pytest.fixture(scope="module", params=[(300, 451), (451, 300), (256, 256)], ids=["wide", "high", "square"])
def png(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with smooth shapes, edges and noise."""
    height, width = request.param
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    shapes = np.stack([x % 180, y % 180, ((x // 32 + y // 32) % 2) * 180], axis=-1)
    path = tmp_path_factory.mktemp("png") / "image.png"
    Image.fromarray((shapes + noise).astype(np.uint8)).save(path)
    return path


@dataclass(frozen=True)
class Followed:
    """A recipe's result, (1, 3, H, W), and along which axes its crop starts one pixel after Hugging Face's."""

    pixels: np.ndarray
    later: tuple[int, int] = (0, 0)

    def shared(self, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What both have of the image, of these pixels and of those that Hugging Face cropped."""
        rows, columns = self.later
        height, width = self.pixels.shape[-2] - rows, self.pixels.shape[-1] - columns
        return self.pixels[..., :height, :width], other[..., rows:, columns:]


def follow(recipe: dict, session: dict, path: Path) -> Followed:
    """What TI's documents say that the entries mean, and what its code computes."""
    image = Image.open(path).convert("RGB")
    if isinstance(recipe["resize"], int):
        ratio = recipe["resize"] / min(image.size)
        size = [recipe["resize"] if side == min(image.size) else int(side * ratio) for side in image.size]
    else:
        size = recipe["resize"][::-1]
    method = Image.Resampling.BILINEAR if recipe["interpolation"] is None else recipe["interpolation"]
    pixels = np.asarray(image.resize(size, method)).astype(np.float64)
    later = (0, 0)
    if recipe["crop"] is not None:
        crop = np.broadcast_to(recipe["crop"], 2)
        margin = np.array(pixels.shape[:2]) - crop
        top, left = (int((size + 1) * 0.5) for size in margin)  # edgeai-benchmark, functional.py, center_crop
        later = (top - margin[0] // 2, left - margin[1] // 2)  # Hugging Face: image_transforms.py, center_crop
        pixels = pixels[top : top + crop[0], left : left + crop[1]]
    if recipe["reverse_channels"]:
        pixels = pixels[..., ::-1]
    return Followed(((pixels - session["input_mean"]) * session["input_scale"]).transpose(2, 0, 1)[None], later)


@pytest.mark.parametrize("name", PROCESSORS)
def test_recipe_and_processor_agree_within_one_step_of_8_bits(name, png):
    recipe = recipe_of(PROCESSORS[name])
    with Image.open(png) as image:
        wanted = PROCESSORS[name](images=image, return_tensors="np")["pixel_values"]
    got = follow(recipe.preprocess, recipe.session, png)
    assert got.pixels.shape == wanted.shape
    step = 1.0001 * np.array(recipe.session["input_scale"])
    ours, theirs = got.shared(wanted)
    assert (abs(ours - theirs).max(axis=(0, 2, 3)) <= step).all()
    with Image.open(png) as image:
        script = preprocess_image(image, recipe.preprocess, recipe.session)  # of infer.py
    np.testing.assert_allclose(script, got.pixels, atol=1e-3 * step.min())


def test_the_centre_crop_of_an_odd_margin_starts_where_tis_does():
    """A row of 5 pixels cropped to 2: TI takes pixels 2 and 3, Hugging Face 1 and 2."""
    image = Image.fromarray(np.arange(5, dtype=np.uint8)[None, :, None].repeat(2, axis=0).repeat(3, axis=2))
    entries = {"resize": None, "crop": [2, 2], "reverse_channels": False, "interpolation": None}
    session = {"input_mean": [0.0] * 3, "input_scale": [1.0] * 3}
    assert preprocess_image(image, entries, session)[0, 0].tolist() == [[2, 3], [2, 3]]
    processor = transformers.ViTImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
    assert processor.center_crop(np.asarray(image).transpose(2, 0, 1), SizeDict(height=2, width=2))[0, 0].tolist() == [
        1,
        2,
    ]


def test_a_processor_whose_crop_starts_elsewhere_is_refused():
    class Shifted(transformers.DeiTImageProcessorPil):
        def center_crop(self, image: np.ndarray, *arguments: object, **options: object) -> np.ndarray:
            return np.roll(super().center_crop(image, *arguments, **options), 1, axis=-1)

    with pytest.raises(ExportError, match="Shifted .* differ by .* steps"):
        recipe_of(Shifted())


def test_imagenets_figures_are_those_that_ti_writes():
    session = recipe_of(transformers.SegformerImageProcessorPil()).session
    np.testing.assert_allclose(session["input_mean"], [123.675, 116.28, 103.53])
    np.testing.assert_allclose(session["input_scale"], [0.017125, 0.017507, 0.017429], atol=1e-6)


@pytest.mark.parametrize(("name", "offset"), [("segformer", 1), ("segformer of 128", 0), ("vit", 0)])
def test_labels_that_the_processor_shifts_are_shifted_back(name, offset):
    assert recipe_of(published(name)).label_offset == offset


class Sharpening(transformers.ViTImageProcessorPil):
    """Does something that no entry of the schema says."""

    def normalize(self, image: np.ndarray, *arguments: object, **options: object) -> np.ndarray:
        return super().normalize(image, *arguments, **options) ** 2


@pytest.mark.parametrize("given", ["microsoft/resnet-50", Path("processor"), 3])
def test_what_is_no_processor_is_said_to_be_none(given: object):
    with pytest.raises(ExportError, match=f"AutoImageProcessor loads one, not {type(given).__name__}"):
        recipe_of(given)


def test_a_processor_that_the_schema_cannot_express_is_refused():
    with pytest.raises(ExportError, match="Sharpening .* differ by .* steps"):
        recipe_of(Sharpening())
    with pytest.raises(ExportError, match="no words"):
        recipe_of(transformers.DetrImageProcessorPil())


@pytest.mark.parametrize(
    ("resize", "crop", "shape", "message"),
    [
        ([224, 224], [224, 224], (1, 3, 32, 32), "224x224, the calibration data has 32x32"),
        (256, 224, (1, 3, 256, 256), "224x224, the calibration data has 256x256"),
        (256, None, (1, 3, 256, 256), "many sizes"),
    ],
)
def test_a_processor_of_another_size_than_the_model_is_refused(resize, crop, shape, message):
    with pytest.raises(ExportError, match=message):
        check_size({"resize": resize, "crop": crop}, shape)
