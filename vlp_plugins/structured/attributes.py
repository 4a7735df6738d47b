"""Number and size of heads, which attention modules keep as attributes under several names.

The names are those of transformers 5. A module that keeps no factor for its scores computes it from
the size of the heads whenever it runs.
"""

from __future__ import annotations

import inspect

from torch import nn

_COUNTS = ("num_attention_heads", "num_heads", "num_key_value_heads")
_SIZES = ("attention_head_size", "head_dim")
_WIDTH = "all_head_size"
_SCALES = ("scaling", "scale")
_ROTARY = ("position_embeddings", "rotary_pos_emb", "freqs_cis")


def heads_of(module: nn.Module, width: int) -> tuple[int, int] | None:
    """Number and size of the heads, as the module's attributes say; None if they do not.

    Args:
        module: that computes the attention.
        width: of its layers, which tells the number where only the size is an attribute.
    """
    count, size = _first(module, _COUNTS), _first(module, _SIZES)
    if size is None or size < 1:
        return None
    if count is None:
        return None if width % size else (width // size, size)
    return count, size


def set_heads(module: nn.Module, count: int, size: int) -> None:
    """Changes these attributes; factors of the scores stay as they were."""
    for names, value in ((_COUNTS, count), (_SIZES, size), ((_WIDTH,), count * size)):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, value)


def scales_at_run_time(module: nn.Module) -> bool:
    """True if the scores are divided by the root of the current size of the heads."""
    return not any(hasattr(module, name) for name in _SCALES)


def is_rotary(module: nn.Module) -> bool:
    """True if the module takes angles that turn its queries and keys."""
    return any(name in inspect.signature(module.forward).parameters for name in _ROTARY)


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
