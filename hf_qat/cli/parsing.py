"""The options of a command: the fields of several dataclasses, typed or from a file. Loads no PyTorch."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_qat.cli.options_file import words_with_config
from hf_qat.errors import ConfigError


def parser_of(command: str, description: str, *dataclasses: Any) -> HfArgumentParser:
    """A parser for the fields of `dataclasses`, with a `--config`."""
    parser = HfArgumentParser(
        dataclasses, prog=f"hf-qat {command}", description=description, allow_abbrev=False, conflict_handler="resolve"
    )
    parser.add_argument("--config", type=Path, help="A YAML file with options, such as `learning_rate: 1.0e-4`.")
    return parser


def parse(parser: HfArgumentParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """The dataclasses, and a namespace with the other options, of what is typed and of the file of `--config`.

    Raises:
        ConfigError: an option that is not known, a value that a dataclass refuses, or the file is no YAML mapping.
        SystemExit: wrong options, or `--help`.
    """
    words = words_with_config(argv, spell_out=True)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args=words, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if unknown:
        raise ConfigError(f"unknown here: {' '.join(unknown)}. `{parser.prog} --help` lists the options.")
    return tuple(parsed)


def count(word: str) -> int:
    """The type of an option that counts something: a whole number from 1."""
    if not (word.isdecimal() and int(word)):
        raise ArgumentTypeError(f"{word!r} is no whole number from 1")
    return int(word)
