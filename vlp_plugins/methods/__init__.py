"""Published methods by name."""
