"""What the arguments of a `QATConfig` may be: each function returns the value as plain data, or raises `ConfigError`.

`where` is what the message calls the argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from hf_qat.config.observers import OBSERVERS
from hf_qat.config.targets import TensorScheme, did_you_mean
from hf_qat.errors import ConfigError
from hf_qat.version import __version__


#: Key of the config in transformers' registries and in `config.json`.
QUANT_METHOD = "hf_qat"
#: Widths that a quantizer can have.
BITS = (2, 3, 4, 5, 6, 7, 8, 16)
SCHEME_KEYS = tuple(field.name for field in fields(TensorScheme))
OVERRIDE_KEYS = ("weights", "activations")

#: What a user changes in a scheme: some of the fields of `TensorScheme`, or a whole one.
SchemeChanges = Mapping[str, bool | int | str] | TensorScheme
#: Changes for the modules that a glob matches: `{"weights": {...}, "activations": {...}}`.
ModuleChanges = Mapping[str, SchemeChanges]
#: The same for several globs, in the order in which they apply.
Overrides = Mapping[str, ModuleChanges] | Sequence[tuple[str, ModuleChanges]]


def check_origin(quant_method: object, written_by: str | None) -> None:
    """Refuse a config of another library, or of a newer major version, whose keys may mean something else."""
    if quant_method != QUANT_METHOD:
        raise ConfigError(f"quant_method is {quant_method!r}: this is not a config of {QUANT_METHOD!r}.")
    if written_by is None:
        return
    major = str(written_by).partition(".")[0]
    if not major.isdecimal():
        raise ConfigError(f"hf_qat_version={written_by!r} is not a version such as {__version__!r}.")
    if int(major) > int(__version__.partition(".")[0]):
        raise ConfigError(
            f"the config was written by hf_qat {written_by}, and this is {__version__}: install hf_qat>={written_by}."
        )


def refuse_unknown(where: str, keys: Iterable[object], known: Iterable[str], written_by: str | None = None) -> None:
    """Refuse a key that is not known; the message names the nearest one, and the version that wrote it, if another."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            origin = "" if written_by in (None, __version__) else f" It was written by hf_qat {written_by}."
            raise ConfigError(
                f"{where}: unknown key {key!r}.{did_you_mean(key, known)} Known keys: {', '.join(known)}.{origin}"
            )


def named_values(where: str, data: object) -> dict[str, Any]:
    """Refuse what is no dict with strings as keys: it may come from any file."""
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{where} must be made from a dict of names and values, not {data!r}.")
    return dict(data)


def scheme_changes(where: str, changes: SchemeChanges | None) -> dict[str, Any]:
    """The changed fields of a scheme as a plain dict, each checked by itself."""
    if isinstance(changes, TensorScheme):
        changes = asdict(changes)
    if changes is None:
        return {}
    if not isinstance(changes, Mapping):
        raise ConfigError(f'{where} must be a dict such as {{"bits": 4}} or a TensorScheme, not {changes!r}.')
    refuse_unknown(where, changes, SCHEME_KEYS)
    for key, value in changes.items():
        _check_field(f"{where}[{key!r}]", key, value)
    return dict(changes)


def _check_field(where: str, key: str, value: object) -> None:
    if key == "bits":
        if type(value) is not int or value not in BITS:
            raise ConfigError(f"{where} must be one of the whole numbers {', '.join(map(str, BITS))}, not {value!r}.")
    elif key == "observer":
        if not isinstance(value, str) or value not in OBSERVERS:
            known = ", ".join(sorted(OBSERVERS))
            raise ConfigError(f"{where} is {value!r}.{did_you_mean(value, OBSERVERS)} Known observers: {known}.")
    else:
        flag(where, value)


def module_changes(overrides: Overrides | None) -> dict[str, dict[str, dict[str, Any]]]:
    """The changes to both schemes for each glob, in order, as plain dicts."""
    try:
        pairs = dict({} if overrides is None else overrides)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"overrides must be a dict from globs to changes, not {overrides!r}.") from error
    globs_on_paths("overrides", pairs)
    result = {}
    for glob, changes in pairs.items():
        where = f"overrides[{glob!r}]"
        if not isinstance(changes, Mapping):
            raise ConfigError(f'{where} must be a dict such as {{"weights": {{"bits": 4}}}}, not {changes!r}.')
        refuse_unknown(where, changes, OVERRIDE_KEYS)
        result[glob] = {kind: scheme_changes(f"{where}[{kind!r}]", value) for kind, value in changes.items()}
    return result


def globs_on_paths(where: str, globs: Iterable[str]) -> list[str]:
    """The globs as a list, none of them empty."""
    if not isinstance(globs, Iterable):
        raise ConfigError(f"{where} must be a glob or a sequence of globs on module paths, not {globs!r}.")
    globs = list(globs)
    for glob in globs:
        if not isinstance(glob, str) or not glob:
            raise ConfigError(f"{where}: {glob!r} is not a glob on module paths, such as 'classifier' or '*.conv1'.")
    return globs


def number(where: str, value: float, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{where} must be a number from {low} to {high}, not {value!r}.")
    return float(value)


def positive(where: str, value: float) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where} must be a number above 0, not {value!r}.")
    return float(value)


def count(where: str, value: int) -> int:
    """A whole number from 1; `True` is none."""
    if type(value) is not int or value < 1:
        raise ConfigError(f"{where} must be a whole number from 1, not {value!r}.")
    return value


def one_of(where: str, value: str, choices: Sequence[str]) -> str:
    """One of a few words."""
    if value not in choices:
        raise ConfigError(f"{where} must be {' or '.join(map(repr, choices))}, not {value!r}.")
    return value


def flag(where: str, value: object) -> bool:
    """True or False, and nothing that merely counts as such."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be True or False, not {value!r}.")
    return value
