"""`hf-qat export`: the ONNX file of an int8 checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_qat.cli.options_file import parse_with_config


def main(argv: Sequence[str]) -> None:
    """Export, verify on ONNX Runtime, and print the report.

    Args:
        argv: what follows `hf-qat export`.

    Raises:
        HfQatError: no int8 checkpoint, or it cannot be expressed as ONNX.
        SystemExit: wrong options, or `--help`.
    """
    options = parse_with_config(_parser(), argv)
    from hf_qat.cli.arguments import ModelArguments  # so that --help need not wait for its imports
    from hf_qat.cli.session import load_saved
    from hf_qat.cli.tasks import find_task
    from hf_qat.export.onnx import export_onnx

    task = None if options.task is None else find_task(options.task)
    model = load_saved(ModelArguments(options.checkpoint, options.revision), task)
    print(export_onnx(model, options.file, opset_version=options.opset, dynamic_batch=options.dynamic_batch))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-qat export",
        description="Write the QDQ ONNX file of an int8 checkpoint, verified on ONNX Runtime. For example: hf-qat "
        "export out/export model.onnx --opset 17",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a folder, or the name on the Hub, of what hf_qat has saved")
    parser.add_argument("file", type=Path, help="the ONNX file to write")
    parser.add_argument("--task", help="of the model (default: that of the class it was saved from)")
    parser.add_argument("--revision", default="main", help="on the Hub: a branch, a tag or a commit")
    parser.add_argument("--opset", type=int, default=17, choices=(17, 18, 21), help="default: %(default)s")
    parser.add_argument(
        "--dynamic-batch", "--dynamic_batch", action="store_true", help="take batches of any size; else one image"
    )
    return parser
