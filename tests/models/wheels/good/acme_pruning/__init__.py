"""A plug-in as it should be: a scorer and an adapter."""
