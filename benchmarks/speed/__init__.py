"""Times of pruning, each beside the work that nobody can avoid."""
