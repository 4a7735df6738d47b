"""transformers' BLIP classes: names, masks, features."""

from __future__ import annotations

import pytest
import torch
from blip_transformers_examples import (
    ADAPTER,
    CLASSES,
    DEC,
    answers,
    downstream,
    pairs,
    text_config,
    vision,
    vision_config,
)
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextModel,
    BlipVisionModel,
)

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import UnsupportedError

ENC = 49


def pretrained() -> BlipForPretraining:
    config = BlipPretrainConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        embed_dim=8,
        queue_size=4,
        dec_token_id=DEC,
        enc_token_id=ENC,
    )
    return BlipForPretraining(config).eval()


# --- names and masks ---


def parts(tower: str, *kinds: str) -> set[str]:
    names = {
        "self": ("query", "key", "value", "output"),
        "cross": ("query", "key", "value", "output"),
        "ffn": ("fc1", "fc2"),
    }
    return {f"{tower}.{i}.{k}.{n}" for i in range(2) for k in kinds for n in names[k]}


def test_a_weight_has_the_name_of_its_part_in_the_pretraining_model() -> None:
    names = {kind: set(WeightMap.of(downstream(c), ADAPTER)) for kind, c in CLASSES.items()}
    assert names["retrieval"] == vision() | parts("text", "self", "cross", "ffn")
    assert names["captioning"] == (
        vision() | parts("text", "cross", "ffn") | parts("decoder", "self")
    )
    assert names["vqa"] == (
        vision() | parts("text", "self", "cross", "ffn") | parts("decoder", "self", "cross", "ffn")
    )
    assert names["captioning"] | names["retrieval"] == set(WeightMap.of(pretrained(), ADAPTER))


def test_the_copies_of_the_vqa_decoder_inherit_and_read_the_question() -> None:
    weights = WeightMap.of(downstream(BlipForQuestionAnswering), ADAPTER)
    copies = {name: w.copy_of for name, w in weights.items() if w.copy_of}
    assert set(copies) == parts("decoder", "cross", "ffn")
    assert all(copy_of == name.replace("decoder", "text") for name, copy_of in copies.items())
    assert weights["decoder.0.cross.key"].owners[0].tokens == "question"
    assert weights["decoder.0.cross.query"].owners[0].tokens == "text"
    assert weights["text.0.cross.key"].owners[0].tokens == "vision"


def test_the_dual_encoder_and_single_towers_have_no_cross_attention_to_prune() -> None:
    dual = set(WeightMap.of(downstream(BlipModel), ADAPTER))
    assert dual == vision() | parts("text", "self", "ffn")
    assert set(WeightMap.of(BlipVisionModel(vision_config()), ADAPTER)) == vision()
    assert set(WeightMap.of(BlipTextModel(text_config()), ADAPTER)) == parts("text", "self", "ffn")


@pytest.mark.parametrize("task", CLASSES)
def test_masks_of_the_pretraining_model_fit_and_land_where_for_task_says(task: str) -> None:
    model, target = pretrained(), downstream(CLASSES[task])
    weights = WeightMap.of(model, ADAPTER)
    generator = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in weights.items()}
    masks = Masks.from_dense(kept, Manifest.for_weights(weights, method="test"))
    masks.apply(target, ADAPTER)
    assert masks.verify(target, ADAPTER) == []
    where = ADAPTER.for_task(task, model)
    assert where.keys() == weights.keys()
    for name, paths in where.items():
        for path in paths:
            assert torch.equal(target.get_parameter(path) != 0, masks[name]), path
    reached = {path for paths in where.values() for path in paths}
    assert reached == {w.aliases[0] for w in WeightMap.of(target, ADAPTER).values()}


def test_what_a_task_does_not_use_goes_nowhere_and_what_it_copies_to_several_places() -> None:
    model = pretrained()
    unused = {n for n, paths in ADAPTER.for_task("captioning", model).items() if not paths}
    assert unused == parts("text", "self")
    unused = {n for n, paths in ADAPTER.for_task("retrieval", model).items() if not paths}
    assert unused == parts("decoder", "self")
    path = "encoder.layer.1.crossattention.self.key.weight"
    both = (f"text_encoder.{path}", f"text_decoder.bert.{path}")
    assert ADAPTER.for_task("vqa", model)["text.1.cross.key"] == both
    assert ADAPTER.for_task("pretraining", model)["text.1.cross.key"] == both


def test_tasks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="pretraining, retrieval, captioning, vqa"):
        ADAPTER.for_task("grounding", pretrained())
    with pytest.raises(UnsupportedError, match="BlipForImageTextRetrieval is no pre-training"):
        ADAPTER.for_task("vqa", downstream(BlipForImageTextRetrieval))


# --- features ---


@torch.no_grad()
def test_features_and_matching_are_those_of_the_classes() -> None:
    batch = pairs()
    model = downstream(BlipForImageTextRetrieval)
    images, texts = ADAPTER.image_features(model, batch), ADAPTER.text_features(model, batch)
    expected = model(**batch, use_itm_head=False).itm_score
    torch.testing.assert_close(images @ texts.T, expected)
    scores = model(**batch).itm_score
    torch.testing.assert_close(ADAPTER.match(model, batch), scores[:, 1] - scores[:, 0])
    dual = downstream(BlipModel)
    output = dual(**batch)
    torch.testing.assert_close(ADAPTER.image_features(dual, batch), output.image_embeds)
    torch.testing.assert_close(ADAPTER.text_features(dual, batch), output.text_embeds)


@torch.no_grad()
def test_captions_are_greedy_and_do_not_read_the_reference() -> None:
    model, batch = downstream(BlipForConditionalGeneration), pairs()
    ids = ADAPTER.caption(model, batch, max_length=6)
    assert torch.equal(ids, ADAPTER.caption(model, batch | {"input_ids": answers()}, max_length=6))
    assert ids[:, 0].tolist() == [DEC] * 3
    assert ids.shape[1] <= 6
    start = torch.full((3, 1), DEC)
    logits = model(pixel_values=batch["pixel_values"], input_ids=start).logits
    assert torch.equal(ids[:, 1], logits[:, -1].argmax(dim=-1))


@torch.no_grad()
def test_images_of_another_size_are_read() -> None:
    large = {"pixel_values": torch.rand(2, 3, 24, 24)}
    for kind in (BlipForImageTextRetrieval, BlipModel):
        assert ADAPTER.image_features(downstream(kind), large).shape == (2, 8)
    assert len(ADAPTER.caption(downstream(BlipForConditionalGeneration), large, max_length=4)) == 2


def test_what_a_class_cannot_do_says_which_can() -> None:
    model = downstream(BlipForQuestionAnswering)
    with pytest.raises(UnsupportedError, match="no matching head; load BLIP's retrieval model"):
        ADAPTER.match(model, pairs())
    with pytest.raises(UnsupportedError, match="BlipForQuestionAnswering has no common space"):
        ADAPTER.image_features(model, pairs())
    with pytest.raises(UnsupportedError, match="no decoder of captions; load BLIP's captioning"):
        ADAPTER.caption(model, pairs(), max_length=4)
