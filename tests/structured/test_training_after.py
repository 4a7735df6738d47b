"""Cut models train, write captions and can be pruned further; what was tied is tied."""

from __future__ import annotations

import pytest
import torch
from structured_examples import made, prepared, random_record
from torch import Tensor

import vlp_plugins
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.models.adapter import Adapter, Batch
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.structured.check import example_batch
from vlp_plugins.structured.cuts import cut, masked
from vlp_plugins.structured.survey import blocks_of

TRAINED = ["blip pre-training", "blip retrieval", "blip captioning", "blip vqa", "xvlm", "clip"]


def with_words(adapter: Adapter, batch: Batch) -> dict[str, Tensor]:
    """What the losses read beside images and texts."""
    batch = dict(batch)
    if adapter.name == "xvlm":
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, 1] = batch["input_ids"][:, 1]
        batch |= {"mlm_input_ids": batch["input_ids"], "mlm_labels": labels}
    elif "input_ids" in batch:
        batch["labels"] = batch["input_ids"]
    return batch


@pytest.mark.parametrize("name", TRAINED)
def test_losses_are_those_of_the_masked_model(name: str) -> None:
    model, adapter = prepared(name)
    batch = with_words(adapter, example_batch(model, adapter))
    negatives = ([1, 0], [1, 0])
    state = [tensor.clone() for tensor in adapter.loss_state(model)]
    record = random_record(model, adapter)
    with masked(model, adapter, record):
        expected = adapter.losses(model, batch, negatives=negatives)
    for tensor, before in zip(adapter.loss_state(model), state, strict=True):
        tensor.data.copy_(before)

    cut(model, adapter, record)

    found = adapter.losses(model, batch, negatives=negatives)
    assert found.keys() == expected.keys()
    for term in expected:
        torch.testing.assert_close(found[term], expected[term], rtol=1e-4, atol=1e-5)
    torch.stack(list(found.values())).sum().backward()
    for weight in WeightMap.of(model, adapter).values():
        assert weight.parameter.grad is not None
        assert weight.parameter.grad.shape == weight.parameter.shape


def test_shared_towers_stay_shared_and_twins_follow() -> None:
    model, adapter = prepared("blip pre-training")
    cut(model, adapter, random_record(model, adapter))
    own = dict(model.named_parameters(remove_duplicate=False))
    shared = model._tied_weights_keys
    assert len(shared) > 20
    assert all(own[decoder] is own[encoder] for decoder, encoder in shared.items())
    for online, twin in model.momentum_pairs():
        pairs = list(zip(online.parameters(), twin.parameters(), strict=True))
        assert all(fast.shape == slow.shape for fast, slow in pairs)
        assert not any(slow.requires_grad for _, slow in pairs)
    for block in blocks_of(model, adapter):
        for part in block.parts:
            assert len({id(model.get_submodule(path).weight) for path in part.paths}) == 1


def test_twins_of_equal_values_stay_equal() -> None:
    """The query of a twin is rescaled as its network's is: their average means something."""
    model = made("blip pre-training")
    for online, twin in model.momentum_pairs():
        twin.load_state_dict(online.state_dict())
    _, adapter = prepared("blip pre-training")
    adapter.split_fused(model)
    cut(model, adapter, random_record(model, adapter))
    for online, twin in model.momentum_pairs():
        for fast, slow in zip(online.parameters(), twin.parameters(), strict=True):
            assert torch.equal(fast, slow)


@pytest.mark.parametrize("beams", [1, 2])
def test_captions_with_and_without_cache_are_those_of_the_masked_model(beams: int) -> None:
    model, adapter = prepared("blip captioning")
    pixels = example_batch(model, adapter)["pixel_values"]

    def write(use_cache: bool) -> Tensor:
        return model.generate(
            pixel_values=pixels, max_length=9, num_beams=beams, use_cache=use_cache
        )

    record = random_record(model, adapter)
    with masked(model, adapter, record):
        expected = write(True)
    cut(model, adapter, record)
    assert expected.shape[1] > 3
    assert torch.equal(write(True), expected)
    assert torch.equal(write(False), expected)


@pytest.mark.parametrize("name", ["blip pre-training", "blip retrieval", "xvlm", "clip", "vit"])
def test_single_weights_of_a_cut_model_can_be_pruned(name: str) -> None:
    model, adapter = prepared(name)
    cut(model, adapter, random_record(model, adapter))
    batch = with_words(adapter, example_batch(model, adapter))
    masks = vlp_plugins.prune(model, [batch, batch], method="multiflow", sparsity=0.5)
    weights = WeightMap.of(model, adapter)
    assert sum(int((~keep).sum()) for keep in masks.values()) == int(0.5 * weights.numel)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    with SparsityLock(model, masks).attach(optimizer) as lock:
        if name != "vit":
            torch.stack(list(adapter.losses(model, batch).values())).sum().backward()
        optimizer.step()
        lock.check()
