"""Masked words of the pre-training loss, chosen by the content of a batch: equal for equal ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from vlp_adapters.negatives import generator_of
from vlp_adapters.xvlm.masking import mask_tokens
from vlp_plugins.adapter import Batch
from vlp_plugins.errors import BatchError

_SPECIAL = ("pad", "unk", "cls", "sep", "bos", "eos")


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
