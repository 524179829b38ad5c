"""`--config file.yaml` of the commands: options as a file, for those who run the same thing again and again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from hf_qat.config.recipes import recipe_file, recipe_names
from hf_qat.errors import ConfigError


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments, and before them, as if they had been typed first, those of a YAML file.

    The file holds the names of options without dashes: `private: true` is `--private`, `revision: dev` is
    `--revision dev`; an option that is null, or an empty list, is left out. What is typed wins.

    Args:
        parser: gets an option `--config`.
        argv: what follows the command.

    Raises:
        ConfigError: the file is no YAML mapping.
        OSError: it cannot be read.
        SystemExit: wrong options in either, or `--help`.
    """
    parser.add_argument("--config", type=Path, help="a YAML file with options, such as `revision: dev`")
    return parser.parse_args(words_with_config(argv))


def words_with_config(argv: Sequence[str], spell_out: bool = False) -> list[str]:
    """What is typed, after what the file of its `--config` says, which is left in it.

    Args:
        argv: what follows the command; the file may be the name of a recipe that comes with the package.
        spell_out: write truth values, lists and mappings out, `--fp16 True`, `--fsdp-config {"version": 2}`, as the
            flags of TrainingArguments take them.

    Raises:
        ConfigError: the file is no YAML mapping, or there is neither a file nor a recipe of that name.
        OSError: it cannot be read.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path, nargs="?")
    file = finder.parse_known_args(argv)[0].config
    return [*(_words(_found(file), spell_out) if file is not None else ()), *argv]


def _found(file: Path) -> Path:
    """The file, or the recipe of that name that comes with the package; a name without suffix is meant for one."""
    is_name = file.stem in recipe_names() or not file.suffix
    return recipe_file(str(file)) if is_name and not file.exists() else file


def _words(file: Path, spell_out: bool) -> list[str]:
    """The options of a file as one would type them."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file} holds no options: write lines such as `revision: dev`.")
    return [word for name, value in content.items() for word in _option(file, str(name), value, spell_out)]


def _option(file: Path, name: str, value: object, spell_out: bool) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None or value == []:
        return []
    if spell_out and isinstance(value, Mapping):
        return [f"{flag}={json.dumps(value, default=str)}"]
    if spell_out and isinstance(value, (list, bool)):
        words = value if isinstance(value, list) else [value]
        return [flag, *("no" if word is False else str(word) for word in words)]  # `save_strategy: no`, to YAML false
    if isinstance(value, bool):
        return [flag] if value else []
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"{file}: {name} is {value!r}, and must be a text, a number, true or false.")
    return [f"{flag}={value}"]  # one word, as a value may begin with a dash
