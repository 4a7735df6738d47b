"""Masks: the value, its bits, its provenance, its files, and how it fits a model."""
