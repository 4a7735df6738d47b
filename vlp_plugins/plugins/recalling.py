"""The adapter that masks were made with, found again for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlp_plugins.adapter import Adapter
from vlp_plugins.module_adapter.adapter import ModuleAdapter
from vlp_plugins.plugins.discovery import registry
from vlp_plugins.runtime.errors import MaskError, UnsupportedError
from vlp_plugins.runtime.model_state import takes_model

_MODULE = "module"


@takes_model
def recall_adapter(model: nn.Module, name: str, settings: Mapping[str, Any]) -> Adapter:
    """The adapter of that name; if it does not claim the model, the one that does.

    Args:
        model: what masks shall be applied to.
        name: of the adapter in their manifest; `module` for a `ModuleAdapter`.
        settings: `Adapter.settings` of that adapter.

    Raises:
        UnclaimedModelError: if no adapter claims the model.
        MaskError: if a `ModuleAdapter` with these settings does not fit the model.
    """
    if name == _MODULE:
        try:
            return ModuleAdapter(model, **settings)
        except (UnsupportedError, TypeError) as error:
            raise MaskError(
                f"these masks do not fit {type(model).__name__}: their adapter was "
                f"ModuleAdapter(model, {_keywords(settings)}), and {error}; use masks made for a "
                "model of this structure"
            ) from error
    known = registry()
    if name in known.adapter_names() and (named := known.adapter(name)).claims(model):
        return named
    return known.adapter_for(model)


def _keywords(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items() if value)
