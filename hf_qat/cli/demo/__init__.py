"""`hf-qat demo`: the main job from end to end on real images, with nothing to download.

Float training with the plain `transformers.Trainer`; then for each target calibration, training with `QATTrainer`, and
ONNX files that are checked on ONNX Runtime; at the end a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from hf_qat.cli.options_file import parse_with_config
from hf_qat.errors import HfQatError


#: Module → the package that has it. They are extras of ours, as only some users need them.
REQUIREMENTS = {"sklearn": "scikit-learn", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}


def main(argv: Sequence[str]) -> None:
    """Run the demo.

    Args:
        argv: what follows `hf-qat demo`.

    Raises:
        HfQatError: a package is missing.
        OSError: the output cannot be written.
        SystemExit: wrong options, or `--help`.
    """
    options = parse_with_config(_parser(), argv)
    missing = [package for module, package in REQUIREMENTS.items() if find_spec(module) is None]
    if missing:
        raise HfQatError(f'the demo needs {", ".join(missing)}, not installed here: pip install "hf_qat[demo]"')
    from hf_qat.cli.demo.run import run  # so that --help need not wait for torch

    run(options.output, options.seed, options.epochs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-qat demo",
        description="Train a small MobileNetV2 on handwritten digits, quantize it for an easy and a hard target, with "
        "calibration alone and with quantization-aware training, export it to ONNX, and compare. Needs no download "
        "and no GPU; takes about two minutes on two cores.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("hf_qat_demo"), help="folder for all files (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="of weights, split and order of the images (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=_at_least(1), default=20, help="of the float training (default: %(default)s)")
    return parser


def _at_least(lowest: int) -> Callable[[str], int]:
    """The type of an option that is an integer, not below `lowest`."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        return value

    return number
