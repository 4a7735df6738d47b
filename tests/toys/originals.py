"""Recorded checkpoints and outputs of the original code bases: see golden/README.md."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "originals"
_XVLM = json.loads((GOLDEN / "xvlm" / "index.json").read_text())
"""X-VLM's small models have most tensors in common, which are stored once."""
TOLERANCE = 1e-5
"""Other kernels and numbers of threads change the outputs of the original by up to 4e-6."""


def recorded(name: str, what: str) -> dict[str, Tensor]:
    """`state`, `inputs` or `outputs` of a recorded model."""
    if name in _XVLM:
        tensors = _xvlm_tensors()
        return {key: tensors[str(number)] for key, number in _XVLM[name][what].items()}
    return load_file(GOLDEN / name / f"{what}.safetensors")


def settings(name: str) -> Any:
    """The configuration of a recorded model; X-VLM's are the options of its loader."""
    if name in _XVLM:
        return dict(_XVLM[name]["options"])
    return json.loads((GOLDEN / name / "config.json").read_text())


def base_tensors(name: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor of a checkpoint of the published size."""
    if name.startswith("xvlm_"):
        whole = json.loads(gzip.decompress((GOLDEN / "xvlm" / "base.json.gz").read_bytes()))[name]
    else:
        whole = json.loads((GOLDEN / "keys" / f"{name}.json").read_text())
    return {key: (shape, dtype) for key, (shape, dtype) in whole.items()}


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


@cache
def _xvlm_tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "xvlm" / "tensors.safetensors")


def _difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max())
