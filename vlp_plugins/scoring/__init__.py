"""Scores of weights, and how many each tensor keeps by them. Rank 4."""
