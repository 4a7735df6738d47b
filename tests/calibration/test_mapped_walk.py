"""The walk over a model whose values stay in its files: same masks, and nothing of it is held."""

import sys
from copy import deepcopy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import vlp_plugins
from vlp_plugins.runtime.mapped import release, untouched
from vlp_plugins.runtime.memory import resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere models are held")
LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder of 6 blocks of 4.8 MB each."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=6144, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("wide") / "model"
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(place, max_shard_size="20MB")
    return place


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 100, (1, 20 + number), generator=generator) for number in range(3)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


@pytest.mark.parametrize(
    "method", ["wanda", "sparsegpt", pytest.param("chita", marks=pytest.mark.long)]
)
def test_a_walk_leaves_nothing_of_a_mapped_model_in_memory(method, folder):
    model = vlp_plugins.load(folder, device="cpu")
    parameters = list(model.parameters())
    stored = sum(each.nbytes for each in parameters)
    assert all(untouched(parameters))
    options = {"method": method, "sparsity": 0.5, "walk": "blocks"}
    if method != "wanda":  # a Gram matrix of 6,144 inputs is not for a test
        options["adapter"] = _without_down()
    seen = []

    def between(*_):
        held = resident_bytes()
        release(parameters)
        seen.append((all(untouched(parameters)), held - resident_bytes()))

    masks = vlp_plugins.prune(model, batches(), progress=between, **options)
    assert len(seen) == LAYERS
    assert all(clean for clean, _ in seen)
    # What is outside of the blocks was read, and not given back: no block was.
    assert max(held for _, held in seen) < stored / LAYERS / 2
    whole = deepcopy(model)
    assert not any(untouched(whole.parameters()))
    assert vlp_plugins.prune(whole, batches(), **options) == masks
    assert all(torch.equal(a, b) for a, b in zip(parameters, whole.parameters(), strict=True))


def _without_down():
    from vlp_adapters.transformers.adapter import TransformersAdapter

    return TransformersAdapter(exclude=["down_proj"])
