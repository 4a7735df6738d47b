"""Figures of the MULTIFLOW paper, for reference: other models, other data, other budgets."""

from __future__ import annotations

from collections.abc import Mapping

Figures = tuple[str, ...]
"""By sparsity: 63, 75 and 90%, or the first of them; one figure of a dense model."""

COLUMNS = ("Text R@1", "Image R@1", "BLEU@4", "CIDEr")

BASELINES: Mapping[str, Mapping[str, tuple[Figures, ...]]] = {
    "xvlm": {
        "dense": (("78.2",), ("60.9",), ("39.0",), ("130.4",)),
        "l2": (
            ("74.5", "67.9", "14.8"),
            ("57.6", "51.1", "10.8"),
            ("37.9", "35.7", "18.6"),
            ("125.7", "117.6", "48.0"),
        ),
        "lamp": (
            ("75.3", "69.4", "21.4"),
            ("58.4", "53.2", "14.6"),
            ("37.8", "36.3", "20.7"),
            ("125.7", "120.1", "56.9"),
        ),
        "tamt": (
            ("76.8", "72.2", "21.6"),
            ("59.9", "55.6", "14.6"),
            ("37.8", "36.7", "20.2"),
            ("126.2", "122.1", "54.1"),
        ),
        "multiflow": (
            ("77.4", "73.9", "46.9"),
            ("60.2", "56.9", "34.8"),
            ("38.5", "37.4", "30.8"),
            ("128.6", "124.6", "94.3"),
        ),
    },
    "blip": {
        # Its R@1, printed as 80.7 and 95.1, is left out: the second is far above all others.
        "dense": ((), (), ("39.1",), ("131.1",)),
        "tamt": (("75.2", "ERR"), ("57.9", "ERR"), ("37.3", "34.1"), ("124.0", "111.5")),
        "multiflow": (("76.3", "65.7"), ("59.0", "49.9"), ("37.7", "35.7"), ("125.4", "116.3")),
    },
}
"""Tables 4 and 5 by model and method: `COLUMNS`, each by sparsity."""

PARTS: Mapping[tuple[str, float], tuple[str, str]] = {
    ("multiflow-edges", 0.63): ("77.0±0.3", "59.5±0.1"),
    ("multiflow-nodes", 0.63): ("56.8±0.5", "41.9±0.1"),
    ("multiflow", 0.63): ("77.4±0.5", "60.2±0.2"),
    ("multiflow-edges", 0.75): ("72.3±0.4", "55.7±0.1"),
    ("multiflow-nodes", 0.75): ("39.6±0.5", "28.5±0.1"),
    ("multiflow", 0.75): ("73.9±0.1", "56.9±0.1"),
    ("multiflow-edges", 0.9): ("14.4±0.5", "10.6±0.2"),
    ("multiflow-nodes", 0.9): ("10.5±0.3", "7.1±0.1"),
    ("multiflow", 0.9): ("46.9±0.1", "34.8±0.1"),
}
"""Table 8 (X-VLM): text and image R@1 by way and sparsity, rounded to tenths."""
