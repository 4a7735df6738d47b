"""Where benchmarks leave their figures: JSON beside the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from vlp_plugins import __version__
from vlp_plugins.atomic import write_text

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What figures depend on beside the program."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def write_results(name: str, figures: Any, folder: Path = FOLDER) -> Path:
    """Writes `figures` to `<folder>/<name>.json` and returns the path."""
    record = {
        "benchmark": name,
        "made_by": f"vlp-plugins {__version__}",
        "machine": machine(),
        "figures": figures,
    }
    path = folder / f"{name}.json"
    write_text(path, json.dumps(record, indent=1) + "\n", overwrite=True)
    return path
