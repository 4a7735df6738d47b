"""The intrinsic dimension of what layers give out. Rank 5."""
