"""Rows of gradients, one per batch: in memory, on disk, or taken again in several passes."""
