"""Answers made comparable, as the evaluation of VQA (Antol et al. 2015, Goyal et al. 2017) does.

Lower case, number words to digits, no articles, apostrophes where they belong, no punctuation.
https://visualqa.org/evaluation.html; what looks odd below is odd there, too, and kept, since
published accuracies are made with it.
"""

from __future__ import annotations

import re

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


def _spellings(word: str) -> dict[str, str]:
    """A contraction by what it is without one of its apostrophes (its only one, if so)."""
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return {word[:place] + word[place + 1 :]: word for place in places}


_APOSTROPHES = {
    wrong: right for word in _CONTRACTIONS for wrong, right in _spellings(word).items()
} | {"somebody'd": "somebodyd"}


def normal_answer(answer: str) -> str:
    """The answer as it is compared."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    """Signs beside a space vanish, others become one; all vanish from a text with `1,000` in it."""
    vanish = _THOUSANDS.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside_space or vanish else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)
