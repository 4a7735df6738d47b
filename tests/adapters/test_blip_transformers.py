"""transformers' BLIP classes: the same names, masks of the pre-training model, losses of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_adapters.blip.adapter import BlipAdapter
from vlp_plugins.errors import BatchError, UnsupportedError
from vlp_plugins.masks import Manifest, Masks
from vlp_plugins.weights import WeightMap

ADAPTER = BlipAdapter()
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DEC, ENC, SEP = 48, 49, 2


def vision_config() -> BlipVisionConfig:
    return BlipVisionConfig(
        **SIZES, intermediate_size=32, image_size=16, patch_size=8, initializer_range=0.2
    )


def text_config() -> BlipTextConfig:
    return BlipTextConfig(
        **SIZES,
        vocab_size=50,
        intermediate_size=24,
        max_position_embeddings=16,
        bos_token_id=DEC,
        sep_token_id=SEP,
        initializer_range=0.2,
    )


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


def downstream(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    sizes = {"projection_dim": 8, "image_text_hidden_size": 8}
    config = BlipConfig(vision_config=vision_config(), text_config=text_config(), **sizes)
    return kind(config).eval()


def pairs() -> dict[str, Tensor]:
    """Three texts of 6, 3 and 4 tokens, padded to 6; the number of image tokens is 5."""
    ids = torch.tensor([[1, 7, 8, 9, 10, SEP], [1, 7, SEP, 0, 0, 0], [1, 6, 5, SEP, 0, 0]])
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids.sign()}


def answers() -> Tensor:
    return torch.tensor([[1, 9, SEP, 0], [1, 7, 9, SEP], [1, 5, SEP, 0]])


CLASSES = {
    "retrieval": BlipForImageTextRetrieval,
    "captioning": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
}


# --- names and masks ---


def parts(tower: str, *kinds: str) -> set[str]:
    names = {
        "self": ("query", "key", "value", "output"),
        "cross": ("query", "key", "value", "output"),
        "ffn": ("fc1", "fc2"),
    }
    return {f"{tower}.{i}.{k}.{n}" for i in range(2) for k in kinds for n in names[k]}


def vision() -> set[str]:
    names = ("attention.qkv", "attention.output", "mlp.fc1", "mlp.fc2")
    return {f"vision.{i}.{name}" for i in range(2) for name in names}


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


# --- streams ---


def names_of(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    return [stream.name for stream in ADAPTER.streams(model, batch)]


def test_streams_are_the_towers_of_the_class() -> None:
    expected = {
        BlipForImageTextRetrieval: ["vision", "encoder"],
        BlipForConditionalGeneration: ["vision", "decoder"],
        BlipForQuestionAnswering: ["vision", "encoder", "decoder"],
        BlipModel: ["vision", "text"],
    }
    for kind, names in expected.items():
        assert names_of(downstream(kind), pairs()) == names
    images, texts = (
        {k: v for k, v in pairs().items() if (k[0] == "p") == p} for p in (True, False)
    )
    assert names_of(BlipVisionModel(vision_config()), images) == ["vision"]
    assert names_of(BlipTextModel(text_config()), texts) == ["text"]


def test_retrieval_streams_compute_what_the_forward_computes() -> None:
    model, batch = downstream(BlipForImageTextRetrieval), pairs()
    last: list[Tensor] = []
    model.text_encoder.register_forward_hook(lambda *args: last.append(args[2].last_hidden_state))
    for stream in ADAPTER.streams(model, batch):
        stream.run()
    model(**batch)
    torch.testing.assert_close(last[0], last[1])


def read_by_decoder(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """The ids that the decoder reads in the probe, and which tokens are real meanwhile."""
    seen: list[Tensor] = []
    words = model.text_decoder.bert.embeddings
    handle = words.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    *_, last = streams = list(ADAPTER.streams(model, batch))
    for stream in streams:
        stream.run()
    handle.remove()
    (ids,) = seen
    return ids, dict(last.real)


def test_the_captioning_decoder_begins_with_dec() -> None:
    ids, real = read_by_decoder(downstream(BlipForConditionalGeneration), pairs())
    assert ids[:, 0].tolist() == [DEC] * 3
    assert torch.equal(ids[:, 1:], pairs()["input_ids"][:, 1:])
    assert torch.equal(real["text"], pairs()["attention_mask"].bool())
    assert real["vision"] is None


def test_the_vqa_decoder_reads_answers_else_questions() -> None:
    model, batch = downstream(BlipForQuestionAnswering), pairs()
    ids, real = read_by_decoder(model, batch | {"labels": answers()})
    assert torch.equal(ids[:, 1:], answers()[:, 1:])
    assert ids[:, 0].tolist() == [DEC] * 3
    assert torch.equal(real["text"], answers() != 0)
    assert torch.equal(real["question"], batch["attention_mask"].bool())
    ignored = answers().masked_fill(answers() == 0, -100)
    assert torch.equal(read_by_decoder(model, batch | {"labels": ignored})[0], ids)
    given, real = read_by_decoder(
        model,
        batch | {"decoder_input_ids": answers(), "decoder_attention_mask": torch.ones(3, 4).long()},
    )
    assert torch.equal(given, answers())
    assert real["text"].all()
    ids, real = read_by_decoder(model, batch)
    assert torch.equal(ids[:, 1:], batch["input_ids"][:, 1:])
    assert torch.equal(real["text"], real["question"])


def test_answers_that_do_not_fit_are_refused() -> None:
    model = downstream(BlipForQuestionAnswering)
    with pytest.raises(BatchError, match=r"do not fit 3 questions: .*labels.*\[2, 4\]"):
        ADAPTER.streams(model, pairs() | {"labels": answers()[:2]})


# --- losses ---


def test_captioning_loss_is_that_of_the_class_on_texts_that_begin_with_dec() -> None:
    model, batch = downstream(BlipForConditionalGeneration), pairs()
    ids = batch["input_ids"].clone()
    ids[:, 0] = DEC
    labels = ids.masked_fill(ids == 0, -100)
    expected = model(**(batch | {"input_ids": ids}), labels=labels).loss
    torch.testing.assert_close(ADAPTER.losses(model, batch), {"lm": expected})
    torch.testing.assert_close(ADAPTER.losses(model, batch | {"labels": labels}), {"lm": expected})
    with pytest.raises(BatchError, match=r"labels \[3, 4\] do not fit input_ids \[3, 6\]"):
        ADAPTER.losses(model, batch | {"labels": answers()})
    with pytest.raises(BatchError, match="no input_ids, attention_mask"):
        ADAPTER.losses(model, {"pixel_values": batch["pixel_values"]})


def test_vqa_loss_is_that_of_the_class_on_answers_that_begin_with_dec() -> None:
    model, batch = downstream(BlipForQuestionAnswering), pairs()
    ids = answers()
    ids[:, 0] = DEC
    expected = model(
        **batch,
        decoder_input_ids=ids,
        decoder_attention_mask=ids.sign(),
        labels=answers().masked_fill(answers() == 0, -100),
    ).loss
    found = ADAPTER.losses(model, batch | {"labels": answers()})
    torch.testing.assert_close(found, {"lm": expected})
    with pytest.raises(BatchError, match="no labels .*add labels, the tokenized answers"):
        ADAPTER.losses(model, batch)


def test_dual_encoder_loss_is_that_of_the_class() -> None:
    model, batch = downstream(BlipModel), pairs()
    expected = model(**batch, return_loss=True).loss
    torch.testing.assert_close(ADAPTER.losses(model, batch), {"itc": expected})


def test_retrieval_losses_are_made_from_both_heads() -> None:
    model, batch = downstream(BlipForImageTextRetrieval), pairs()
    negatives = ([1, 2, 0], [2, 0, 1])
    losses = ADAPTER.losses(model, batch, negatives=negatives)
    logits = model(**batch, use_itm_head=False).itm_score / 0.07
    own = torch.arange(3)
    both = functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)
    torch.testing.assert_close(losses["itc"], both / 2)
    images = torch.cat([own, torch.tensor(negatives[0]), own])
    texts = torch.cat([own, own, torch.tensor(negatives[1])])
    scores = model(
        pixel_values=batch["pixel_values"][images],
        input_ids=batch["input_ids"][texts],
        attention_mask=batch["attention_mask"][texts],
    ).itm_score
    target = torch.tensor([1] * 3 + [0] * 6)
    torch.testing.assert_close(losses["itm"], functional.cross_entropy(scores, target))


def test_retrieval_draws_negatives_from_the_batch() -> None:
    model = downstream(BlipForImageTextRetrieval)
    state = torch.random.get_rng_state()
    assert ADAPTER.losses(model, pairs())["itm"] == ADAPTER.losses(model, pairs())["itm"]
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="do not fit a batch of 3"):
        ADAPTER.losses(model, pairs(), negatives=([1], [3]))
    with pytest.raises(BatchError, match="only 1 pair"):
        ADAPTER.losses(model, {name: value[:1] for name, value in pairs().items()})


def test_single_towers_have_no_loss() -> None:
    with pytest.raises(UnsupportedError, match="BlipVisionModel is one tower and has no loss"):
        ADAPTER.losses(BlipVisionModel(vision_config()), pairs())


@pytest.mark.parametrize("kind", [*CLASSES.values(), BlipModel])
def test_gradients_reach_every_prunable_weight(kind: type[nn.Module]) -> None:
    model = downstream(kind)
    is_vqa = kind is BlipForQuestionAnswering
    losses = ADAPTER.losses(model, pairs() | ({"labels": answers()} if is_vqa else {}))
    sum(losses.values()).backward()
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


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
