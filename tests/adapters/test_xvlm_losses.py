"""X-VLM's losses by its adapter, and the batches that it makes for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.processing_clip import CLIPProcessor
from xvlm_adapter_examples import ADAPTER, GOLDEN, tiny, tiny_batch

from benchmarks.parity.xvlm import batches_from_golden, model_from_golden, outputs
from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm import XvlmForPretraining
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError

RECORD = json.loads((GOLDEN / "outputs.json").read_text())


def recorded_negatives(index: int) -> tuple[list[int], list[int]]:
    drawn = RECORD["sequence"][index]["negatives"][0]
    return drawn["image_neg"], drawn["text_neg"]


@pytest.fixture(scope="module")
def golden() -> XvlmForPretraining:
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return batches_from_golden(GOLDEN)[0]


# --- losses ---


@torch.no_grad()
@pytest.mark.parametrize("index", range(6))
def test_losses_with_recorded_negatives(golden: XvlmForPretraining, index: int) -> None:
    batch = batches_from_golden(GOLDEN)[index]
    losses = ADAPTER.losses(golden, batch, negatives=recorded_negatives(index))
    expected = RECORD["sequence"][index]["losses"]
    assert list(losses) == ["itc", "itm", "mlm"]
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], abs=1e-5)


def test_recorded_tensors_and_draws(golden: XvlmForPretraining, batch: dict[str, Tensor]) -> None:
    expected = load_file(GOLDEN / "outputs.safetensors")
    torch.manual_seed(0)
    found = outputs(golden, batch)
    injected = outputs(golden, batch, recorded_negatives(0))
    assert set(found) - set(expected) == {"itc", "itm", "mlm"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
        assert torch.equal(found[name], injected[name])


def test_the_sum_of_losses_reaches_every_weight() -> None:
    model = tiny()
    model.config.text_config.mask_token_id = 3
    torch.stack([*ADAPTER.losses(model, tiny_batch()).values()]).sum().backward()
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_random_choices_depend_on_the_batch_only() -> None:
    model = tiny()
    model.config.text_config.mask_token_id = 3
    state = torch.get_rng_state()
    first = ADAPTER.losses(model, tiny_batch())
    torch.manual_seed(99)
    again = ADAPTER.losses(model, tiny_batch())
    assert first == again
    torch.set_rng_state(state)
    ADAPTER.losses(model, tiny_batch())
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_masked_words_of_the_batch_come_before_made_ones() -> None:
    model = tiny()
    model.config.text_config.mask_token_id = 3
    nothing = torch.full((2, 6), IGNORED)
    batch = tiny_batch(mlm_input_ids=tiny_batch()["input_ids"], mlm_labels=nothing)
    assert ADAPTER.losses(model, batch)["mlm"] == 0.0
    assert ADAPTER.losses(model, tiny_batch())["mlm"] > 0.0


def test_bad_batches_say_what_to_do() -> None:
    model = tiny()
    no_mask = {key: value for key, value in tiny_batch().items() if key != "attention_mask"}
    with pytest.raises(BatchError, match=r"no attention_mask .* padding=True"):
        ADAPTER.streams(model, no_mask)
    with pytest.raises(BatchError, match=r"\[3, 3, 16, 16\], input_ids \[2, 6\] .* do not fit"):
        ADAPTER.streams(model, tiny_batch(pixel_values=torch.rand(3, 3, 16, 16)))
    long = torch.ones(2, 17, dtype=torch.long)
    with pytest.raises(BatchError, match="17 tokens, the model has positions for 16"):
        ADAPTER.streams(model, tiny_batch(input_ids=long, attention_mask=long))
    left = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    with pytest.raises(BatchError, match="padding_side to 'right'"):
        ADAPTER.streams(model, tiny_batch(attention_mask=left))
    with pytest.raises(BatchError, match="at least 2"):
        ADAPTER.losses(model, {key: value[:1] for key, value in tiny_batch().items()})
    with pytest.raises(BatchError, match="mlm_input_ids and mlm_labels in the batch"):
        ADAPTER.losses(model, tiny_batch())
    wrong = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(BatchError, match=r"mlm_labels \[2, 5\] do not fit input_ids \[2, 6\]"):
        ADAPTER.losses(model, tiny_batch(mlm_input_ids=wrong, mlm_labels=wrong))


# --- batches ---


def processor(**special: Any) -> CLIPProcessor:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "seven", "below"]
    vocabulary = {word: index for index, word in enumerate(words)}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=16, **special)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def collated(**special: Any) -> dict[str, Tensor]:
    pictures = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    return ADAPTER.collate(processor(**special), pictures, ["a red seven below a blue", "blue"])


def test_collate_pads_on_the_right_and_masks_words() -> None:
    batch = collated()
    assert list(batch) == [
        "pixel_values", "input_ids", "attention_mask", "mlm_input_ids", "mlm_labels"
    ]  # fmt: skip
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 8, 9, 5, 7, 3], [2, 7, 3, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 3 + [0] * 5]
    chosen = batch["mlm_labels"] != IGNORED
    assert torch.equal(batch["mlm_labels"][chosen], batch["input_ids"][chosen])
    assert (batch["input_ids"][chosen] > 4).all()  # never a special token
    assert chosen.sum(dim=1).tolist() == [2, 1]
    again = collated()
    assert all(torch.equal(value, again[name]) for name, value in batch.items())
    losses = ADAPTER.losses(tiny(), batch)
    assert all(torch.isfinite(value) for value in losses.values())


def test_without_a_mask_token_there_are_no_masked_words() -> None:
    assert list(collated(mask_token=None)) == ["pixel_values", "input_ids", "attention_mask"]
