"""Answers of BLIP's question answering model: written, or the most likely of a list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlp_adapters.answer_ranking import rank_answers
from vlp_adapters.blip.forward import image_embeds_of, text_tokens
from vlp_adapters.blip.kinds import encoder_ids, kind_of, text_config
from vlp_adapters.kinds import Kind
from vlp_plugins.models.adapter import Batch, need
from vlp_plugins.runtime.errors import UnsupportedError


def write_answers(model: Any, batch: Batch, max_length: int, num_beams: int) -> Tensor:
    """Answers `[B, A]` to the questions of a batch: [DEC], words, [SEP], padding.

    Raises:
        UnsupportedError: if the class answers no questions.
    """
    text = text_config(model)
    written: list[tuple[Tensor, Tensor]] = []
    for rows, states in _read(model, batch):
        start = torch.full((len(rows), 1), text.bos_token_id, device=states.device)
        ids = model.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=states,
            max_length=min(max_length, text.max_position_embeddings),
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
        )
        written.append((rows, ids))
    total = sum(len(rows) for rows, _ in written)
    longest = max(ids.shape[1] for _, ids in written)
    answers = written[0][1].new_full((total, longest), text.pad_token_id)
    for rows, ids in written:
        answers[rows, : ids.shape[1]] = ids
    return answers


def choose_answers(
    model: Any, batch: Batch, answer_ids: Tensor, answer_mask: Tensor, candidates: int
) -> Tensor:
    """The most likely of a list of answers for every question, `[B]`; see `rank_answers`.

    Raises:
        UnsupportedError: if the class answers no questions.
    """
    questions = len(need(batch, "input_ids")[0])
    chosen = torch.zeros(questions, dtype=torch.int64, device=answer_ids.device)
    for rows, states in _read(model, batch):

        def decode(ids: Tensor, mask: Tensor, questions: Tensor, states: Tensor = states) -> Tensor:
            logits: Tensor = model.text_decoder(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=states[questions],
                use_cache=False,
            ).logits
            return logits

        chosen[rows] = rank_answers(
            decode,
            len(rows),
            answer_ids,
            answer_mask,
            start=text_config(model).bos_token_id,
            candidates=candidates,
        )
    return chosen


def _read(model: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of equally long questions, and their states `[rows, length, D]` without padding.

    transformers' decoder attends to the padding of questions (see `text_tokens`), so an answer
    would depend on the other questions of the batch.
    """
    if kind_of(model) is not Kind.VQA:
        raise UnsupportedError(
            f"{type(model).__name__} answers no questions; load BlipForQuestionAnswering"
        )
    ids, mask = need(batch, "input_ids", "attention_mask")
    images = image_embeds_of(model, batch)
    words = encoder_ids(model, ids)
    lengths = mask.sum(dim=1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        part = words[rows, :length]
        states = text_tokens(model.text_encoder, part, mask[rows, :length], images[rows])
        yield rows, states
