"""Torch-Pruning: every registered method as an importance, and whole models cut in one call.

    result = prune_structured(model, batches, ratio=0.5)
    result.save("smaller")

Or Torch-Pruning's own loop:

    prepare(model, adapter)
    importance = Importance("multiflow", model, batches)
    with shared_modules(model):
        options = pruner_options(adapter, model)
        pruner = tp.pruner.BasePruner(model, importance=importance, **options)
        recorder = Recorder(pruner.DG, model, adapter)
        pruner.step()
        patch(model, adapter, recorder.heads())

`scores` says which rows and columns matter, `plan` and `options` how much goes, `pruner` and
`structured` cut it, and `recorder` records what was cut.
"""

try:
    import torch_pruning  # noqa: F401
except ImportError as error:
    raise ImportError(
        "structured pruning needs Torch-Pruning, which is not installed; "
        'pip install "vlp-plugins[torch-pruning]"'
    ) from error

from vlp_plugins.hosts.torch_pruning.importance import Importance
from vlp_plugins.hosts.torch_pruning.options import pruner_options, shared_modules
from vlp_plugins.hosts.torch_pruning.plan import Plan, Scope, plan_of
from vlp_plugins.hosts.torch_pruning.pruner import BlockPruner
from vlp_plugins.hosts.torch_pruning.recorder import Recorder
from vlp_plugins.hosts.torch_pruning.structured import StructuredResult, prune_structured

__all__ = [
    "BlockPruner",
    "Importance",
    "Plan",
    "Recorder",
    "Scope",
    "StructuredResult",
    "plan_of",
    "prune_structured",
    "pruner_options",
    "shared_modules",
]
