"""Token selections: which tokens of a block count for the statistics of its weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from vlp_plugins.models.adapter import TokenKind
from vlp_plugins.models.discovery import registry
from vlp_plugins.runtime.distributed import all_gather
from vlp_plugins.runtime.errors import UnsupportedError

VISUAL = (TokenKind.IMAGE, TokenKind.VIDEO)


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call of a block, in a block-by-block pass: the samples of one batch.

    Attributes:
        sample: index of the calibration batch.
        kinds: uint8 `[batch, tokens]`, the `TokenKind`s of the hidden states.
        inputs: `[batch, tokens, features]`, the hidden states that enter the block.
        outputs: of the same shape, what the unpruned block gives out; without features if the
            selection reads nothing that the block computes, see `TokenSelection.runs_block`.
        module_outputs: by canonical name of a weight what its module gives out in the unpruned
            block, `[batch, tokens, out]`; filled if the selection `reads_modules`.
        attention: `[batch, heads, queries, keys]`, probabilities of the unpruned block in the
            model's dtype, if the selection `reads_attention`; None for a block that has none.
    """

    sample: int
    kinds: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor
    module_outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    attention: torch.Tensor | None = None

    @property
    def real(self) -> torch.Tensor:
        """Bool `[batch, tokens]`, false at padding."""
        return self.kinds != TokenKind.PADDING

    def of_kinds(self, *kinds: TokenKind) -> torch.Tensor:
        """Bool `[batch, tokens]`, true at tokens of one of these kinds."""
        return torch.isin(self.kinds, self.kinds.new_tensor(kinds))


class SelectionState(ABC):
    """The tokens of one block."""

    @abstractmethod
    def observe(self, call: BlockCall) -> None:
        """Reads a batch, before its `selected`."""

    def agree(self) -> None:  # noqa: B027 - most have nothing to exchange
        """Called in every process, when all have observed all batches; see `reads_all_first`."""

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
        reads_outputs: whether it reads `BlockCall.outputs`.
        reads_modules: whether it reads `BlockCall.module_outputs`.
        reads_attention: whether it reads `BlockCall.attention`.
    """

    name: ClassVar[str]
    reads_all_first: ClassVar[bool] = False
    reads_outputs: ClassVar[bool] = True
    reads_modules: ClassVar[bool] = False
    reads_attention: ClassVar[bool] = False

    @property
    def runs_block(self) -> bool:
        """Whether it takes one more run of the block by every batch."""
        return self.reads_outputs or self.reads_modules or self.reads_attention

    @abstractmethod
    def begin(self, *, published: bool = False) -> SelectionState:
        """What a new block starts with.

        Args:
            published: follow the published code where it departs from the idea.
        """

    def record(self) -> dict[str, Any]:
        """For the manifest of masks and the identity of a run that can be resumed.

        Its `tokens` make the selection again, as `selection_of` reads them.
        """
        return {"tokens": self.name}


def selection_of(tokens: TokenSelection | str) -> TokenSelection:
    """A selection itself, or a new one by its name: `atv`, or `atv(alpha=3)`.

    Raises:
        UnknownNameError: if there is none of that name, or it has no such parameter.
        UnsupportedError: if `tokens` is neither, or a parameter makes no sense.
    """
    if isinstance(tokens, TokenSelection):
        return tokens
    if not isinstance(tokens, str):
        raise UnsupportedError(
            f"tokens={tokens!r:.80} is no token selection; give a name (all, text, image, atv, "
            "amia) or an instance, such as Atv(alpha=1)"
        )
    return registry().make("token_selections", tokens, TokenSelection)  # type: ignore[type-abstract]


def check_selected(found: object, tokens: torch.Size, name: str, weight: str) -> None:
    """Makes sure of what `SelectionState.selected` returned.

    Args:
        found: what it returned.
        tokens: `[batch, tokens]` of the block.
        name: of the selection.
        weight: canonical name.

    Raises:
        UnsupportedError: if it is no bool tensor of that shape.
    """
    what = type(found).__name__
    if isinstance(found, torch.Tensor):
        if found.dtype == torch.bool and found.shape == tokens:
            return
        what = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    raise UnsupportedError(
        f"token selection {name!r} returned {what} for weight {weight!r}; a selection is a bool "
        f"tensor of the block's tokens, here {list(tokens)}"
    )


def or_whole(chosen: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """`chosen`, and all real tokens of samples without a chosen one; bool `[batch, tokens]`."""
    return torch.where(chosen.any(1, keepdim=True), chosen, real)


class _ByKind(SelectionState):
    def __init__(self, mask: Callable[[BlockCall], torch.Tensor]) -> None:
        self._mask = mask
        self._found: dict[int, torch.Tensor] = {}

    def observe(self, call: BlockCall) -> None:
        self._found = {call.sample: or_whole(self._mask(call), call.real)}

    def selected(self, sample: int, weight: str) -> torch.Tensor:
        return self._found[sample]


@dataclass(frozen=True)
class AllTokens(TokenSelection):
    """Every real token."""

    name: ClassVar[str] = "all"
    reads_outputs: ClassVar[bool] = False

    def begin(self, *, published: bool = False) -> SelectionState:
        return _ByKind(lambda call: call.real)


@dataclass(frozen=True)
class TextTokens(TokenSelection):
    """Text alone; of a sample that has none in this block (a vision tower), every real token."""

    name: ClassVar[str] = "text"
    reads_outputs: ClassVar[bool] = False

    def begin(self, *, published: bool = False) -> SelectionState:
        return _ByKind(lambda call: call.of_kinds(TokenKind.TEXT))


@dataclass(frozen=True)
class ImageTokens(TokenSelection):
    """Images and videos alone; of a sample without any in this block, every real token."""

    name: ClassVar[str] = "image"
    reads_outputs: ClassVar[bool] = False

    def begin(self, *, published: bool = False) -> SelectionState:
        return _ByKind(lambda call: call.of_kinds(*VISUAL))


@dataclass(frozen=True)
class Atv(TokenSelection):
    """ATV-Pruning's tokens (Li et al., CVPR 2026): text, and the visual tokens that drift most.

    Drift is one minus the cosine between what enters the block and what leaves it. A sample of T
    other tokens counts its `round(min(1, alpha c) T)` visual tokens of the largest drift, where c
    is the mean drift of all visual tokens of all samples in this block. A sample without other
    tokens, as in a vision tower, counts as a whole.

    Attributes:
        alpha: how many visual tokens count; 0 leaves text alone.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "atv"
    reads_all_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        alpha = self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise UnsupportedError(f"atv: alpha={alpha!r}; give a number, such as 1")
        if not 0 <= alpha < math.inf:
            raise UnsupportedError(f"atv: alpha={alpha:g}; give a number from 0 on, such as 1")

    def begin(self, *, published: bool = False) -> SelectionState:
        return _AtvTokens(self.alpha, (TokenKind.IMAGE,) if published else VISUAL)

    def record(self) -> dict[str, Any]:
        return {"tokens": f"{self.name}(alpha={self.alpha:g})"}


class _AtvTokens(SelectionState):
    """The drift of the visual tokens of one block; quirk atv-A5: which kinds those are.

    Attributes:
        coefficient: mean drift of all of them, once all processes agree.
    """

    def __init__(self, alpha: float, visual: tuple[TokenKind, ...]) -> None:
        self._alpha = alpha
        self._visual = visual
        self._sums: dict[int, tuple[float, int]] = {}
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._found: dict[int, torch.Tensor] = {}
        self.coefficient = 0.0

    def observe(self, call: BlockCall) -> None:
        drifts, visual = drift(call.inputs, call.outputs), call.of_kinds(*self._visual)
        self._seen[call.sample] = (call.real, visual, drifts)
        # By sample: the order in which processes see samples shall not matter.
        values = drifts[visual].double()
        total = float(values.sum())  # not finite: of a batch that is left out
        self._sums[call.sample] = (total, len(values)) if math.isfinite(total) else (0.0, 0)

    def agree(self) -> None:
        found = {sample: each for part in all_gather(self._sums) for sample, each in part.items()}
        total = math.fsum(value for value, _ in found.values())
        count = sum(count for _, count in found.values())
        self.coefficient = total / count if count else 0.0

    def selected(self, sample: int, weight: str) -> torch.Tensor:
        if sample not in self._found:
            self._found[sample] = self._chosen(*self._seen.pop(sample))
        return self._found[sample]

    def _chosen(
        self, real: torch.Tensor, visual: torch.Tensor, drifts: torch.Tensor
    ) -> torch.Tensor:
        chosen = real & ~visual
        for row, (of_row, others) in enumerate(zip(visual, chosen.sum(1).tolist(), strict=True)):
            count = visual_budget(self.coefficient, self._alpha, int(of_row.sum()), others)
            places = of_row.nonzero()[:, 0]
            order = drifts[row, places].argsort(descending=True, stable=True)
            chosen[row, places[order[:count]]] = True
        return or_whole(chosen, real)


def drift(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """One minus the cosine between the hidden states before and after a block.

    Args:
        inputs: `[..., features]`.
        outputs: of the same shape.

    Returns:
        float32 `[...]`, from 0 to 2.
    """
    return 1 - F.cosine_similarity(inputs.float(), outputs.float(), dim=-1)


def visual_budget(coefficient: float, alpha: float, visual: int, others: int) -> int:
    """How many visual tokens of a sample count (quirk atv-A2: rounded, the paper says floor).

    Args:
        coefficient: mean drift of the visual tokens of all samples in this block.
        alpha: factor of it.
        visual: number of visual tokens of the sample.
        others: number of its other tokens.
    """
    return min(visual, round(min(1.0, alpha * coefficient) * others))
