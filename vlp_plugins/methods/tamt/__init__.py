"""Masks trained with the model's loss (TAMT)."""
