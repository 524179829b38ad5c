"""`hf-qat check`: what TIDL will take of an ONNX file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_qat.cli.options_file import parse_with_config
from hf_qat.files.atomic import whole_file


#: Exit status where TIDL refuses the file, apart from that of a wrong call, 2.
REFUSED = 1


def main(argv: Sequence[str]) -> None:
    """Check a file and print the report.

    Args:
        argv: what follows `hf-qat check`.

    Raises:
        HfQatError: no such device, the file is no ONNX, or the JSON file cannot be written.
        SystemExit: 1 if TIDL refuses the file; 2 for wrong options; 0 after `--help`.
    """
    options = parse_with_config(_parser(), argv)
    from hf_qat.tidl.check import check_tidl  # so that --help need not wait for its imports

    report = check_tidl(options.file, options.target)
    print(report)
    if options.json is not None:
        with whole_file(options.json) as file:
            file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if not report.ok:
        raise SystemExit(REFUSED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-qat check",
        description="Say, layer by layer and before anyone owns a board, what Texas Instruments' TIDL takes of an "
        "ONNX file: on the accelerator, on the Arm core, or not at all; why, and what to do. Works on any ONNX file. "
        "Exits with 1 if the file is refused. For example: hf-qat check model.onnx --target AM68A",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="the ONNX file")
    parser.add_argument(
        "--target",
        required=True,
        help="the device, such as AM68A, or TI's part number, such as J721S2; all are listed where one is not known",
    )
    parser.add_argument("--json", type=Path, help="also write the whole report, with every layer, to this file")
    return parser
