"""Makes the toy models of `tests/core` importable here."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "core"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny problems spend their time waiting for threads otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
