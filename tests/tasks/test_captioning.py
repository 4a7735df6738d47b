"""Captions that a model writes."""

from __future__ import annotations

import pytest
import torch
from pair_model import PairAdapter, PairModel, batch_of
from transformers import BertTokenizerFast

from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.tasks.captioning import write_captions

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]
TOKENIZER = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})
BATCHES = [batch_of([5, 6], [5, 6]), batch_of([7], [7])]


def test_captions_of_all_batches_in_order_without_special_tokens() -> None:
    model = PairModel().train()
    assert write_captions(model, PairAdapter(), BATCHES, TOKENIZER) == ["one", "two", "three"]
    assert model.training


def test_the_processor_will_do_and_captions_need_not_be_there() -> None:
    class Processor:
        tokenizer = TOKENIZER

    images = [{"pixel_values": torch.full((2, 3), 6.0)}]
    assert write_captions(PairModel(), PairAdapter(), images, Processor()) == ["two", "two"]


def test_the_length_is_passed_on() -> None:
    assert write_captions(PairModel(), PairAdapter(), BATCHES, TOKENIZER, max_length=1) == [""] * 3


def test_what_cannot_be_written_says_so() -> None:
    class NoDecoder(PairAdapter):
        caption = None  # type: ignore[assignment]

    model = PairModel()
    with pytest.raises(UnsupportedError, match="a model with a text decoder such as BLIP"):
        write_captions(model, NoDecoder(), BATCHES, TOKENIZER)
    with pytest.raises(DataError, match="need the model's tokenizer to be read, not object"):
        write_captions(model, PairAdapter(), BATCHES, object())
