"""A pre-training model that also knows the words of questions.

The demo's vocabulary is the words of its captions; that of real models knows "what" and "how many"
already. So rows are added to the word embeddings, drawn as the others are spread; they learn what
they mean in fine-tuning. Nothing that is pruned changes, and masks made before or after fit both.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer

from benchmarks.demo.families import load
from benchmarks.demo.processors import (
    Family,
    build_image_processor,
    build_tokenizer,
    tokenizer_of,
)
from benchmarks.papers.downstream.questions import NEW_WORDS

SEED = 0


def question_tokenizer(family: Family) -> BertTokenizer:
    """The family's tokenizer with the words of questions behind its own."""
    known = build_tokenizer(family)
    vocabulary = dict(known.get_vocab())
    for word in NEW_WORDS:
        vocabulary[word] = len(vocabulary)
    return tokenizer_of(family, vocabulary)


def with_more_words(model: Any, count: int) -> Any:
    """A copy of a demo model whose vocabulary has `count` more words; `model` is not changed."""
    config = deepcopy(model.config)
    config.text_config.vocab_size += count
    with torch.random.fork_rng(devices=[]):
        larger = type(model)(config)
    state = model.state_dict()
    wider = {
        name: state[name] if place.shape == state[name].shape else _widened(state[name], count)
        for name, place in larger.state_dict().items()
    }
    larger.load_state_dict(wider)
    return larger.train(model.training)


def _widened(rows: Tensor, count: int) -> Tensor:
    """More rows with the mean and spread of those that are there; a bias gets its mean."""
    if rows.ndim == 1:
        return torch.cat([rows, rows.mean().expand(count)])
    generator = torch.Generator().manual_seed(SEED)  # momentum copies get the same noise
    noise = torch.randn(count, rows.shape[1], generator=generator)
    return torch.cat([rows, rows.mean(dim=0) + rows.std(dim=0) * noise])


def extend(source: Path, folder: Path) -> None:
    """Writes a demo model with the larger vocabulary, its tokenizer and its image processor.

    Args:
        source: folder of the demo model.
        folder: to be made; `load_model` and `load_processor` read it.
    """
    family, model = load(source)
    tokenizer = question_tokenizer(family)
    size = model.config.text_config.vocab_size
    with_more_words(model, len(tokenizer) - size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor(family).save_pretrained(folder)
    note = {"extended_from": source.name, "words": list(NEW_WORDS)}
    (folder / "extended.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
