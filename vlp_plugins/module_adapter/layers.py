"""Which layers of an unknown model can be pruned, and why every other parameter is not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlp_plugins.adapter import Exclusion
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.sharding import is_sharded

_TIED = "tied to an embedding or to an excluded layer"
_EMBEDDING, _BIAS, _VECTOR = "embedding", "bias", "normalisation, scale or other vector"
_ASKED = "excluded on request"
_BY_DESIGN = (_TIED, _EMBEDDING, _BIAS, _VECTOR, _ASKED)
"""What reasons begin with that are no lack of ours."""


def prunable_layers(model: nn.Module, exclude: Sequence[re.Pattern[str]] = ()) -> list[str]:
    """Paths of the `Linear` and ungrouped `Conv2d` layers whose weight can be pruned.

    Args:
        model: any module.
        exclude: patterns searched in module paths.

    Returns:
        In the order of the parameters. A module that has two paths is there under its first.

    Raises:
        UnsupportedError: if the model is a bare layer.
    """
    if isinstance(model, (nn.Linear, nn.Conv2d)):
        raise UnsupportedError(
            f"the model is one {type(model).__name__} layer, which has no path to name its weight "
            "by; wrap it: nn.Sequential(model)"
        )
    reasons = dict(_reasons(model, exclude))
    return [path for path, _ in model.named_modules() if reasons.get(f"{path}.weight", "") is None]


def explain_rest(model: nn.Module, exclude: Sequence[re.Pattern[str]] = ()) -> list[Exclusion]:
    """One `Exclusion` per reason, together for every parameter that `prunable_layers` leaves out.

    Layer numbers become "any number" where all layers agree, so that patterns stay short.
    """
    reasons = dict(_reasons(model, exclude))
    by_shape: dict[str, set[str | None]] = {}
    for path, reason in reasons.items():
        by_shape.setdefault(_any_number(path), set()).add(reason)
    patterns: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        if reason is not None:
            agreed = len(by_shape[_any_number(path)]) == 1
            patterns.setdefault(reason, []).append(_any_number(path) if agreed else re.escape(path))
    return [
        Exclusion(f"^(?:{'|'.join(dict.fromkeys(found))})$", reason, reason.startswith(_BY_DESIGN))
        for reason, found in patterns.items()
    ]


def _any_number(path: str) -> str:
    return re.sub(r"\d+", r"\\d+", re.escape(path))


def _reasons(
    model: nn.Module, exclude: Sequence[re.Pattern[str]]
) -> Iterator[tuple[str, str | None]]:
    """(parameter path, why it is not pruned or None) for every name of every parameter."""
    modules = list(model.named_modules(remove_duplicate=False))
    fixed = [
        parameter
        for path, module in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        or any(pattern.search(path) for pattern in exclude)
        for parameter in module.parameters(recurse=False)
    ]
    for path, module in modules:
        asked = next((p.pattern for p in exclude if p.search(path)), None)
        for name, parameter in module.named_parameters(recurse=False):
            reason = f"{_ASKED} ({asked})" if asked else _reason(module, name, parameter)
            if reason is None and any(_same(parameter, other) for other in fixed):
                reason = _TIED
            yield (f"{path}.{name}" if path else name), reason


def _reason(module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    """Why parameter `name` of `module` is not pruned, if that can be told from the module."""
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _EMBEDDING
    if name.endswith("bias"):
        return _BIAS
    if parameter.ndim < 2:
        return _VECTOR
    if name != "weight" or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return f"{kind}.{name} is not the weight of a Linear or Conv2d layer"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads it without calling its layer: its input is not seen"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return "grouped convolution"
    if not parameter.is_floating_point():
        return "quantised weight"
    return None


def _same(first: Tensor, second: Tensor) -> bool:
    """True if the tensors start at the same memory, or are one object."""
    if first is second:
        return True
    if is_sharded((first, second)):
        return False
    known = first.device.type != "meta" and first.device == second.device and first.numel() > 0
    return known and first.data_ptr() == second.data_ptr()
