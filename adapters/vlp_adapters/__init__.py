"""Model families for vlp-plugins: one file or folder each, registered in `plugin.py`."""
