"""Run the compiled model, on the board or in TI's emulation on a PC; see README.md.

    python infer.py                  the calibration frames
    python infer.py photo.jpg ...    images, prepared as config.yaml says
    python infer.py --cpu ...        without TIDL, on plain ONNX Runtime: to compare

Outputs are printed and written to outputs/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


PROVIDER = "TIDLExecutionProvider"


def main() -> None:
    """Infer, print and save the outputs of each image."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--cpu", action="store_true", help="without TIDL")
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    settings = json.loads((here / "runtime_options.json").read_text(encoding="utf-8"))
    session_options = onnxruntime.SessionOptions()
    if settings["disable_optimizations"]:
        session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(here / settings["model"]), sess_options=session_options, **providers(here, arguments.cpu, onnxruntime)
    )
    names = [output.name for output in session.get_outputs()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, inputs in frames(here, arguments.images, session.get_inputs()[0].name):
        outputs = session.run(None, inputs)
        np.savez(arguments.out / (name + ".npz"), **dict(zip(names, outputs, strict=True)))
        print(name + ":", describe(here, settings, names, outputs))


def providers(here: Path, cpu: bool, onnxruntime: ModuleType) -> dict[str, Any]:
    """Arguments of the session."""
    if cpu:
        return {"providers": ["CPUExecutionProvider"]}
    if PROVIDER not in onnxruntime.get_available_providers():
        sys.exit("this is not TI's onnxruntime: it has no " + PROVIDER + "; --cpu runs without it")
    artifacts = here / "artifacts"
    if not (artifacts / "allowedNode.txt").exists():
        sys.exit(str(artifacts) + " holds no compiled model: run compile.py on a PC and copy artifacts/ here")
    options = {"artifacts_folder": str(artifacts)}
    if os.environ.get("TIDL_TOOLS_PATH"):  # on a PC; the board has no tools
        options["tidl_tools_path"] = os.environ["TIDL_TOOLS_PATH"]
    return {"providers": [PROVIDER, "CPUExecutionProvider"], "provider_options": [options, {}]}


def frames(here: Path, images: list[Path], input_name: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Names and inputs: of images, or of the calibration frames."""
    if not images:
        for frame in sorted((here / "calibration").glob("*.npz")):
            with np.load(frame) as inputs:
                yield frame.stem, dict(inputs)
        return
    try:
        import yaml
        from PIL import Image, ImageOps
    except ImportError as error:
        sys.exit(str(error) + ": images are prepared by Pillow and PyYAML (pip install pillow pyyaml)")
    if not (here / "config.yaml").exists():
        sys.exit(
            "this bundle has no config.yaml, so how to prepare an image is not known (README.md says why); without "
            "images, infer.py runs the calibration frames"
        )
    config = yaml.safe_load((here / "config.yaml").read_text(encoding="utf-8"))
    for name, path in zip(names_of(images), images, strict=True):
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image)  # as data sets and pipelines turn what a camera has noted
        except OSError as error:
            sys.exit("cannot read " + str(path) + " as an image: " + str(error))
        yield name, {input_name: preprocess_image(upright, config["preprocess"], config["session"])}


def names_of(images: list[Path]) -> list[str]:
    """The stem of each file, behind its number where two have the same."""
    stems = [path.stem for path in images]
    several = len(set(stems)) < len(stems)
    return [f"{number:04}_{stem}" if several else stem for number, stem in enumerate(stems)]


def preprocess_image(image: Any, preprocess: dict[str, Any], session: dict[str, Any]) -> np.ndarray:
    """(1, 3, H, W) float32 of a PIL image, by the entries of config.yaml."""
    pixels = np.asarray(resized(eight_bits(image).convert("RGB"), preprocess), dtype=np.float32)
    crop = preprocess["crop"]
    if crop is not None:
        height, width = (crop, crop) if isinstance(crop, int) else crop
        top, left = (pixels.shape[0] - height + 1) // 2, (pixels.shape[1] - width + 1) // 2  # as edgeai-benchmark
        pixels = pixels[top : top + height, left : left + width]
    if preprocess["reverse_channels"]:
        pixels = pixels[:, :, ::-1]
    mean = np.array(session["input_mean"], dtype=np.float32)
    scale = np.array(session["input_scale"], dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) * scale).transpose(2, 0, 1)[None])


def eight_bits(image: Any) -> Any:
    """The PIL image; of grey values of 16 bits the upper 8, where `convert` would cut off at 255."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    deep = image.mode != "I" or values.max(initial=0) > 255  # mode I has 32 bits, whatever the file had
    return Image.fromarray((values >> 8 if deep else values).clip(0, 255).astype(np.uint8))


def resized(image: Any, preprocess: dict[str, Any]) -> Any:
    """The PIL image, before it is cropped."""
    resize = preprocess["resize"]
    if resize is None:
        return image
    if isinstance(resize, int):  # the shorter edge
        width, height = image.size
        short, long = min(width, height), max(width, height)
        other = int(resize * long / short)
        resize = [resize, other] if height <= width else [other, resize]
    interpolation = preprocess["interpolation"]
    return image.resize((resize[1], resize[0]), 2 if interpolation is None else interpolation)  # 2: bilinear


def describe(here: Path, settings: dict[str, Any], names: list[str], outputs: list[np.ndarray]) -> str:
    """The five best classes of a classifier; shapes of everything else."""
    if settings["task"] != "classification":
        return ", ".join(name + " " + str(list(output.shape)) for name, output in zip(names, outputs, strict=True))
    scores = outputs[0].reshape(-1)
    labels = settings["labels"]
    best = np.argsort(-scores)[:5]
    return ", ".join(printable(str(labels.get(str(k), k))) + f" {scores[k]:.3f}" for k in best)


def printable(label: str) -> str:
    """Without escape sequences, which a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in label)


if __name__ == "__main__":
    main()
