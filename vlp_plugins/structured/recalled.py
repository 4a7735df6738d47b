"""Adapters by name, for models that come from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.structured.files import WEIGHTS

MODULE = "module"


@takes_model
def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that claims a model.

    Raises:
        UnclaimedModelError: if none does.
    """
    return registry().adapter_for(model)


def candidates(name: str) -> list[Adapter]:
    """The adapter of that name; for that of any module, all, as any may know the model's class.

    Raises:
        UnknownNameError: if there is no adapter of that name.
    """
    known = registry()
    names = known.adapter_names() if name == MODULE else [name]
    return [known.adapter(each) for each in names]


@takes_model
def recalled(model: nn.Module, name: str, settings: Mapping[str, Any]) -> Adapter:
    """The adapter of that name for a model.

    Args:
        model: what it describes.
        name: of a family's adapter, or `module` for a `ModuleAdapter`.
        settings: `Adapter.settings` of a `ModuleAdapter`.

    Raises:
        UnknownNameError: if there is no adapter of that name.
        UnsupportedError: if a `ModuleAdapter` with these settings does not fit the model.
    """
    if name != MODULE:
        return candidates(name)[0]
    try:
        return ModuleAdapter(model, **settings)
    except TypeError as error:
        raise UnsupportedError(
            f"no ModuleAdapter has these settings ({error}); {WEIGHTS.remedy}"
        ) from error
