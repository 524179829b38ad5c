"""The command line, `hf-qat`: one table of commands, and how their errors look."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from hf_qat.errors import HfQatError
from hf_qat.version import __version__


#: What shells expect of a program that was called wrongly, and of one that was interrupted (128 + SIGINT).
BAD_INPUT, INTERRUPTED = 2, 130

#: How warnings begin that libraries give about parts of their own, of which the user of a command can change nothing.
REMARKS = ("'pin_memory' argument is set as true", r"`isinstance\(treespec, LeafSpec\)` is deprecated")


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: has `main(argv)`, which gets what follows the command's name; imported only when it is called.
        summary: a line for `hf-qat --help`.
    """

    module: str
    summary: str


#: The table of commands. A new one is a new row.
COMMANDS = {
    "train": Command("hf_qat.cli.train", "train a float model for int8 on your images, and export it"),
    "calibrate": Command("hf_qat.cli.calibrate", "quantize a float model without training, from images alone"),
    "evaluate": Command("hf_qat.cli.evaluate", "measure a checkpoint or an ONNX file"),
    "export": Command("hf_qat.cli.export", "write the ONNX file of an int8 checkpoint"),
    "analyze": Command("hf_qat.cli.analyze", "say where quantization costs accuracy, layer by layer"),
    "check": Command("hf_qat.cli.check", "say what TI's TIDL takes of an ONNX file, layer by layer"),
    "demo": Command("hf_qat.cli.demo", "train, quantize, export and verify a small net on real images"),
    "push": Command("hf_qat.cli.push", "upload a directory to the Hub, with compiled TIDL artifacts if any"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process if left out.

    Returns:
        The exit status: 0; 2 after bad input, with one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: `--help`, `--version`, or arguments that no command knows.
    """
    options = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            for remark in REMARKS:
                warnings.filterwarnings("ignore", message=remark)
            import_module(COMMANDS[options.command].module).main(options.arguments)
    except (HfQatError, OSError) as error:
        print(f"hf-qat {options.command}: error: {_message(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"hf-qat {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _message(error: Exception) -> str:
    """What to print of an error; of the system's, the file and the reason without their number."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="hf-qat",
        description="Int8 quantization-aware training for Hugging Face vision models.",
        epilog="\n".join(
            [
                "commands:",
                *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
                "",
                "hf-qat COMMAND --help tells more about each.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf_qat {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    return parser
