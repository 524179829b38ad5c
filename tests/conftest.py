"""What all tests share: no network, and the same random numbers in every run."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings


if TYPE_CHECKING:
    from onnx import ModelProto

    from tests.hub.server import HubServer


# Examples are the same in every run, and not timed: the first one pays for imports and warm-up.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# Before anything imports `huggingface_hub` or `datasets`, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

#: Fixtures that the tests of several rooms use.
pytest_plugins = ["tests.hub.fixtures", "tests.exported"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def tables_of_the_exporter_are_made_once() -> Iterator[None]:
    """At every export PyTorch parses the source of all its 500 translations, and makes the signature of each.

    It also asks for all operations that PyTorch has, once for each of their namespaces.
    """
    import onnxscript._framework_apis as apis
    from torch._export import utils
    from torch.onnx._internal.exporter import _schemas

    made = [(_schemas, "op_signature_from_function"), (utils, "_materialize_cpp_cia_ops")]
    for found in pkgutil.iter_modules(apis.__path__, f"{apis.__name__}."):
        module = importlib.import_module(found.name)
        if hasattr(module, "get_torchlib_ops"):
            made.append((module, "get_torchlib_ops"))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in made:
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def what_was_imported_is_no_garbage(tables_of_the_exporter_are_made_once: None) -> None:
    """A search for garbage passes over half a million objects of PyTorch, transformers and these tests.

    There is one at the beginning of each training, and whenever as many objects were made as a short export makes.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, to which `huggingface_hub` of this process is turned; its cache is in `tmp_path`."""
    from huggingface_hub import close_session

    from tests.hub.client import connect
    from tests.hub.server import HubServer

    with HubServer() as server:
        connect(server, tmp_path / "hf_home", monkeypatch)
        yield server
        close_session()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[ModelProto], Path]:
    """`saved(model)`: the path of a file with it."""

    def save(model: ModelProto) -> Path:
        import onnx

        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return save
