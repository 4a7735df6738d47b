"""What to cut from which blocks of a model, in exact counts, and as ratios of Torch-Pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch_pruning.pruner.algorithms.scheduler import linear_scheduler

from vlp_plugins.models.parts import Attention, Block, Kind
from vlp_plugins.models.request import check_sparsity
from vlp_plugins.runtime.errors import NonFiniteError, SparsityError, UnsupportedError, check_known
from vlp_plugins.structured.cuts import size_of
from vlp_plugins.structured.record import Kept

Cut = Literal["heads", "dims", "ffn"]
ScopeName = Literal["layer", "block kind"]
Ratio = float | Mapping[str, float] | Mapping[tuple[str, str], float]
"""Fraction removed: of all, by modality, or by modality and kind (`("vision", "ffn")`).

Where a mapping names a modality and a kind of it, the kind has its own ratio, in any order.
"""

_KINDS: dict[Cut, Kind] = {"heads": "attention", "dims": "attention", "ffn": "ffn"}


@dataclass(frozen=True)
class Scope:
    """Blocks of one modality and kind.

    Attributes:
        cut: whole `heads`, `dims` of every head, or units (`ffn`).
        blocks: as they are before anything is cut.
    """

    modality: str
    cut: Cut
    ratio: float
    blocks: tuple[Block, ...]

    @property
    def sizes(self) -> list[int]:
        """How many heads, dimensions of a head, or units each block has."""
        return [self.left(block, Kept()) for block in self.blocks]

    def left(self, block: Block, kept: Kept) -> int:
        """How many of them are kept of a block."""
        count, size = size_of(block, kept)
        return size if self.cut == "dims" else count


@dataclass(frozen=True)
class Plan:
    """All that is to be cut.

    Attributes:
        scopes: with a ratio above 0.
        scope: whether every block loses the ratio, or the blocks of a scope are ranked together.
        steps: in which it is done; each removes as much as the others.
        round_to: dimensions of a head and units are left in multiples of it; heads are not.
    """

    scopes: tuple[Scope, ...]
    scope: ScopeName = "layer"
    steps: int = 1
    round_to: int | None = None

    @property
    def cut_blocks(self) -> Iterator[Block]:
        """Every block that loses something."""
        return (block for scope in self.scopes for block in scope.blocks)


def plan_of(
    blocks: Sequence[Block],
    ratio: Ratio = 0.5,
    *,
    cut: Sequence[Cut] | Cut = ("heads", "ffn"),
    scope: ScopeName = "layer",
    steps: int = 1,
    round_to: int | None = None,
) -> Plan:
    """A plan for blocks (see `vlp_plugins.structured.blocks_of`), sorted into scopes.

    `ratio` is the fraction removed, in [0, 1); what a mapping does not name stays whole. `cut` says
    what goes: of attention `heads` or `dims`, and `ffn`. For the others see `Plan`.

    Raises:
        UnsupportedError: for an unknown name, or a model without such blocks.
        SparsityError: for a ratio outside [0, 1) or a number that is not at least 1.
    """
    wanted = _cuts(cut)
    if scope not in ("layer", "block kind"):
        raise UnsupportedError(f"scope {scope!r} is none of 'layer', 'block kind'")
    for name, value in (("steps", steps), ("round_to", 1 if round_to is None else round_to)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SparsityError(f"{name}={value!r}; give a whole number of at least 1")
    groups: dict[tuple[str, Cut], list[Block]] = {}
    for block in blocks:
        for each in wanted:
            if _KINDS[each] == block.kind:
                groups.setdefault((block.modality, each), []).append(block)
    if not groups:
        raise UnsupportedError(
            f"the model has no blocks to cut {', '.join(wanted)} from "
            f"({len(blocks)} blocks in all); vlp_plugins.structured.uncut says why"
        )
    of = _ratios(ratio, list(groups))
    scopes = [
        Scope(modality, each, of[modality, each], tuple(some))
        for (modality, each), some in groups.items()
        if of[modality, each] > 0
    ]
    for block in (block for each in scopes if each.cut == "dims" for block in each.blocks):
        if isinstance(block, Attention) and block.rotary:
            raise UnsupportedError(
                f"positions turn the dimensions of {block.name!r} in pairs, so only whole heads "
                "can go; cut 'heads'"
            )
    return Plan(tuple(scopes), scope, steps, round_to)


def _cuts(cut: Sequence[Cut] | Cut) -> tuple[Cut, ...]:
    wanted: tuple[Cut, ...] = (cut,) if isinstance(cut, str) else tuple(dict.fromkeys(cut))
    for each in wanted:
        check_known("cut", each, _KINDS)
    if not wanted or ("heads" in wanted and "dims" in wanted):
        raise UnsupportedError(
            f"cut={cut!r}; give 'heads' or 'dims' (not both, or attention loses twice), 'ffn', or "
            "one of the former with 'ffn'"
        )
    return wanted


def _ratios(ratio: Ratio, scopes: Sequence[tuple[str, Cut]]) -> dict[tuple[str, Cut], float]:
    if not isinstance(ratio, Mapping):
        value = check_sparsity(ratio)
        return dict.fromkeys(scopes, value)
    found: dict[tuple[str, Cut], float] = dict.fromkeys(scopes, 0.0)
    for key, value in sorted(ratio.items(), key=lambda item: isinstance(item[0], tuple)):
        modality, kind = key if isinstance(key, tuple) else (key, None)
        named = [(m, c) for m, c in scopes if m == modality and kind in (None, c, _KINDS[c])]
        if not named:
            known = sorted({m for m, _ in scopes} | {str((m, _KINDS[c])) for m, c in scopes})
            raise UnsupportedError(
                f"ratio names {key!r}, of which nothing is cut (there are: {', '.join(known)})"
            )
        found |= dict.fromkeys(named, check_sparsity(value))
    return found


def removed_after(size: int, ratio: float, step: int, steps: int, round_to: int | None) -> int:
    """How many of `size` are gone after a step of `steps`, counted from 1.

    `int(ratio * step / steps * size)`, or fewer, so that what is left is a multiple of `round_to`.
    """
    left = size - int(ratio * (step / steps) * size)
    return size - _rounded_up(left, size, round_to)


def _rounded_up(left: int, size: int, round_to: int | None) -> int:
    """The next multiple of `round_to`, but not more than there are."""
    return left if round_to is None else min(size, -(-left // round_to) * round_to)


def least(
    vectors: Sequence[Tensor], remove: int, *, floor: int = 1, round_to: int | None = None
) -> list[int]:
    """How many of each vector are among the `remove` least important of all vectors together.

    Vectors are float `[units]`; equal importances go by position. At least `floor` stay of each,
    and of a vector from which something goes a multiple of `round_to`: fewer go then.

    Raises:
        SparsityError: if so many cannot go.
        NonFiniteError: if an importance is NaN or infinite.
    """
    spare = sum(max(0, len(vector) - floor) for vector in vectors)
    if remove > spare:
        total = sum(map(len, vectors))
        raise SparsityError(
            f"{remove} of {total} cannot be removed from {len(vectors)} blocks of which each keeps "
            f"at least {floor}; ask for at most {100 * spare // total / 100:g}"
        )
    everything = []
    for vector in vectors:
        check_finite(vector)
        values = vector.double().clone()
        values[values.argsort(stable=True)[max(0, len(values) - floor) :]] = torch.inf
        everything.append(values)
    owner = torch.cat([torch.full((len(v),), i, device="cpu") for i, v in enumerate(vectors)])
    chosen = owner[torch.cat(everything).argsort(stable=True)[:remove]]
    counts = torch.bincount(chosen, minlength=len(vectors)).tolist()
    return [
        len(vector) - _rounded_up(len(vector) - count, len(vector), round_to)
        for vector, count in zip(vectors, counts, strict=True)
    ]


def check_finite(vector: Tensor) -> None:
    """Raises `NonFiniteError` if an importance is NaN or infinite."""
    if bad := int((~torch.isfinite(vector)).sum()):
        raise NonFiniteError(
            f"{bad} of {len(vector)} importances are NaN or infinite; look at what made them"
        )


class StepRatios(float):
    """A ratio with what Torch-Pruning is given at each step, 0 before the first: exact counts."""

    at_steps: tuple[float, ...]

    def __new__(cls, ratio: float, at_steps: Iterable[float]) -> StepRatios:
        made = super().__new__(cls, ratio)
        made.at_steps = (0.0, *at_steps)
        return made


def unit_ratios(size: int, ratio: float, plan: Plan) -> StepRatios:
    """Torch-Pruning leaves `int(size * (1 - ratio))`; half a unit keeps rounding errors away."""
    round_to = plan.round_to if plan.scope == "layer" else None
    gone = [removed_after(size, ratio, t + 1, plan.steps, round_to) for t in range(plan.steps)]
    return StepRatios(ratio, [(k - 0.5) / size if k else 0.0 for k in gone])


def head_ratios(size: int, ratio: float, plan: Plan) -> StepRatios:
    """Torch-Pruning removes `ceil(ratio * heads)` of the heads that are left at each step."""
    gone = [removed_after(size, ratio, t, plan.steps, None) for t in range(plan.steps + 1)]
    return StepRatios(
        ratio,
        [
            (after - before - 0.5) / (size - before) if after > before else 0.0
            for before, after in pairwise(gone)
        ],
    )


def ratios_at_steps(ratio: float, steps: int) -> Sequence[float]:
    """Torch-Pruning's scheduler: the ratio of each step, from step 0."""
    return ratio.at_steps if isinstance(ratio, StepRatios) else linear_scheduler(ratio, steps)
