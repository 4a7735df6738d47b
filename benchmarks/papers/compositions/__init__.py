"""Compositions nobody has published: what is looked for when the published methods are known."""

from __future__ import annotations

from benchmarks.papers.compositions.named import COMPOSITIONS

__all__ = ["COMPOSITIONS"]
