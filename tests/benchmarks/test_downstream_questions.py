"""Questions about downstream scenes: one right answer, which ten people give in their own words."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.demo.captions import COLOURS, DIGITS
from benchmarks.demo.families import build
from benchmarks.demo.language import Fact
from benchmarks.demo.processors import (
    FAMILIES,
    MAX_TOKENS,
    Family,
    build_tokenizer,
    save_processors,
)
from benchmarks.papers.downstream.questions import ANSWERS, KINDS, NEW_WORDS, PEOPLE, ask
from benchmarks.papers.downstream.samples import draw_sample
from benchmarks.papers.downstream.vocabulary import extend, question_tokenizer, with_more_words
from benchmarks.papers.downstream.wording import CELLS, LANGUAGE
from vlp_plugins.data.processors import load_processor
from vlp_plugins.loading import load_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.tasks.vqa import vqa_accuracy

SCENE = frozenset({Fact(0, 7, 0), Fact(0, 3, 4), Fact(4, 3, 8)})  # red 7, red 3, pink 3


def _number(names: tuple[tuple[str, ...], ...], word: str) -> int:
    return next(number for number, synonyms in enumerate(names) if word in synonyms)


def _solve(text: str, facts: frozenset[Fact]) -> tuple[str, ...]:
    """The right answer by another way: read the question, look at the facts."""
    words = text.removesuffix(" ?")
    colours = [i for i, names in enumerate(COLOURS) if any(f" {n} " in f" {words} " for n in names)]
    digits = [i for i, name in enumerate(DIGITS) if f" {name} " in f" {words} "]
    place = re.search(r"at the (.+)", words)
    there = [
        fact for fact in facts
        if (not colours or fact.colour in colours) and (not digits or fact.digit in digits)
        and (place is None or fact.cell == _number(CELLS, place[1]))
    ]  # fmt: skip
    if words.startswith("how many"):
        return (DIGITS[len(there)],)
    if words.startswith("is there"):
        return ("yes" if there else "no",)
    assert len(there) == 1, f"{text} has no single answer in {sorted(facts)}"
    if "colour" in words:
        return COLOURS[there[0].colour]
    return CELLS[there[0].cell] if words.startswith("where") else (DIGITS[there[0].digit],)


def test_every_answer_is_right_whatever_is_asked() -> None:
    sample = draw_sample("dev", 400)
    for facts, questions in zip(sample.facts, sample.questions, strict=True):
        for question in questions:
            right = _solve(question.text, facts)
            assert set(question.answers) <= set(right)
            assert set(right) <= set(ANSWERS)
            assert len(question.answers) == PEOPLE


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_can_be_asked_for(kind: str) -> None:
    rng = np.random.default_rng(0)
    asked = [ask(SCENE, rng, (kind,)) for _ in range(200)]
    assert {question.kind for question in asked} == {kind}
    assert len({question.text for question in asked}) > 2
    for question in asked:
        assert set(question.answers) <= set(_solve(question.text, SCENE))


def test_a_question_that_has_no_answer_is_not_asked() -> None:
    twins = frozenset({Fact(0, 7, 0), Fact(0, 7, 4)})  # where is the seven? where is the red one?
    with pytest.raises(ValueError, match="no question of the kinds place fits a scene of 2"):
        ask(twins, np.random.default_rng(0), ("place",))


def test_kinds_and_yes_and_no_are_balanced() -> None:
    rng = np.random.default_rng(0)
    asked = [ask(SCENE, rng) for _ in range(3000)]
    shares = Counter(question.kind for question in asked)
    assert min(shares.values()) > 0.8 * max(shares.values())
    said = Counter(q.answers[0] for q in asked if q.kind == "presence")
    assert said["yes"] / sum(said.values()) == pytest.approx(0.5, abs=0.06)


def test_people_choose_their_words_and_accuracy_allows_for_it() -> None:
    rng = np.random.default_rng(0)
    asked = [ask(SCENE, rng, ("place",)) for _ in range(200)]
    assert sum(len(set(question.answers)) == 2 for question in asked) > 150
    answers = [question.answers for question in asked]
    usual = [Counter(said).most_common(1)[0][0] for said in answers]
    assert vqa_accuracy(usual, answers).accuracy == 100
    rare = [next((a for a in CELLS[_number(CELLS, u)] if a != u), u) for u in usual]
    assert 60 < vqa_accuracy(rare, answers).accuracy < 100
    assert vqa_accuracy(["yes"] * 200, answers).accuracy == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_larger_vocabulary_knows_every_word(family: Family) -> None:
    small, large = build_tokenizer(family), question_tokenizer(family)
    assert set(NEW_WORDS).isdisjoint(LANGUAGE.words())
    assert len(large) == len(small) + len(NEW_WORDS)
    before = small.get_vocab()
    assert {word: large.get_vocab()[word] for word in before} == before
    sample = draw_sample("test", 200)
    texts = [q.text for questions in sample.questions for q in questions] + list(ANSWERS)
    texts += sample.captions[0]
    for text in texts:
        ids = large(text, truncation=False)["input_ids"]
        assert large.unk_token_id not in ids
        assert len(ids) <= MAX_TOKENS
        assert large.decode(ids, skip_special_tokens=True) == re.sub(" ([?,])", r"\1", text)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extended_model_is_the_same_but_for_new_words(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(family, build_tokenizer(family)).eval()
    model.save_pretrained(tmp_path / "small")
    save_processors(family, tmp_path / "small")
    extend(tmp_path / "small", tmp_path / "large")
    larger, adapter = load_model(str(tmp_path / "large"), device="cpu")
    size = model.config.text_config.vocab_size
    assert larger.config.text_config.vocab_size == size + len(NEW_WORDS)
    for name, tensor in larger.state_dict().items():
        known = model.state_dict()[name]
        assert torch.equal(tensor[: len(known)] if tensor.ndim else tensor, known), name
    assert set(WeightMap.of(larger, adapter)) == set(WeightMap.of(model, adapter))
    tokenizer = load_processor(str(tmp_path / "large"))
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    assert (
        tokenizer("what colour is the three ?")["input_ids"]
        == (question_tokenizer(family)("what colour is the three ?")["input_ids"])
    )


def test_new_rows_are_spread_like_the_old_ones_and_equal_in_tied_and_momentum_copies() -> None:
    torch.manual_seed(0)
    model = build("blip", build_tokenizer("blip"))
    larger = with_more_words(model, 200)
    rows = larger.text_encoder.embeddings.word_embeddings.weight.detach()
    new, old = rows[-200:], rows[:-200]
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)
    assert torch.equal(rows, larger.text_encoder_m.embeddings.word_embeddings.weight)
    assert larger.text_decoder.bert.embeddings.word_embeddings.weight.data_ptr() == rows.data_ptr()
