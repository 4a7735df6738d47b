"""Which of many answers a decoder finds most likely (Li et al. 2021, arXiv:2107.07651, 3.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Ids and mask of answers `[N, A]` and the numbers `[N]` of their questions to logits `[N, A, V]`.
"""

_ROWS = 256  # answers per call of the decoder: [256, 10, 30 k] logits are 300 MB


def rank_answers(
    decode: Decode,
    questions: int,
    answer_ids: Tensor,
    answer_mask: Tensor,
    *,
    start: int,
    candidates: int,
) -> Tensor:
    """The best answer of every question among a list.

    The answers whose first word is most probable are candidates; that of them with the highest
    log-likelihood, summed over its tokens, is taken. It is BLIP's way; the ALBEF code, which
    X-VLM's follows, adds the first word's log-probability a second time.

    Args:
        decode: runs the decoder; its questions have been read.
        questions: how many.
        answer_ids: `[M, A]` int64, right-padded: a first token, the words, an end token.
        answer_mask: `[M, A]`, 1 for real tokens.
        start: takes the place of the first token.
        candidates: how many answers of a question are looked at; all if there are fewer.

    Returns:
        int64 `[questions]`, numbers of answers, on the device of `answer_ids`.
    """
    device = answer_ids.device
    ids = answer_ids.clone()
    ids[:, 0] = start
    rows = torch.arange(questions, device=device)
    beginning = torch.full((questions, 1), start, device=device)
    first = decode(beginning, torch.ones_like(beginning), rows)[:, 0]
    chosen = first[:, ids[:, 1]].topk(min(candidates, len(ids)), dim=1).indices
    question = rows[:, None].expand_as(chosen).flatten()
    answer = chosen.flatten()
    found = [
        _likelihood(decode, ids[numbers], answer_mask[numbers], of)
        for numbers, of in zip(answer.split(_ROWS), question.split(_ROWS), strict=True)
    ]
    # NaN of a collapsed model must not win.
    likelihood = torch.cat(found).view(chosen.shape).nan_to_num(nan=-torch.inf)
    best = likelihood.argmax(dim=1, keepdim=True)
    return chosen.gather(1, best)[:, 0]


def _likelihood(decode: Decode, ids: Tensor, mask: Tensor, questions: Tensor) -> Tensor:
    """`[N]` log-likelihoods of answers, in float32."""
    logits = decode(ids, mask, questions)[:, :-1].float()
    log = functional.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return log.masked_fill(mask[:, 1:] == 0, 0).sum(dim=1)
