"""A plug-in with one right hook and one that is misspelt."""
