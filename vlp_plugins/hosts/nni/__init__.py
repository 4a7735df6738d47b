"""Every registered method as a pruner of NNI.

    from vlp_plugins.hosts.nni import MultiflowPruner, finalize

    pruner = MultiflowPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.75}],
                             batches=batches)
    pruner.compress()
    model = finalize(pruner)

The names of the pruners come from the registry, outsiders' methods among them; `pruner_class` makes
one by the name of the method. They work inside of NNI's `AGPPruner` and `LinearPruner`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import nni  # noqa: F401
except ImportError as error:
    raise ImportError(
        'NNI is not installed, or cannot be imported; pip install "vlp-plugins[nni]"'
    ) from error

if TYPE_CHECKING:
    from vlp_plugins.hosts.nni.evaluators import LightningEvaluator as LightningEvaluator
    from vlp_plugins.hosts.nni.evaluators import TransformersEvaluator as TransformersEvaluator
    from vlp_plugins.hosts.nni.finalization import finalize as finalize
    from vlp_plugins.hosts.nni.finalization import masks_from_nni as masks_from_nni
    from vlp_plugins.hosts.nni.finalization import masks_of as masks_of
    from vlp_plugins.hosts.nni.pruner import VlpPruner as VlpPruner
    from vlp_plugins.hosts.nni.pruner import class_names as class_names
    from vlp_plugins.hosts.nni.pruner import pruner_class as pruner_class

_HOMES = {
    "LightningEvaluator": "evaluators",
    "TransformersEvaluator": "evaluators",
    "VlpPruner": "pruner",
    "class_names": "pruner",
    "finalize": "finalization",
    "masks_from_nni": "finalization",
    "masks_of": "finalization",
    "pruner_class": "pruner",
}
__all__ = [*_HOMES]  # and the pruners themselves, see `__dir__`


def __getattr__(name: str) -> Any:
    """The public names, and a pruner for every registered method."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name.endswith("Pruner"):
        pruner = import_module(f"{__name__}.pruner")
        names = pruner.class_names()
        if name in names:
            return pruner.pruner_class(names[name])
        from vlp_plugins.runtime.errors import suggest

        raise AttributeError(
            f"module {__name__!r} has no pruner {name!r}{suggest(name, sorted(names))}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names and those of all pruners."""
    return sorted({*__all__, *import_module(f"{__name__}.pruner").class_names()})
