"""How much can be pruned where."""
