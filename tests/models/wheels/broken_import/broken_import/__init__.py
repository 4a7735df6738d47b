"""A plug-in that needs a module which is not installed."""
