"""Pruning as a least-squares problem under a cardinality constraint: CHITA and what betters it."""
