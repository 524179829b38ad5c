"""What all tests share: no network, and the same random numbers in every run."""

import os

import pytest
import torch
from hypothesis import settings


# Examples are the same in every run, and not timed: the first one pays for imports and warm-up.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Runs before any test module imports `huggingface_hub` or `datasets`, which read these once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
