"""The demo: captioned scenes of handwritten digits, and two small vision-language models trained on them."""
