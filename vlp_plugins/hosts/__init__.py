"""Pruning frameworks that the methods appear in; the only files that import a host."""
