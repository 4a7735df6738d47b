"""Token selections: which of the real tokens of a block count in the statistics of its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class BlockCall:
    """One batch in one block, before that is pruned.

    Attributes:
        sample: index of the batch.
        kinds: uint8 `[batch, tokens]`, the `TokenKind` of each position of the hidden states.
        inputs: `[batch, tokens, features]`, the hidden states that enter the block.
        outputs: the same shape, what the block gives out.
        module_outputs: by canonical name of a weight what its module gives out, `[batch, tokens,
            out]`; only for a selection that `reads_modules`.
        attention: `[batch, heads, queries, keys]`, probabilities; only for one that
            `reads_attention`, and None in a block without attention.
    """

    sample: int
    kinds: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor
    module_outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    attention: torch.Tensor | None = None


class SelectionState(ABC):
    """The tokens of one block."""

    @abstractmethod
    def observe(self, call: BlockCall) -> None:
        """Reads a batch, before its `selected`."""

    @abstractmethod
    def selected(self, sample: int, weight: str) -> torch.Tensor:
        """Which tokens of a batch count for a weight, bool `[batch, tokens]`; padding never does.

        Where they are the same for several weights, it returns the same tensor.
        """


class TokenSelection(ABC):
    """A rule that chooses tokens block by block. Configuration lives in the instance.

    It is asked in blocks that read several kinds of tokens; elsewhere all real ones count.

    Attributes:
        name: what it is registered under.
        reads_all_first: whether `observe` must get all batches before the first `selected`.
        reads_modules: whether it reads `BlockCall.module_outputs`.
        reads_attention: whether it reads `BlockCall.attention`.
    """

    name: ClassVar[str]
    reads_all_first: ClassVar[bool] = False
    reads_modules: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = False

    @abstractmethod
    def begin(self) -> SelectionState:
        """What a new block starts with."""

    def record(self) -> dict[str, Any]:
        """For the manifest of masks and the identity of a run that can be resumed."""
        return {"tokens": self.name}
