"""Pruning methods made for vision-language models, as plug-ins for the frameworks people use.

    import vlp_plugins as vlp

    model = vlp.load("model-folder")
    data = vlp.batches("photos", model, batch_size=32)
    masks = vlp.prune(model, data, method="multiflow", sparsity=0.75)
    masks.apply(model)
    print(vlp.evaluate(model, "photos-test", task="retrieval"))
    masks.save("masks.safetensors")
    model.save_pretrained("pruned")

- `load`, `batches`: a model, and calibration batches of captioned images for it.
- `prune`: which elements of its weights to remove, as `Masks`.
- `evaluate`: what the model can do: retrieval, captioning, question answering, classification.
- `gather`: one pass over the data, kept as `Statistics`, for many masks; `split_half` shows whether
  the data was enough; `interleave` mixes batches of several kinds.
- `measure_id`: the intrinsic dimension of every layer, as an `IdProfile`.
- `SparsityLock`: training that keeps the zeros. `GradualPruning`: pruning while a model is trained.
- `ModuleAdapter`: describes a model of any other kind. `Pattern`: 2 of 4 elements, and the like.
- `VlpError`: every error that you can do something about. `hookimpl`: marks what a plug-in offers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlp_plugins.hookspecs import hookimpl
from vlp_plugins.runtime.moved import forward_moved_modules
from vlp_plugins.runtime.version import __version__

if TYPE_CHECKING:
    from vlp_plugins.calibration.batches import interleave
    from vlp_plugins.calibration.statistics import Statistics
    from vlp_plugins.dimension.profile import IdProfile
    from vlp_plugins.jobs.tasks import evaluate
    from vlp_plugins.loading import batches, load
    from vlp_plugins.masks.lock import SparsityLock
    from vlp_plugins.masks.masks import Masks
    from vlp_plugins.methods.gradual.pruning import GradualPruning
    from vlp_plugins.models.generic import ModuleAdapter
    from vlp_plugins.pruning import gather, measure_id, prune, split_half
    from vlp_plugins.runtime.errors import VlpError
    from vlp_plugins.scoring.allocation import Pattern

__all__ = [
    "GradualPruning",
    "IdProfile",
    "Masks",
    "ModuleAdapter",
    "Pattern",
    "SparsityLock",
    "Statistics",
    "VlpError",
    "__version__",
    "batches",
    "evaluate",
    "gather",
    "hookimpl",
    "interleave",
    "load",
    "measure_id",
    "prune",
    "split_half",
]

_HOMES = {
    "GradualPruning": "vlp_plugins.methods.gradual.pruning",
    "IdProfile": "vlp_plugins.dimension.profile",
    "Masks": "vlp_plugins.masks.masks",
    "ModuleAdapter": "vlp_plugins.models.generic",
    "Pattern": "vlp_plugins.scoring.allocation",
    "SparsityLock": "vlp_plugins.masks.lock",
    "Statistics": "vlp_plugins.calibration.statistics",
    "VlpError": "vlp_plugins.runtime.errors",
    "batches": "vlp_plugins.loading",
    "evaluate": "vlp_plugins.jobs.tasks",
    "gather": "vlp_plugins.pruning",
    "interleave": "vlp_plugins.calibration.batches",
    "load": "vlp_plugins.loading",
    "measure_id": "vlp_plugins.pruning",
    "prune": "vlp_plugins.pruning",
    "split_half": "vlp_plugins.pruning",
}

forward_moved_modules()


def __getattr__(name: str) -> Any:
    """Loads the public names on first use, so that importing the package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlp_plugins' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for `help` and for completion."""
    return __all__
