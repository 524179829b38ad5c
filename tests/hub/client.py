"""The `huggingface_hub` client of this process, turned to a Hub of the tests."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from tests.hub.server import HubServer


def connect(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set at run time what the client reads from the environment when it is imported.

    Args:
        server: where all requests go from now on.
        home: where the cache goes.
        monkeypatch: undoes it.
    """
    for name, value in server.environment(home).items():
        monkeypatch.setenv(name, value)
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "AGENT_HARNESSES_PATH": str(home / "agents.json"),
    }
    for name, value in settings.items():
        if hasattr(constants, name):  # they differ between versions of the client
            monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made on first use, and keeps its endpoint
