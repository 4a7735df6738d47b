"""Recorded checkpoints and outputs of the original code bases: see golden/README.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "originals"
TOLERANCE = 1e-5
"""Other kernels and numbers of threads change the outputs of the original by up to 4e-6."""


def recorded(name: str, what: str) -> dict[str, Tensor]:
    """`state`, `inputs` or `outputs` of a recorded model."""
    return load_file(GOLDEN / name / f"{what}.safetensors")


def settings(name: str) -> Any:
    """The configuration of a recorded model."""
    return json.loads((GOLDEN / name / "config.json").read_text())


def base_tensors(name: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor of a checkpoint of the published size."""
    path = GOLDEN / "keys" / f"{name}.json"
    return {key: (shape, dtype) for key, (shape, dtype) in json.loads(path.read_text()).items()}


def base_state(name: str) -> dict[str, Tensor]:
    """A checkpoint of the published size, for `FakeTensorMode`: it takes no memory there."""
    return {
        tensor: torch.empty(shape, dtype=getattr(torch, dtype))
        for tensor, (shape, dtype) in base_tensors(name).items()
    }


def compare(
    name: str, outputs: Mapping[str, Tensor], record_property: Callable[[str, object], None]
) -> None:
    """Compares outputs with the recorded ones, and shows the largest difference (`pytest -s`)."""
    expected = recorded(name, "outputs")
    differences = {key: _difference(outputs[key], expected[key]) for key in outputs}
    largest = max(differences.values())
    record_property("largest difference", largest)
    print(f"\n{name}: largest difference {largest:.1e} over {', '.join(outputs)}")
    assert largest <= TOLERANCE, differences


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())
