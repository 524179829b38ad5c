"""Where weights come from: a state dict, a file, a directory or a Hub repository, read without running any pickle."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from hf_qat.errors import WeightsError


#: A state dict, or where to read one: a file, a directory with one of `FILE_NAMES`, or the name of a Hub repository.
Source = Mapping[str, Any] | str | os.PathLike[str]

#: What `save_pretrained` calls its files, now and formerly, in order of preference; an index lists several files.
FILE_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

#: Training scripts save the state dict beside the optimizer's, under the first of these keys that is there; the last
#: two are those of moving averages (timm, torchvision).
CONTAINERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")

#: A source that ends so is a file and not the name of a Hub repository.
SHARD_SUFFIXES = (".safetensors", ".bin")
FILE_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".bin")


def name_of(source: Source) -> str:
    """What to call `source` in a report."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "a state dict"


def read_weights(source: Source) -> dict[str, Tensor]:
    """The state dict that `source` is or holds, on the CPU where it is read from a file.

    Only what is no local path is looked for on the Hub.

    Raises:
        WeightsError: there is no such source, it cannot be read, or it holds something other than named tensors.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _named_tensors(source, name_of(source))
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path, lambda name: path.parent / name)
    find = _finder(source, path)
    for name in FILE_NAMES:
        file = find(name)
        if file is not None:
            return _read(file, find)
    where = "in this directory" if path.is_dir() else "here or on the Hub, or there is no connection to it"
    raise WeightsError(f"no weights in {name_of(source)}: none of {', '.join(FILE_NAMES)} {where}.")


def _finder(source: str | os.PathLike[str], path: Path) -> Callable[[str], Path | None]:
    """A function from the name of a file to its place in the directory or the repository, `None` where it has none."""
    if path.is_dir():
        return lambda name: path / name if (path / name).is_file() else None
    try:
        validate_repo_id(os.fspath(source))
        is_repository = isinstance(source, str) and not source.endswith(FILE_SUFFIXES)
    except HFValidationError:
        is_repository = False
    if not is_repository:
        raise WeightsError(f"no weights: {name_of(source)} is no file or directory here, nor the name of a Hub model.")

    def find(name: str) -> Path | None:
        try:
            file = cached_file(os.fspath(source), name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise WeightsError(f"no weights: {name_of(source)} is no path here, and on the Hub: {error}") from error
        return None if file is None else Path(file)

    return find


def _read(file: Path, find: Callable[[str], Path | None]) -> dict[str, Tensor]:
    """One file, or all that an index lists."""
    if file.suffix == ".json":
        state: dict[str, Tensor] = {}
        for name in _shard_names(file):
            shard = find(name)
            if shard is None or not shard.is_file():
                raise WeightsError(f"{file} lists {name}, which is not there: the checkpoint is incomplete.")
            state.update(_read(shard, find))
        return state
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options that timm and torchvision add
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading a pickle stumbles over where the file is damaged, or none
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"{file} cannot be read as weights ({type(error).__name__}: {reason}). It may be cut short, no file of "
            "weights at all, or hold objects other than tensors, which are not loaded because they could run code: "
            "save model.state_dict() alone."
        ) from error
    return _named_tensors(content, str(file))


def _shard_names(index: Path) -> list[str]:
    """Names of files beside the index: it may come from anywhere, and could name any file of this machine."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is no index of weights: it has no weight_map ({error}).") from error
    for name in names:
        if not isinstance(name, str) or {"/", "\\"} & set(name) or not name.endswith(SHARD_SUFFIXES):
            raise WeightsError(f"{index} lists {name!r}, which is no name of a file of weights beside it.")
    return sorted(names)


def _named_tensors(content: object, name: str) -> dict[str, Tensor]:
    """`content` as a state dict, taken out of what a training script may have wrapped around it."""
    for container in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name} is or holds {type(content).__name__}, not a state dict: save model.state_dict().")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise WeightsError(f"{name} is no state dict: {key!r} is {type(value).__name__}, not a named tensor.")
    return dict(content)
