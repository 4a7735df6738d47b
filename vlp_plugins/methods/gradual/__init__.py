"""Pruning while a model trains: Taylor, PLATON, magnitude."""
