"""Images with captions, questions or classes: where they come from, how they become batches."""

from __future__ import annotations

from vlp_plugins.data.batches import CaptionedBatches
from vlp_plugins.data.labelled import Labelled, LabelledImages, open_labelled
from vlp_plugins.data.nlvr2 import Statement, open_nlvr2
from vlp_plugins.data.processors import Processor, load_processor, reads_text
from vlp_plugins.data.questions import Question, Questions, open_questions
from vlp_plugins.data.records import CaptionSource
from vlp_plugins.data.sources import open_source

__all__ = [
    "CaptionSource",
    "CaptionedBatches",
    "Labelled",
    "LabelledImages",
    "Processor",
    "Question",
    "Questions",
    "Statement",
    "load_processor",
    "open_labelled",
    "open_nlvr2",
    "open_questions",
    "open_source",
    "reads_text",
]
