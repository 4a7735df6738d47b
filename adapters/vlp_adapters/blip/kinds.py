"""Which of BLIP's classes a model is, and what each of them reads of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlp_adapters.kinds import Classes, Kind, kind_among
from vlp_adapters.objectives import IGNORED
from vlp_plugins.models.adapter import Batch, need
from vlp_plugins.runtime.errors import BatchError

NEGATIVES_FLOOR = 1e-4
"""Least probability of a wrong partner of the matching loss, as in the original."""


_TRANSFORMERS = "transformers.models.blip.modeling_blip"
_CLASSES: Classes = {
    "vlp_adapters.blip.modeling.BlipForPretraining": Kind.PRETRAINING,
    "vlp_adapters.blip.nlvr_model.BlipForNlvr": Kind.NLVR,
    f"{_TRANSFORMERS}.BlipForImageTextRetrieval": Kind.RETRIEVAL,
    f"{_TRANSFORMERS}.BlipForConditionalGeneration": Kind.CAPTIONING,
    f"{_TRANSFORMERS}.BlipForQuestionAnswering": Kind.VQA,
    f"{_TRANSFORMERS}.BlipModel": Kind.DUAL,
    f"{_TRANSFORMERS}.BlipVisionModel": Kind.VISION,
    f"{_TRANSFORMERS}_text.BlipTextModel": Kind.TEXT,
}


def kind_of(model: nn.Module) -> Kind | None:
    """The kind of a model or of what it is derived from; None if it is no BLIP."""
    return kind_among(_CLASSES, model)


def text_config(model: Any) -> Any:
    """The configuration of the text towers of any kind that has one."""
    return getattr(model.config, "text_config", model.config)


def encoder_ids(model: Any, input_ids: Tensor) -> Tensor:
    """What the multimodal encoder reads: the pre-training model begins with [ENC].

    So does what was loaded from an original file. Others of transformers' classes keep [CLS], as
    the forward of the published matching model does.
    """
    config = model.config if kind_of(model) is Kind.PRETRAINING else text_config(model)
    token: int | None = getattr(config, "enc_token_id", None)
    return input_ids if token is None else begin_with(input_ids, token)


def decoder_ids(model: Any, input_ids: Tensor) -> Tensor:
    """What a decoder reads: [DEC] first, in every kind.

    transformers' forward leaves that to the caller; its generation and the published training
    begin with it.
    """
    return begin_with(input_ids, text_config(model).bos_token_id)


def captions_of(model: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask that a decoder of captions reads: [DEC], the prompt if there is one, the rest.

    Original models of captioning have learned to go on from a prompt ("a picture of").
    """
    ids = decoder_ids(model, input_ids)
    prompt = ids.new_tensor(prompt_of(model)).expand(len(ids), -1)
    words = torch.cat([ids[:, :1], prompt, ids[:, 1:]], dim=1)
    return words, torch.cat([torch.ones_like(prompt).to(attention_mask), attention_mask], dim=1)


def prompt_of(model: Any) -> list[int]:
    """The tokens between [DEC] and every caption; only what was loaded from original files has."""
    return list(getattr(text_config(model), "prompt_ids", None) or ())


def positions_of(model: Any) -> int:
    """Most tokens of a text, so that there is a position for each of them and of the prompt."""
    return int(text_config(model).max_position_embeddings) - len(prompt_of(model))


def begin_with(input_ids: Tensor, token: int) -> Tensor:
    """A copy of `[B, L]` ids whose first column is `token`."""
    ids = input_ids.clone()
    ids[:, 0] = token
    return ids


def word_labels(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int) -> Tensor:
    """The words to predict, `[B, L]`: the ids, and `IGNORED` where there is padding."""
    real = (attention_mask != 0) & (input_ids != pad_token_id)
    return input_ids.masked_fill(~real, IGNORED)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the decoder of the VQA model reads and should say: one answer per question.

    Attributes:
        ids: int64 `[B, A]`, what the decoder reads; [DEC] first.
        mask: int64 `[B, A]`, 1 for real tokens.
        labels: int64 `[B, A]`, the words to predict, -100 where none; the decoder shifts them
            itself. None if the batch has none.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None


def answers_of(model: Any, batch: Batch) -> Answers:
    """The answers of a batch; questions take their place where it has none.

    Args:
        model: a `BlipForQuestionAnswering`.
        batch: `labels`, tokenized answers padded with the padding token or -100; or
            `decoder_input_ids`, read as they are; with either, `decoder_attention_mask` says what
            is real, else all but padding.

    Raises:
        BatchError: if they do not fit each other or the number of questions.
    """
    questions, question_mask = need(batch, "input_ids", "attention_mask")
    labels: Tensor | None = batch.get("labels")
    given: Tensor | None = batch.get("decoder_input_ids")
    pad = text_config(model).pad_token_id
    if given is not None:
        ids = given
    elif labels is not None:
        ids = decoder_ids(model, labels.masked_fill(labels == IGNORED, pad))
    else:
        return Answers(decoder_ids(model, questions), question_mask, None)
    mask: Tensor | None = batch.get("decoder_attention_mask")
    if mask is None:
        mask = (ids != pad).long()
    fitting = ids.ndim == 2 and ids.shape == mask.shape and len(ids) == len(questions)
    if not fitting or (labels is not None and labels.shape != ids.shape):
        shapes = {
            key: list(batch[key].shape)
            for key in ("decoder_input_ids", "decoder_attention_mask", "labels")
            if batch.get(key) is not None
        }
        raise BatchError(
            f"answers do not fit {len(questions)} questions: {shapes}; give one row per question, "
            "all of one shape [B, A]"
        )
    return Answers(ids, mask, None if labels is None else word_labels(labels, mask, pad))
