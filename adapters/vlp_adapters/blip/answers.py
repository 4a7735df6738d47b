"""What the decoder of the VQA model reads and should say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlp_adapters.blip.kinds import decoder_ids, text_config
from vlp_adapters.blip.objectives import IGNORED, word_labels
from vlp_plugins.adapter import Batch, need
from vlp_plugins.errors import BatchError


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer per question.

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
