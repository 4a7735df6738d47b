"""X-VLM's activation probe: which layers run and which tokens are real."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from xvlm_adapter_examples import ADAPTER, GOLDEN, second_moments

from benchmarks.parity.xvlm import batches_from_golden, model_from_golden
from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins.models.weights import WeightMap

FILES = {"": "batches.safetensors", "_len17": "batches_len17.safetensors"}


@pytest.fixture(scope="module")
def golden() -> XvlmForPretraining:
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return batches_from_golden(GOLDEN)[0]


@pytest.mark.parametrize("run", FILES)
def test_activation_norms_are_the_published_ones(golden: XvlmForPretraining, run: str) -> None:
    expected = load_file(GOLDEN / f"actn_norms{run}.safetensors")
    found = second_moments(golden, batches_from_golden(GOLDEN, FILES[run]), published=True)
    weights = WeightMap.of(golden, ADAPTER)
    assert set(found) == set(weights)
    for name, weight in weights.items():
        original = ADAPTER.original_name(weight.aliases[0])
        assert original is not None
        torch.testing.assert_close(
            found[name], expected[original].double(), rtol=1e-4, atol=0, msg=name
        )


def test_image_tokens_are_all_real_unless_published(golden: XvlmForPretraining) -> None:
    """The published code drops image tokens when captions are as long as the image."""
    for run, is_mistaken in (("", False), ("_len17", True)):
        batches = batches_from_golden(GOLDEN, FILES[run])
        ours = second_moments(golden, batches, published=False)
        published = second_moments(golden, batches, published=True)
        differ = {name for name, value in ours.items() if not torch.equal(value, published[name])}
        expected = {f"fusion.{j}.cross.{part}" for j in (0, 1) for part in ("key", "value")}
        assert differ == (expected if is_mistaken else set())


def test_padding_does_not_count(golden: XvlmForPretraining, batch: dict[str, Tensor]) -> None:
    mask = batch["attention_mask"]
    assert not mask.all()
    noise = batch | {"input_ids": batch["input_ids"].masked_fill(mask == 0, 77)}
    one, two = (second_moments(golden, [b], published=False) for b in (batch, noise))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], msg=name)


def test_streams_run_each_tower_once_and_pad_nothing_else(golden: XvlmForPretraining) -> None:
    batch = batches_from_golden(GOLDEN)[1]
    streams = list(ADAPTER.streams(golden, batch))
    assert [stream.name for stream in streams] == ["vision", "text", "fusion"]
    assert [sorted(stream.real) for stream in streams] == [["vision"], ["text"], ["text", "vision"]]
    assert streams[2].real["vision"] is None
    assert torch.equal(streams[1].real["text"], batch["attention_mask"] == 1)
