"""Every method once through BLIP base and X-VLM base: real sizes, random weights, two batches."""

import gc

import pytest
import torch

from benchmarks.speed.workload import full_size, random_batches
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.pruning import prune

pytestmark = pytest.mark.long
SIZES = {"blip": 226_492_416, "xvlm": 184_025_088}
CPU = torch.device("cpu")
PARAMETERS = {
    "itersnip": {"rounds": 2},
    "tamt": {"steps": 2},
    "lamp-tamt": {"steps": 2},
    "taylor": {"steps": 2, "every": 1},
    "platon": {"steps": 2},
    "chita": {"lambda": 1e-8},
    "chita++": {"lambda": 1e-8, "rounds": 2, "effort": "published"},
}
"""What keeps two batches to minutes; choosing lambda would solve a dozen times."""


@pytest.fixture(scope="module", params=list(SIZES))
def model(request):
    yield request.param, full_size(request.param, CPU)
    gc.collect()


def test_the_prunable_weights_are_those_of_the_papers(model):
    family, network = model
    found = inspect_model(network, registry().adapter_for(network))

    assert found.prunable == SIZES[family]
    assert "not declared by the adapter" not in {e.reason for e in found.excluded}


@pytest.mark.parametrize("method", registry().method_names())
def test_every_method_prunes_exactly_and_its_masks_survive_the_disk(model, method, tmp_path):
    family, network = model
    batches = random_batches(2, 2, CPU)
    masks = prune(network, batches, method=method, sparsity=0.75, **PARAMETERS.get(method, {}))

    # All tensors of these sizes divide by four, so that no scope rounds.
    assert masks.removed == 3 * SIZES[family] // 4
    masks.save(tmp_path / "masks.safetensors")
    assert Masks.load(tmp_path / "masks.safetensors") == masks
    # Tied weights are one weight: both towers of BLIP see the same mask.
    masks.apply(network)
    assert masks.verify(network) == []
