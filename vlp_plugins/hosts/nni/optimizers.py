"""Whether the optimizer of an evaluator trains the weights that are pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nni.compression.utils import Evaluator

from vlp_plugins.models.weights import Weight
from vlp_plugins.runtime.errors import UnsupportedError


def check_trained(evaluator: Evaluator, weights: Sequence[Weight]) -> None:
    """Makes sure that no pruned weight has dropped out of the evaluator's optimizers.

    NNI remembers the Parameters of an optimizer by their names in the model that the evaluator was
    first given to. Those of another model, or of a model that was wrapped meanwhile, are forgotten
    without a word, and such weights are never trained.

    Args:
        evaluator: after the model was bound to it.
        weights: that are pruned; those without `requires_grad` are left alone.

    Raises:
        UnsupportedError: naming the first weight that no optimizer holds.
    """
    helpers = getattr(evaluator, "_optimizer_helpers", None)
    if helpers is None:
        helpers = [helper for helper in (getattr(evaluator, "_optimizer_helper", None),) if helper]
    if not helpers:
        return  # DeepSpeed makes its own from all parameters
    held = {name for helper in helpers for name in _names(helper)}
    wanting = [weight for weight in weights if weight.parameter.requires_grad]
    missing = [weight for weight in wanting if not held.intersection(weight.aliases)]
    if not missing:
        return
    first = missing[0]
    raise UnsupportedError(
        f"{len(missing)} of {len(wanting)} pruned weights are in no optimizer of the evaluator, "
        f"first {first.name!r} ({first.aliases[0]}), so that nothing would train them; make the "
        "optimizer of the parameters of the very model that is pruned, before any other compressor "
        "wraps it, and give the evaluator to the inner pruner: "
        "AGPPruner(MultiflowPruner(model, config_list, evaluator=evaluator), ...); for weights "
        "that shall stay as they are call requires_grad_(False)"
    )


def _names(helper: Any) -> list[str]:
    """The names that NNI has noted for an optimizer, of all its groups."""
    groups = helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0]
    return [name for group in groups for name in group["params"]]
