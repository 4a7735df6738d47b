"""The walk over a model whose values stay in its files: same masks, and nothing of it is held."""

import shutil
import sys
from copy import deepcopy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import vlp_plugins
from vlp_plugins.masks.compare import distances
from vlp_plugins.runtime import artifacts
from vlp_plugins.runtime.mapped import release, untouched
from vlp_plugins.runtime.memory import resident_bytes
from vlp_plugins.runtime.sharding import OnDemand

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere models are held")
LAYERS = 6


@pytest.fixture(autouse=True)
def every_value_counts(monkeypatch):
    """New values go to files, few as they are here."""
    monkeypatch.setattr(artifacts, "MAPPED", 1)


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
        options["adapter"] = _without("down_proj")
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
    assert all(untouched((masks.new_values or {}).values()))
    assert all(torch.equal(a, b) for a, b in zip(parameters, whole.parameters(), strict=True))


def test_blocks_that_are_not_pruned_leave_nothing_in_memory_either(folder):
    model = vlp_plugins.load(folder, device="cpu")
    layers, held = model.model.layers, []

    def entered(*_):
        before = resident_bytes()
        release(p for layer in layers[:-1] for p in layer.parameters())
        held.append(before - resident_bytes())

    layers[-1].register_forward_pre_hook(entered)
    adapter = _without(r"layers\.[1-5]\.")
    masks = vlp_plugins.prune(
        model, batches(), method="wanda", sparsity=0.5, walk="blocks", adapter=adapter
    )
    assert len(masks) == 7
    assert held
    assert max(held) < sum(p.nbytes for p in layers[0].parameters()) / 2


def test_new_values_stay_in_their_files_whatever_is_done_with_them(folder, tmp_path, monkeypatch):
    model, adapter = vlp_plugins.load(folder, device="cpu"), _without("down_proj")
    made = vlp_plugins.prune(
        model, batches(), method="sparsegpt", sparsity=0.5, walk="blocks", adapter=adapter,
        workplace=tmp_path / "work",
    )  # fmt: skip
    shutil.rmtree(tmp_path / "work")
    held = _Held(made)
    held.after(lambda: made.save(tmp_path / "masks"))
    loaded = vlp_plugins.Masks.load(tmp_path / "masks")
    of_loaded = _Held(loaded)
    of_loaded.after(lambda: None)  # what was read to check the file
    held.after(lambda: loaded == made)
    of_loaded.after(lambda: distances(loaded, made))
    of_loaded.after(lambda: loaded.save(tmp_path / "masks", overwrite=True))
    made_on_access = []
    monkeypatch.setattr(OnDemand, "__getitem__", _noted(OnDemand.__getitem__, made_on_access))
    of_loaded.after(lambda: loaded.save_model(model, tmp_path / "pruned", adapter))
    assert sorted(made_on_access) == sorted(set(made_on_access))  # each once, none to look it up
    pruned = vlp_plugins.load(tmp_path / "pruned", device="cpu")
    assert not loaded.verify(pruned, adapter)
    of_loaded.after(lambda: loaded.apply(pruned, adapter))  # warns: compares all of it
    made.apply(model, adapter)
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.parameters(), pruned.parameters(), strict=True)
    )


def _noted(make, names):
    def noted(tensors, name):
        names.append(name)
        return make(tensors, name)

    return noted


class _Held:
    """How much of new values is in memory after something was done with them."""

    def __init__(self, masks):
        self._values = list(masks.new_values.values())
        self._most = max(values.nbytes for values in self._values)
        assert sum(values.nbytes for values in self._values) > 10 * self._most
        assert all(untouched(self._values))

    def after(self, act):
        act()
        held = resident_bytes()
        release(self._values)
        assert held - resident_bytes() < self._most


def _without(pattern):
    from vlp_adapters.transformers.adapter import TransformersAdapter

    return TransformersAdapter(exclude=[pattern])
