"""The losses that the heads of each class allow; gradient methods use their sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlp_adapters.blip.forward import (
    image_features,
    image_tokens,
    judge_logits,
    match_logits,
    text_features,
    text_tokens,
)
from vlp_adapters.blip.kinds import (
    NEGATIVES_FLOOR,
    answers_of,
    captions_of,
    positions_of,
    text_config,
    word_labels,
)
from vlp_adapters.inputs import need_partners, pairs_of, truths_of
from vlp_adapters.kinds import Kind
from vlp_adapters.negatives import check_negatives, draw_negatives, generator_of
from vlp_adapters.objectives import (
    IGNORED,
    batch_contrastive_loss,
    losses_of_pairs,
    matching_loss,
    similarity,
)
from vlp_plugins.models.adapter import Batch, Negatives
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

_TEMPERATURE = 0.07  # BLIP's at the start; transformers' files do not keep the learned one


def training_losses(
    kind: Kind,
    model: Any,
    batch: Batch,
    negatives: Negatives | None,
    *,
    update_state: bool,
    update_projections: bool,
) -> dict[str, Tensor]:
    """The terms by name; see `BlipAdapter.losses`."""
    if kind is Kind.PRETRAINING:
        return losses_of_pairs(
            model,
            _pairs(model, batch),
            negatives=negatives,
            update_state=update_state,
            update_projections=update_projections,
        )
    if kind is Kind.RETRIEVAL:
        return _retrieval(model, batch, negatives)
    if kind not in _WITHOUT_NEGATIVES:
        raise UnsupportedError(
            f"{type(model).__name__} is one tower and has no loss; load the pre-training model, or "
            "give a loss with ModuleAdapter(model, loss=...)"
        )
    return _WITHOUT_NEGATIVES[kind](model, batch)


def advance(model: Any, batch: Batch, *, update_projections: bool) -> None:
    """Changes the state of the pre-training model as its losses of this batch would."""
    pixels, ids, mask = _pairs(model, batch)
    need_partners(len(ids))
    model.advance(pixels, ids, mask, update_projections=update_projections)


def _retrieval(model: Any, batch: Batch, negatives: Negatives | None) -> dict[str, Tensor]:
    pixels, ids, mask = _pairs(model, batch)
    need_partners(len(ids))
    image = image_tokens(model.vision_model, pixels)
    logits = similarity(
        image_features(model, image),
        text_features(model, ids, mask).T,
        torch.tensor(
            getattr(model.config, "contrastive_temperature", _TEMPERATURE), device=image.device
        ),
    )
    if negatives is None:
        negatives = draw_negatives(
            logits, logits.T, floor=NEGATIVES_FLOOR, generator=generator_of(ids)
        )
    else:
        check_negatives(negatives, len(ids))
    return {
        "itc": batch_contrastive_loss(logits),
        "itm": matching_loss(partial(match_logits, model), ids, mask, image, negatives),
    }


def _dual(model: Any, batch: Batch) -> dict[str, Tensor]:
    pixels, ids, mask = _pairs(model, batch)
    images = image_features(model, image_tokens(model.vision_model, pixels))
    texts = text_features(model, ids, mask)
    return {"itc": batch_contrastive_loss(images @ texts.T * model.logit_scale.exp())}


def _captioning(model: Any, batch: Batch) -> dict[str, Tensor]:
    pixels, ids, mask = _pairs(model, batch)
    labels = batch.get("labels")
    if labels is None:
        labels = ids
    if labels.shape != ids.shape:
        raise BatchError(
            f"labels {list(labels.shape)} do not fit input_ids {list(ids.shape)}; give the ids of "
            "the captions, or no labels"
        )
    words, there = captions_of(model, ids, mask)
    wanted = word_labels(labels, mask, text_config(model).pad_token_id)
    before = wanted.new_full((len(ids), words.shape[1] - ids.shape[1] + 1), IGNORED)
    output = model.text_decoder(
        input_ids=words,
        attention_mask=there,
        encoder_hidden_states=image_tokens(model.vision_model, pixels),
        labels=torch.cat([before, wanted[:, 1:]], dim=1),
    )
    return {"lm": output.loss}


def _answering(model: Any, batch: Batch) -> dict[str, Tensor]:
    pixels, ids, mask = _pairs(model, batch)
    answers = answers_of(model, batch)
    if answers.labels is None:
        raise BatchError(
            "the loss of a question answering model needs answers: batch has no labels (it has: "
            f"{', '.join(batch)}); add labels, the tokenized answers, int64 [B, A]"
        )
    image = image_tokens(model.vision_model, pixels)
    output = model.text_decoder(
        input_ids=answers.ids,
        attention_mask=answers.mask,
        encoder_hidden_states=text_tokens(model.text_encoder, ids, mask, image),
        encoder_attention_mask=mask,
        labels=answers.labels,
    )
    return {"lm": output.loss}


def _judging(model: Any, batch: Batch) -> dict[str, Tensor]:
    logits = judge_logits(model, batch)
    return {"nlvr": functional.cross_entropy(logits, truths_of(batch))}


_WITHOUT_NEGATIVES: dict[Kind, Callable[[Any, Batch], dict[str, Tensor]]] = {
    Kind.DUAL: _dual,
    Kind.CAPTIONING: _captioning,
    Kind.VQA: _answering,
    Kind.NLVR: _judging,
}


def _pairs(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return pairs_of(batch, positions_of(model))
