"""`--config file.yaml` of the commands: options as a file, for those who run the same thing again and again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from hf_qat.errors import ConfigError


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments, and before them, as if they had been typed first, those of a YAML file.

    The file holds the names of options without dashes: `private: true` is `--private`, `revision: dev` is
    `--revision dev`. What is typed wins.

    Args:
        parser: gets an option `--config`.
        argv: what follows the command.

    Raises:
        ConfigError: the file is no YAML mapping.
        OSError: it cannot be read.
        SystemExit: wrong options in either, or `--help`.
    """
    parser.add_argument("--config", type=Path, help="a YAML file with options, such as `revision: dev`")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path, nargs="?")
    file = finder.parse_known_args(argv)[0].config
    return parser.parse_args([*(_words(file) if file is not None else ()), *argv])


def _words(file: Path) -> list[str]:
    """The options of a file as one would type them."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file} holds no options: write lines such as `revision: dev`.")
    return [word for name, value in content.items() for word in _option(file, str(name), value)]


def _option(file: Path, name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"{file}: {name} is {value!r}, and must be a text, a number, true or false.")
    return [flag, str(value)]
