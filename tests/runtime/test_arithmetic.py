"""What is recorded of the arithmetic, and what a device lacks."""

import pytest
import torch
from torch import nn

from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import arithmetic_of, takes_model


def test_masks_say_in_what_arithmetic_they_were_made():
    masks = prune(nn.Sequential(nn.Linear(4, 4)), adapter="module", method="omp", sparsity=0.5)
    assert masks.manifest.arithmetic == {
        "device": "cpu",
        "products": "float32",
        "deterministic": False,
    }


def test_precision_and_deterministic_algorithms_are_seen():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    try:
        found = arithmetic_of(torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)
    assert found == {"device": "cpu", "products": "bfloat16", "deterministic": True}


def test_missing_float64_of_an_apple_gpu_is_an_error_that_says_so():
    @takes_model
    def run(model: nn.Module, error: Exception) -> None:
        raise error

    torchs = TypeError(
        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
        "float64. Please use float32 instead."
    )
    with pytest.raises(UnsupportedError, match=r"no float64.*--device cpu"):
        run(nn.Linear(2, 2), torchs)
    with pytest.raises(TypeError, match="another"):
        run(nn.Linear(2, 2), TypeError("another"))
