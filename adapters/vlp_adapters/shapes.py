"""Sizes of a model, read from the shapes of the tensors of its checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vlp_plugins.runtime.errors import UnsupportedError

_HEAD_WIDTH = 64  # of ViT and BERT in every published BLIP and X-VLM


@dataclass(frozen=True)
class CheckpointShapes:
    """The tensors of a checkpoint by their original names, and what errors call the model."""

    state: Mapping[str, Tensor]
    family: str

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            UnsupportedError: if the checkpoint does not have it.
        """
        if name not in self.state:
            raise UnsupportedError(
                f"the checkpoint has no {name}: it is no {self.family} pre-training checkpoint"
            )
        return tuple(self.state[name].shape)

    def indices(self, pattern: str) -> list[int]:
        """The different numbers that `pattern` captures at the start of names, sorted."""
        found = (re.match(pattern, name) for name in self.state)
        return sorted({int(match[1]) for match in found if match})

    def grid(self, name: str, *, dim: int = 0) -> int:
        """Patches per side, from a table of positions whose first is that of the class token."""
        return math.isqrt(self[name][dim] - 1)


def attention_heads(width: int, tower: str) -> int:
    """The number of attention heads, which shapes do not tell: 64 dimensions each.

    Raises:
        UnsupportedError: if 64 does not divide the width.
    """
    if width % _HEAD_WIDTH:
        raise UnsupportedError(
            f"the {tower} encoder is {width} wide, so its number of attention heads cannot be "
            f"guessed (published models have {_HEAD_WIDTH} dimensions per head); pass a "
            "configuration"
        )
    return width // _HEAD_WIDTH
