"""Captions cut into words before they are compared."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from vlp_plugins.runtime.errors import UnsupportedError, first_line

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

    Args:
        texts: captions.
        java: the runtime.

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
