"""What to cut from which blocks of a model, and how Torch-Pruning is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlp_plugins.models.parts import Attention, Block, Kind
from vlp_plugins.models.request import check_sparsity
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError, suggest

Cut = Literal["heads", "dims", "ffn"]
Share = Literal["layer", "block kind"]
Ratio = float | Mapping[str, float] | Mapping[tuple[str, str], float]
"""Fraction removed: of all, by modality, or by modality and kind (`("vision", "ffn")`).

Where a mapping names a modality and a kind of it, the kind has its own ratio, in any order.
"""

_KINDS: dict[Cut, Kind] = {"heads": "attention", "dims": "attention", "ffn": "ffn"}


@dataclass(frozen=True)
class Scope:
    """Blocks of one modality and kind.

    Attributes:
        modality: of the blocks.
        cut: whole `heads`, `dims` of every head, or units (`ffn`).
        ratio: fraction removed.
        blocks: as they are before anything is cut.
    """

    modality: str
    cut: Cut
    ratio: float
    blocks: tuple[Block, ...]

    @property
    def sizes(self) -> list[int]:
        """How many there are to be cut in each block."""
        return [size_of(block, self.cut) for block in self.blocks]


@dataclass(frozen=True)
class Plan:
    """All that is to be cut.

    Attributes:
        scopes: with a ratio above 0.
        scope: whether every layer loses its share, or the blocks of a scope are ranked together.
        steps: in which it is done; each removes as much as the others.
        round_to: dimensions of a head and units are left in multiples of it; heads are not.
    """

    scopes: tuple[Scope, ...]
    scope: Share = "layer"
    steps: int = 1
    round_to: int | None = None

    @property
    def cut_blocks(self) -> Iterator[tuple[Scope, Block]]:
        """Every block that loses something."""
        return ((scope, block) for scope in self.scopes for block in scope.blocks)


def size_of(block: Block, cut: Cut) -> int:
    """Number of heads, of dimensions of a head, or of units."""
    if isinstance(block, Attention):
        return block.heads if cut == "heads" else block.head_dim
    return block.width


def plan_of(
    blocks: Sequence[Block],
    ratio: Ratio = 0.5,
    *,
    cut: Sequence[Cut] | Cut = ("heads", "ffn"),
    scope: Share = "layer",
    steps: int = 1,
    round_to: int | None = None,
) -> Plan:
    """Sorts blocks into scopes.

    Args:
        blocks: `vlp_plugins.structured.blocks_of` the model.
        ratio: fraction removed, in [0, 1). Of a mapping, what it does not name stays whole.
        cut: what goes: of attention `heads` or `dims`, and `ffn`.
        scope: see `Plan`.
        steps: see `Plan`.
        round_to: see `Plan`.

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
            f"({len(blocks)} blocks in all); vlp_plugins.structured.uncut tells why"
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
        if each not in _KINDS:
            raise UnsupportedError(f"cut {each!r} is unknown{suggest(str(each), list(_KINDS))}")
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
