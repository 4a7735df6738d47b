"""A plug-in with one right hook and one that takes an argument too many."""
