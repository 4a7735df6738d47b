"""Pruning methods: compositions of a score and an allocation, and procedures. Rank 6."""
