"""Visual question answering: answers of a model, and how many people agree with them.

Lower case, number words to digits, no articles, apostrophes where they belong, no punctuation.
https://visualqa.org/evaluation.html; what looks odd below is odd there, too, and kept, since
published accuracies are made with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlp_plugins.calibration.batches import check_batches, to_device
from vlp_plugins.models.adapter import Adapter, AnsweringAdapter, Batch
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.model_state import evaluating, takes_model
from vlp_plugins.tasks.captioning import generate, generates, texts_of_tokens, tokenizer_of

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<",
                "@", "`", ",", "?", "!")  # fmt: skip
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_MOST_PERIODS = 32  # the official code hands a flag over where the number of replacements belongs

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 - ninety quoted words would be unreadable


# A contraction by what it is without one of its apostrophes.
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normal_answer(answer: str) -> str:
    """The answer as it is compared."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    """Signs next to a space vanish, others become one; all vanish from a text with `1,000`."""
    vanish = _THOUSANDS.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        next_to_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if next_to_space or vanish else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


_AGREEING = 3  # people who must have given an answer for it to be fully right


@dataclass(frozen=True)
class VqaAccuracy:
    """Accuracy of answers in percent: the mean over the questions, and of every question."""

    accuracy: float
    by_question: tuple[float, ...]


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

    Batches have images, and questions as `input_ids` with their mask; of chat models prompts. The
    tokenizer may be a processor that has one. The model chooses among a list of `answers`, as
    published models are measured: of so many `candidates`, chosen by their first word, it looks at
    the whole. Or (None) it writes at most `max_length` tokens, the start token included, by beam
    search.

    Raises:
        UnsupportedError: if models of this family answer no questions.
        DataError: if the processor has no tokenizer, or the list of answers is empty.
    """
    if not isinstance(adapter, AnsweringAdapter) and not generates(model):
        raise UnsupportedError(
            f"adapter {adapter.name!r} does not say how its models answer questions; take "
            "BLIP's or X-VLM's question answering model"
        )
    if not isinstance(adapter, AnsweringAdapter) and answers is not None:
        raise UnsupportedError(
            f"{type(model).__name__} writes its answers and does not choose among those of a list "
            "(--answers); leave the list out"
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
            if isinstance(adapter, AnsweringAdapter) and listed is not None and answers is not None:
                ids, mask = (tensor.to(device) for tensor in listed)
                best = adapter.rank_answers(model, there, ids, mask, candidates=candidates)
                found += [answers[number] for number in best.tolist()]
                continue
            write = adapter.answer if isinstance(adapter, AnsweringAdapter) else generate
            tokens = write(model, there, max_length=max_length, num_beams=num_beams)
            found += texts_of_tokens(tokenizer, tokens)
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
    # Leaving out one who agrees leaves one fewer to agree with.
    without_agreeing = min((agreeing - 1) / _AGREEING, 1) if agreeing else 0.0
    without_other = min(agreeing / _AGREEING, 1)
    rest = len(others) - agreeing
    return (agreeing * without_agreeing + rest * without_other) / len(others)


def _tokens(tokenizer: Any, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask `[M, A]` of the answers, right-padded."""
    made = tokenizer(list(answers), padding=True, truncation=True, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]
