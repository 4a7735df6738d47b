"""SigLIP and SigLIP 2: names, padding that is read, streams, losses, features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clip_examples import (
    LENGTH,
    SIGLIP,
    images,
    made,
    padded_pairs,
    patches,
    siglip2_config,
    siglip_config,
    texts,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertTokenizer,
    Siglip2Model,
    SiglipForImageClassification,
    SiglipModel,
    SiglipProcessor,
    SiglipTextModel,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlp_plugins.data.processors import CombinedProcessor
from vlp_plugins.loading import load_model
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog"]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}


def siglip() -> SiglipModel:
    return made(SiglipModel, siglip_config())


def siglip2() -> Siglip2Model:
    return made(Siglip2Model, siglip2_config())


def flexible_pairs() -> dict[str, Tensor]:
    return padded_pairs() | patches()


# --- names ---


def test_every_class_has_the_names_of_clip() -> None:
    names = set(WeightMap.of(siglip(), SIGLIP))
    assert {"vision.1.attention.output", "vision.0.mlp.fc2", "text.1.self.key"} < names
    assert len(names) == 24
    assert set(WeightMap.of(siglip2(), SIGLIP)) == names
    config = siglip_config()
    single = {
        "vision": (
            SiglipVisionModel(config.vision_config),
            SiglipForImageClassification(config),
            made(SiglipVisionModel, siglip_config(vision_use_head=False).vision_config),
        ),
        "text": (SiglipTextModel(config.text_config),),
    }
    for modality, models in single.items():
        for model in models:
            assert SIGLIP.claims(model)
            expected = {name for name in names if name.startswith(modality)}
            assert set(WeightMap.of(model, SIGLIP)) == expected


def test_heads_are_left_alone_for_a_reason() -> None:
    reasons = {e.reason: e.tensors for e in inspect_model(siglip(), SIGLIP).excluded}
    assert reasons["projection into the common space"] == 2  # text: weight and bias
    (pooling,) = (count for reason, count in reasons.items() if reason.startswith("pooling head"))
    assert pooling == 11
    assert "not declared by the adapter" not in reasons


# --- real tokens ---


def text_stream(model: Any, batch: dict[str, Tensor]) -> Tensor | None:
    *_, stream = SIGLIP.streams(model, batch)
    assert stream.name == "text"
    return stream.real["text"]


def test_padding_is_read_so_every_token_is_real() -> None:
    assert text_stream(siglip(), padded_pairs()) is None
    other = padded_pairs()
    other["input_ids"][:, LENGTH // 2] += 7  # padding, replaced
    before, after = (SIGLIP.text_features(siglip(), b) for b in (padded_pairs(), other))
    assert not torch.allclose(before, after)


def test_with_a_mask_real_are_its_tokens_and_the_last_which_is_pooled() -> None:
    batch = images() | texts()
    real = text_stream(siglip(), batch)
    expected = texts()["attention_mask"].bool()
    expected[:, -1] = True
    assert real is not None
    assert torch.equal(real, expected)
    assert torch.equal(batch["attention_mask"], texts()["attention_mask"])
    other = batch | {"input_ids": batch["input_ids"].masked_fill(~real, 30)}
    before, after = (SIGLIP.text_features(siglip(), b) for b in (batch, other))
    torch.testing.assert_close(before, after)
    boolean = batch | {"attention_mask": texts()["attention_mask"].bool()}
    text_stream(siglip(), boolean)
    assert torch.equal(boolean["attention_mask"], texts()["attention_mask"].bool())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": torch.ones(3, 13).long()}, r"13 tokens.*max_length=12"),
        ({"input_ids": torch.ones(3).long()}, r"input_ids \[3\] do not fit"),
        ({"attention_mask": torch.ones(3, 5)}, r"\[3, 12\] and attention_mask \[3, 5\] do not fit"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "2 images and 3 texts"),
        ({"pixel_values": None}, "no pixel_values"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message) -> None:
    with pytest.raises(BatchError, match=message):
        SIGLIP.streams(siglip(), padded_pairs() | change)


def test_images_of_any_shape_need_their_shapes_and_say_which_patches_are_real() -> None:
    vision, _ = SIGLIP.streams(siglip2(), flexible_pairs())
    real = vision.real["vision"]
    assert real is not None
    assert torch.equal(real, patches()["pixel_attention_mask"].bool())
    with pytest.raises(BatchError, match="no pixel_attention_mask, spatial_shapes"):
        SIGLIP.streams(siglip2(), {"pixel_values": patches()["pixel_values"]})


@pytest.mark.parametrize(("limit", "length"), [(LENGTH, LENGTH), (10**30, 64)])
def test_collate_pads_to_the_full_length_without_a_mask(limit: int, length: int) -> None:
    tokenizer = BertTokenizer(vocab=VOCABULARY, model_max_length=limit)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    processor = SiglipProcessor(images, tokenizer)
    photos = [Image.new("RGB", (20, 20))] * 2
    batch = SIGLIP.collate(processor, photos, ["a red dog", "a dog " * 99])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["input_ids"].shape == (2, length)
    assert batch["input_ids"][0, 5:].tolist() == [0] * (length - 5)
    assert "attention_mask" not in batch


def test_collate_of_images_alone_needs_no_tokenizer() -> None:
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    photos = [Image.new("RGB", (20, 20))] * 2
    assert set(SIGLIP.collate(CombinedProcessor(None, images, "-"), photos, ["a", "b"])) == {
        "pixel_values"
    }


# --- streams, features, losses ---


CASES = [(siglip, padded_pairs), (siglip, lambda: images() | texts()), (siglip2, flexible_pairs)]


@torch.no_grad()
@pytest.mark.parametrize(("make", "batch"), CASES)
def test_streams_and_features_are_those_of_the_model(make, batch) -> None:
    model, batch = make(), batch()
    found = {stream.name: stream.run() for stream in SIGLIP.streams(model, batch)}
    expected = model(**batch)
    for name, output in (
        ("vision", expected.vision_model_output),
        ("text", expected.text_model_output),
    ):
        assert torch.equal(found[name].last_hidden_state, output.last_hidden_state)
    torch.testing.assert_close(SIGLIP.image_features(model, batch), expected.image_embeds)
    torch.testing.assert_close(SIGLIP.text_features(model, batch), expected.text_embeds)


@pytest.mark.parametrize(("make", "batch"), CASES)
def test_the_loss_is_that_of_the_model_and_reaches_every_prunable_weight(make, batch) -> None:
    model, batch = make(), batch()
    (loss,) = SIGLIP.losses(model, batch).values()
    torch.testing.assert_close(loss, model(**batch, return_loss=True).loss)
    loss.backward()
    for name, weight in WeightMap.of(model, SIGLIP).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_tower_by_itself_has_features_if_it_has_a_head() -> None:
    vision = made(SiglipVisionModel, siglip_config().vision_config)
    expected = functional.normalize(vision(**images()).pooler_output, dim=-1)
    torch.testing.assert_close(SIGLIP.image_features(vision, images()), expected)
    headless = made(SiglipVisionModel, siglip_config(vision_use_head=False).vision_config)
    with pytest.raises(UnsupportedError, match="vision_use_head=False"):
        SIGLIP.image_features(headless, images())
    with pytest.raises(UnsupportedError, match="one tower and has no loss"):
        SIGLIP.losses(vision, images())
    with pytest.raises(UnsupportedError, match="has no text tower"):
        SIGLIP.text_features(vision, padded_pairs())


def test_the_loss_of_a_classifier_is_its_cross_entropy() -> None:
    model = made(SiglipForImageClassification, siglip_config())
    batch = images() | {"labels": torch.tensor([0, 1, 1])}
    torch.testing.assert_close(SIGLIP.losses(model, batch), {"ce": model(**batch).loss})


@pytest.mark.parametrize("method", ["multiflow", "snip"])
@pytest.mark.parametrize(("make", "batch"), CASES[::2])
def test_a_saved_model_is_loaded_claimed_and_pruned(tmp_path: Path, make, batch, method) -> None:
    make().save_pretrained(tmp_path)
    model, adapter = load_model(str(tmp_path), device="cpu")
    assert (type(model), adapter.name) == (type(make()), "siglip")
    masks = prune(model, [batch(), batch()], method=method, sparsity=0.5)
    assert masks.removed == WeightMap.of(model, adapter).numel // 2
    masks.apply(model)
    assert masks.verify(model) == []
