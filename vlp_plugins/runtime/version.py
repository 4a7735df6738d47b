"""The version of vlp-plugins."""

__version__ = "0.2.0"
