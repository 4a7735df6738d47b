"""Published scores, one per file."""
