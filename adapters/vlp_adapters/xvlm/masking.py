"""Masked words: inputs and labels of masked language modelling, made from plain captions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vlp_adapters.negatives import generator_of
from vlp_adapters.objectives import IGNORED
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import BatchError

_REPLACED, _RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are (BERT)
_SPECIAL = ("pad", "unk", "cls", "sep", "bos", "eos")


def mask_tokens(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Collection[int] = (),
    probability: float = 0.25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses tokens to predict: 80% become the mask token, 10% a random word, 10% stay.

    Every caption gets `round(probability * its ordinary tokens)` targets, at least one, so that
    short captions train too. Unlike the original, the number per caption has no upper limit and
    whole words are not kept together.

    Args:
        input_ids: `[B, L]` int64.
        attention_mask: `[B, L]`, 1 for real tokens.
        mask_token_id: id of the mask token.
        vocab_size: random words are ids below it that are not special.
        special_ids: ids that are neither chosen nor drawn ([CLS], [SEP], [PAD], ...).
        probability: share of the ordinary tokens of a caption to predict, in (0, 1].
        generator: CPU generator; None for the global one.

    Returns:
        `mlm_input_ids` and `mlm_labels`, both `[B, L]` int64 on the device of `input_ids`;
        labels are -100 where nothing is to be predicted.

    Raises:
        ValueError: if `probability` is outside (0, 1] or every id below `vocab_size` is special.
    """
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability is {probability}; it must be above 0 and at most 1")
    special = torch.tensor(sorted({*special_ids, mask_token_id}), device="cpu")
    words = torch.arange(vocab_size, device="cpu")
    words = words[~torch.isin(words, special)]
    if not len(words):
        raise ValueError(f"all {vocab_size} ids of the vocabulary are special: nothing to predict")

    ids = input_ids.cpu()
    ordinary = attention_mask.cpu().bool() & ~torch.isin(ids, special)
    chosen = _choose(ordinary, probability, generator)
    labels = torch.where(chosen, ids, IGNORED)

    fate = torch.rand(ids.shape, generator=generator, device="cpu", dtype=torch.float32)
    drawn = torch.randint(len(words), ids.shape, generator=generator, device="cpu")
    replaced = torch.where(chosen & (fate < _REPLACED + _RANDOM), words[drawn], ids)
    masked = replaced.masked_fill(chosen & (fate < _REPLACED), mask_token_id)
    return masked.to(input_ids.device), labels.to(input_ids.device)


def mask_words(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Collection[int],
) -> tuple[Tensor, Tensor]:
    """`mlm_input_ids` and `mlm_labels` of `mask_tokens`, always the same for equal captions.

    The first token of every caption ([CLS]) counts as special, whatever its id.
    """
    return mask_tokens(
        input_ids,
        attention_mask,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        special_ids={*special_ids, *input_ids[:, 0].tolist()},
        generator=generator_of(input_ids),
    )


def word_targets(text_config: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Masked captions and the words to predict, both `[B, L]` int64.

    Taken from the batch (`mlm_input_ids`, `mlm_labels`, which `collate` makes) if it has them, else
    made with the `mask_token_id` of the text configuration.

    Args:
        text_config: of the model; knows the size of the vocabulary.
        batch: has `input_ids` and `attention_mask`.

    Raises:
        BatchError: if there is neither, or only one of the two tensors.
    """
    ids = batch["input_ids"]
    masked, labels = batch.get("mlm_input_ids"), batch.get("mlm_labels")
    if masked is not None and labels is not None:
        if not masked.shape == labels.shape == ids.shape:
            raise BatchError(
                f"mlm_input_ids {list(masked.shape)} and mlm_labels {list(labels.shape)} do not "
                f"fit input_ids {list(ids.shape)}"
            )
        return masked, labels
    mask_token_id = getattr(text_config, "mask_token_id", None)
    if mask_token_id is None or masked is not None or labels is not None:
        raise BatchError(
            "the masked-word loss needs mlm_input_ids and mlm_labels in the batch (it has: "
            f"{', '.join(batch)}); make batches with the adapter's collate and a tokenizer that "
            "has a mask token, or set model.config.text_config.mask_token_id"
        )
    special = [getattr(text_config, f"{name}_token_id", None) for name in _SPECIAL]
    return mask_words(
        ids,
        batch["attention_mask"],
        mask_token_id=mask_token_id,
        vocab_size=text_config.vocab_size,
        special_ids=[value for value in special if isinstance(value, int)],
    )


def _choose(ordinary: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """A bool tensor `[B, L]` with the right number of random `ordinary` positions per row."""
    available = ordinary.sum(dim=1, keepdim=True)
    count = (available * probability).round().clamp(min=1)
    order = torch.rand(ordinary.shape, generator=generator, device="cpu", dtype=torch.float32)
    order = order.masked_fill(~ordinary, 2.0)
    rank = order.argsort(dim=1).argsort(dim=1)
    return ordinary & (rank < count)
