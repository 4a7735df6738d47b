"""The demo: captioned scenes of handwritten digits, and three small models trained on them."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""A folder for each model: `blip`, `xvlm` and `chat`."""
SPARSITIES = (0.63, 0.75, 0.9)
