"""Visual question answering: answers of a model, and how many people agree with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlp_plugins.calibration.batches import check_batches, to_device
from vlp_plugins.evaluation.answer_words import normal_answer
from vlp_plugins.evaluation.captioning import texts_of_tokens, tokenizer_of
from vlp_plugins.models.adapter import Adapter, AnsweringAdapter, Batch
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.model_state import evaluating, takes_model

_AGREEING = 3  # people who must have given an answer for it to be fully right


@dataclass(frozen=True)
class VqaAccuracy:
    """Accuracy of answers in per cent.

    Attributes:
        accuracy: mean over the questions.
        by_question: of every question, 0 to 100.
    """

    accuracy: float
    by_question: tuple[float, ...]

    def as_dict(self) -> dict[str, float]:
        """`accuracy`, and the number of `questions`."""
        return {"accuracy": self.accuracy, "questions": len(self.by_question)}


@takes_model
def answer_questions(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    tokenizer: Any,
    *,
    answers: Sequence[str] | None = None,
    candidates: int = 128,
    max_length: int = 10,
    num_beams: int = 3,
) -> list[str]:
    """Answers to the questions of all batches, in their order.

    Args:
        model: is left in the mode it was in.
        adapter: knows how the model answers.
        batches: images, and questions as `input_ids` with their mask.
        tokenizer: the model's, or a processor that has one.
        answers: the model chooses among these, as published models are measured; None lets it
            write.
        candidates: answers of the list that are looked at as a whole, chosen by their first word.
        max_length: most tokens of a written answer, the start token included.
        num_beams: width of the beam search of written answers.

    Raises:
        UnsupportedError: if models of this family answer no questions.
        DataError: if the processor has no tokenizer, or the list of answers is empty.
    """
    if not isinstance(adapter, AnsweringAdapter):
        raise UnsupportedError(
            f"adapter {adapter.name!r} says of no model how it answers questions; take BLIP's or "
            "X-VLM's question answering model"
        )
    tokenizer = tokenizer_of(tokenizer, "answers need")
    if answers is not None and (not answers or candidates < 1):
        raise DataError(
            f"there are {len(answers)} answers to choose among and {candidates} candidates; give "
            "at least one of both, or no list"
        )
    found: list[str] = []
    check_batches(batches)
    with evaluating(model) as device:
        listed = None if answers is None else _tokens(tokenizer, answers)
        for batch in batches:
            there = to_device(batch, device)
            if listed is None or answers is None:
                ids = adapter.answer(model, there, max_length=max_length, num_beams=num_beams)
                found += texts_of_tokens(tokenizer, ids)
                continue
            answer_ids, mask = (tensor.to(device) for tensor in listed)
            best = adapter.rank_answers(model, there, answer_ids, mask, candidates=candidates)
            found += [answers[number] for number in best.tolist()]
    return found


def vqa_accuracy(found: Sequence[str], answers: Sequence[Sequence[str]]) -> VqaAccuracy:
    """How many people agree: mean over all but one of them of min(agreeing / 3, 1).

    Antol et al. 2015 (arXiv:1505.00468), as in the official evaluation: if all people say the
    same, answers are compared as they stand, else as `normal_answer` makes them. With a single
    answer per question it is the share of answers equal to it after `normal_answer`.

    Args:
        found: one answer per question.
        answers: what people said: ten answers per question, or one.

    Raises:
        DataError: if there are no questions, or some lack answers.
    """
    if len(found) != len(answers) or not found:
        raise DataError(
            f"{len(found):,} answers were found to {len(answers):,} questions; one each is needed"
        )
    lacking = next((number for number, said in enumerate(answers) if not said), None)
    if lacking is not None:
        raise DataError(f"question {lacking} has no answers to compare with")
    shares = [100 * _agreement(one, said) for one, said in zip(found, answers, strict=True)]
    return VqaAccuracy(sum(shares) / len(shares), tuple(shares))


def _agreement(found: str, said: Sequence[str]) -> float:
    one, others = found.strip(), [answer.strip() for answer in said]
    if len(others) == 1 or len(set(others)) > 1:
        one, others = normal_answer(one), [normal_answer(answer) for answer in others]
    if len(others) == 1:
        return float(one == others[0])
    agreeing = sum(answer == one for answer in others)
    # Leaving out somebody who agrees leaves one fewer to agree with.
    without_agreeing = min((agreeing - 1) / _AGREEING, 1) if agreeing else 0.0
    without_other = min(agreeing / _AGREEING, 1)
    rest = len(others) - agreeing
    return (agreeing * without_agreeing + rest * without_other) / len(others)


def _tokens(tokenizer: Any, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask `[M, A]` of the answers, right-padded."""
    made = tokenizer(list(answers), padding=True, truncation=True, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]
