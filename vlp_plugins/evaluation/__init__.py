"""Task metrics of vision-language models: retrieval and captioning."""

from __future__ import annotations

from vlp_plugins.evaluation.captioning import write_captions
from vlp_plugins.evaluation.retrieval import Recall, recall_at_k, retrieval

__all__ = ["Recall", "recall_at_k", "retrieval", "write_captions"]
