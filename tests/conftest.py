"""The tiny models and photos of the commands' tests, and what a run makes of them.

Tests run on one thread: their problems are tiny, and waking threads costs more than the work.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest
import torch
from vlp_command import Command, command

torch.set_num_threads(1)
# A shell that runs the tests in the background has Ctrl-C ignored, in all that they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _as_at_the_start() -> None:
    """A command that an earlier test ran in this process has set threads and levels of the log."""
    torch.set_num_threads(1)
    for name in ("vlp_plugins", "vlp_adapters"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def vlp() -> Command:
    return command


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family: `xvlm`, `blip`, ..., and `chinese_clip`, which is of none."""
    import tiny_models

    folder = tmp_path_factory.mktemp("models")
    tiny_models.save_xvlm(folder / "xvlm")
    tiny_models.save_blip(folder / "blip")
    tiny_models.save_vit(folder / "vit")
    tiny_models.save_clip(folder / "clip")
    tiny_models.save_siglip(folder / "siglip")
    tiny_models.save_chinese_clip(folder / "chinese_clip")
    return folder


@pytest.fixture(scope="session")
def xvlm(models: Path) -> Path:
    return models / "xvlm"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_models

    return tiny_models.save_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, xvlm: Path, photos: Path) -> Path:
    """What MULTIFLOW makes of X-VLM at three sparsities, with the pruned models."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    command(
        "prune", "--model", xvlm, "--method", "multiflow", "--sparsity", "0.63", "0.75", "0.9",
        "--data", photos, "--batch-size", "3", "--out", out, "--save-model", "--device", "cpu",
    )  # fmt: skip
    return out
