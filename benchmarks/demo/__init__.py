"""The demo: captioned scenes of handwritten digits, and two small models trained on them."""
