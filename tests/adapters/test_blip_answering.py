"""BLIP answers questions: written or chosen, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from blip_transformers_examples import ADAPTER, DEC, SEP, downstream, pairs
from transformers import (
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.tasks.retrieval import retrieval
from vlp_plugins.tasks.vqa import answer_questions

WORDS = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", *(f"w{i}" for i in range(5, 50))]
TOKENIZER = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
ANSWERS = ["w9 w10", "w7", "w20 w21 w22", "w31", "w7 w8", "w40"]


def lively() -> BlipForQuestionAnswering:
    """Larger weights, so that answers differ by question."""
    model = downstream(BlipForQuestionAnswering)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter, requires_grad=False))
    return model


def best_by_definition(model: BlipForQuestionAnswering) -> list[str]:
    """Every question alone with every answer alone, without any padding."""
    batch, best = pairs(), []
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row : row + 1, :length]
        image = model.vision_model(batch["pixel_values"][row : row + 1]).last_hidden_state
        states = model.text_encoder(input_ids=ids, encoder_hidden_states=image).last_hidden_state
        scores = []
        for answer in ANSWERS:
            tokens = TOKENIZER(answer, return_tensors="pt")["input_ids"]
            tokens[:, 0] = DEC
            logits = model.text_decoder(input_ids=tokens, encoder_hidden_states=states).logits
            log = logits.log_softmax(-1)[0, :-1]
            scores.append(float(log.gather(1, tokens[0, 1:, None]).sum()))
        best.append(ANSWERS[max(range(len(ANSWERS)), key=scores.__getitem__)])
    return best


@torch.no_grad()
def test_the_most_likely_of_a_list() -> None:
    model = lively()
    found = answer_questions(model, ADAPTER, [pairs()], TOKENIZER, answers=ANSWERS)
    assert found == best_by_definition(model)


def test_few_candidates_are_those_with_the_likeliest_first_word() -> None:
    model = lively()
    only = answer_questions(model, ADAPTER, [pairs()], TOKENIZER, answers=ANSWERS, candidates=1)
    written = answer_questions(model, ADAPTER, [pairs()], TOKENIZER, max_length=2, num_beams=1)
    # Among all single words as answers, the first candidate is what a greedy decoder writes.
    words = [f"w{i}" for i in range(5, 50)]
    chosen = answer_questions(model, ADAPTER, [pairs()], TOKENIZER, answers=words, candidates=1)
    assert [text.split()[-1] for text in written] == chosen  # [DEC] is an ordinary word here
    assert set(only) <= set(ANSWERS)


@pytest.mark.parametrize("beams", [1, 3])
def test_written_answers_do_not_depend_on_the_batch(beams: int) -> None:
    model, batch = lively(), pairs()
    together = ADAPTER.answer(model, batch, max_length=6, num_beams=beams)
    assert together[:, 0].tolist() == [DEC] * 3
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        alone = {
            "pixel_values": batch["pixel_values"][row : row + 1],
            "input_ids": batch["input_ids"][row : row + 1, :length],
            "attention_mask": batch["attention_mask"][row : row + 1, :length],
        }
        expected = ADAPTER.answer(model, alone, max_length=6, num_beams=beams)[0]
        assert together[row, : len(expected)].tolist() == expected.tolist()
        assert not together[row, len(expected) :].any()


def test_texts_end_where_positions_do() -> None:
    captions = ADAPTER.caption(downstream(BlipForConditionalGeneration), pairs(), max_length=99)
    answers = ADAPTER.answer(lively(), pairs(), max_length=99)
    assert captions.shape[1] == 16
    assert answers.shape[1] <= 16


def test_beams_write_captions_too() -> None:
    model = downstream(BlipForConditionalGeneration)
    ids = ADAPTER.caption(model, pairs(), max_length=7, num_beams=3)
    expected = model.generate(
        pixel_values=pairs()["pixel_values"], max_length=7, num_beams=3, do_sample=False
    )
    assert torch.equal(ids, expected)


def test_re_ranking_by_image_tokens_equals_re_ranking_by_pixels() -> None:
    class Pixels(type(ADAPTER)):  # type: ignore[misc]
        image_embeds = None

    model = downstream(BlipForImageTextRetrieval)
    batches = [pairs(), {key: value.flip(0) for key, value in pairs().items()}]
    ids = [0, 1, 2, 2, 1, 0]
    fast, slow = (
        retrieval(model, adapter, batches, rerank=2, image_ids=ids).final
        for adapter in (ADAPTER, Pixels())
    )
    assert fast == slow


def test_what_cannot_answer_says_so() -> None:
    model = downstream(BlipForConditionalGeneration)
    with pytest.raises(UnsupportedError, match="answers no questions; load BlipForQuestion"):
        answer_questions(model, ADAPTER, [pairs()], TOKENIZER)
    with pytest.raises(DataError, match="0 answers to choose among"):
        answer_questions(model, ADAPTER, [pairs()], TOKENIZER, answers=[])
    with pytest.raises(DataError, match="answers need the model's tokenizer"):
        answer_questions(model, ADAPTER, [pairs()], object())
    assert SEP == 2
