"""A plug-in that takes the names of a built-in scorer and of another plug-in's adapter."""
