"""Pages, tables and drawings. Rank 7."""
