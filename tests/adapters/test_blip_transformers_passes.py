"""transformers' BLIP classes: streams and losses."""

from __future__ import annotations

from typing import Any

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
    vision_config,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipTextModel,
    BlipVisionModel,
)

from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

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
