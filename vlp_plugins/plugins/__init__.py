"""Plug-ins: how they are found, checked, named, listed, and what they offer together."""

from vlp_plugins.plugins.discovery import GROUP, discover, registry
from vlp_plugins.plugins.registry import Registry
from vlp_plugins.plugins.reports import PluginReport, plugins_table

__all__ = ["GROUP", "PluginReport", "Registry", "discover", "plugins_table", "registry"]
