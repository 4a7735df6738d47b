"""An adapter for any `nn.Module`."""

from vlp_plugins.module_adapter.adapter import Loss, ModuleAdapter

__all__ = ["Loss", "ModuleAdapter"]
