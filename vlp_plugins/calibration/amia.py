"""AMIA: the tokens that stand for all tokens of a sample, chosen for every layer by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from vlp_plugins.calibration.selections import VISUAL, BlockCall, SelectionState, TokenSelection
from vlp_plugins.models.adapter import TokenKind
from vlp_plugins.runtime.errors import UnsupportedError

NEIGHBOURS = 3
_DISCOUNT = 0.2
_TOLERANCE = 0.1
_TIE = 1e-5  # of the largest score
_EQUAL = 1e-5  # distance of unit vectors up to which two tokens count as the same


@dataclass(frozen=True)
class Amia(TokenSelection):
    """AMIA (TAMP; Lee et al., Findings of ACL 2025): tokens that attention and variety call for.

    For every layer and sample it takes the token of the greatest score, again and again: attention
    that it and its nearest neighbours get from the last token, less for neighbours of what was
    taken. It ends when those taken are distributed as all tokens are; the more alike tokens are,
    the fewer it takes. A layer whose outputs are not those of the block's tokens counts all.
    """

    name: ClassVar[str] = "amia"
    reads_modules: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    def begin(self, *, published: bool = False) -> SelectionState:
        return _AmiaTokens(published)


class _AmiaTokens(SelectionState):
    """The tokens of the batch that was observed last."""

    def __init__(self, published: bool) -> None:
        self._published = published
        self._real = torch.zeros(0)
        self._found: dict[str, torch.Tensor] = {}

    def observe(self, call: BlockCall) -> None:
        self._real = call.real
        self._found = {
            weight: self._chosen(call, call.attention, outputs, weight)
            for weight, outputs in call.module_outputs.items()
            if outputs.shape[:-1] == call.kinds.shape
        }

    def selected(self, sample: int, weight: str) -> torch.Tensor:
        return self._found.get(weight, self._real)

    def _chosen(
        self, call: BlockCall, attention: torch.Tensor | None, outputs: torch.Tensor, weight: str
    ) -> torch.Tensor:
        if attention is None:
            raise UnsupportedError(
                f"token selection 'amia' reads attention probabilities, and the block of weight "
                f"{weight!r} gives none; load the model with attn_implementation='eager', or take "
                "tokens='atv'"
            )
        visual = call.of_kinds(TokenKind.IMAGE) if self._published else call.of_kinds(*VISUAL)
        chosen = torch.zeros_like(call.real)
        for row, real in enumerate(call.real):
            places = real.nonzero()[:, 0]
            if not len(places):
                continue
            found = representative_tokens(
                outputs[row, places],
                attention[row, :, places[-1]].mean(0)[places],
                visual[row, places],
                published=self._published,
            )
            chosen[row, places] = found.to(chosen.device)
        return chosen


def representative_tokens(
    outputs: torch.Tensor,
    attention: torch.Tensor,
    visual: torch.Tensor,
    *,
    published: bool = False,
) -> torch.Tensor:
    """AMIA's choice among the tokens of one sample.

    By default tokens whose outputs differ by rounding alone are the same token, the earlier one
    before the later; and a kind of token that says nothing of how alike tokens are (a single one)
    is left out of the mean. In the published code rounding decides about equal tokens (quirk
    amia-T5), and the choice never ends for such a sample (amia-T6).

    Args:
        outputs: `[tokens, out]`, what the layer gives out.
        attention: `[tokens]`, that the last token pays to each.
        visual: bool `[tokens]`.
        published: follow the published code.

    Returns:
        Bool `[tokens]`, on the CPU; at least one is true.

    Raises:
        UnsupportedError: in the published variant, if the published code would never end.
    """
    cosines = similarities(outputs, merged=not published)
    means = means_of(cosines, visual)
    known = [mean for mean in means if not math.isnan(mean)]
    if published and len(known) < len(means):
        raise UnsupportedError(
            f"published AMIA never ends on a sample of {int(visual.sum())} visual and "
            f"{int((~visual).sum())} other tokens: each kind needs two that are alike; leave out "
            "variant='published', or such samples"
        )
    density = sum(known) / len(known) if known else 1.0
    threshold = _TOLERANCE * math.sqrt(max(0.0, 1 - density))
    distances, near = _neighbours(1 - cosines, published=published)
    scores = attention.float().cpu()
    scores = scores + (torch.exp(-distances) * scores[near]).sum(1)
    chosen = _greedy(
        scores.double().numpy(),
        torch.exp(cosines.double() - 1).numpy(),  # exp(-|a - b|^2 / 2) of unit vectors
        near.numpy(),
        torch.exp(-_DISCOUNT * distances).double().numpy(),
        threshold,
        0.0 if published else _TIE * float(scores.abs().max()),
    )
    return torch.from_numpy(chosen)


def cosine_means(outputs: torch.Tensor, visual: torch.Tensor) -> tuple[float, float, float]:
    """How alike the tokens of one sample are in a layer: the three means of TAMP.

    Args:
        outputs: `[tokens, out]`.
        visual: bool `[tokens]`.

    Returns:
        Mean cosine between visual tokens, between other tokens (of the pairs that are positive:
        quirk amia-T4), and between the one and the other (of all pairs). NaN where there is no
        such pair.
    """
    return means_of(similarities(outputs), visual)


def means_of(cosines: torch.Tensor, visual: torch.Tensor) -> tuple[float, float, float]:
    """`cosine_means` of `similarities`."""
    visual = visual.cpu()
    within = []
    for kind in (visual, ~visual):
        pairs = cosines[kind][:, kind].triu(1)
        within.append(float(pairs[pairs > 0].mean()))
    return within[0], within[1], float(cosines[visual][:, ~visual].mean())


def similarities(outputs: torch.Tensor, *, merged: bool = False) -> torch.Tensor:
    """Cosines between the tokens of one sample.

    Args:
        outputs: `[tokens, out]`.
        merged: tokens that differ by rounding alone have the cosines of the first of them.

    Returns:
        float32 `[tokens, tokens]`, symmetric, on the CPU.
    """
    rows = F.normalize(outputs.detach().float(), dim=-1)
    cosines = (rows @ rows.T).cpu()
    if not merged:
        return cosines
    cosines = cosines.triu() + cosines.triu(1).T
    first = _first_equal(rows, cosines, max(_EQUAL, 2 * torch.finfo(outputs.dtype).eps))
    cosines = cosines[first][:, first]
    return cosines.masked_fill_(first[:, None] == first, 1.0)


def _first_equal(rows: torch.Tensor, cosines: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Of every unit vector the first one within that distance, int64 `[tokens]`."""
    first = torch.arange(len(rows))
    near = (cosines > 1 - max(1e-5, tolerance**2)).triu(1)
    for row in near.any(1).nonzero()[:, 0].tolist():
        if first[row] == row:
            others = near[row].nonzero()[:, 0]
            others = others[first[others] == others]
            gaps = torch.linalg.vector_norm(rows[others] - rows[row], dim=1).cpu()
            first[others[gaps <= tolerance]] = row
    return first


def _neighbours(distances: torch.Tensor, *, published: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances and places of the nearest other tokens, `[tokens, at most 3]`."""
    count = len(distances)
    if published:  # the nearest is taken for the token itself
        values, places = distances.topk(min(NEIGHBOURS + 1, count), largest=False)
        return values[:, 1:], places[:, 1:]
    keys = distances.double().fill_diagonal_(math.inf)
    keys += torch.arange(count, dtype=torch.float64) * 1e-12  # among equals the first
    places = keys.topk(min(NEIGHBOURS, count - 1), largest=False).indices
    return distances.gather(1, places), places


def _greedy(
    scores: np.ndarray,
    kernel: np.ndarray,
    near: np.ndarray,
    discounts: np.ndarray,
    enough: float,
    tie: float,
) -> np.ndarray:
    """Takes tokens until the maximum mean discrepancy to all tokens is below `enough`.

    Of scores within `tie` of the largest the first is taken: copies of a token have one score.
    """
    count = len(scores)
    chosen = np.zeros(count, dtype=bool)
    columns, everything = kernel.mean(0), kernel.mean()
    open_scores = scores.copy()
    inner = across = 0.0
    for taken in range(1, count + 1):
        best = int(open_scores.argmax())
        if tie:
            best = int((open_scores >= open_scores[best] - tie).argmax())
        open_scores[near[best]] -= discounts[best] * max(open_scores[best], 0.0)
        inner += 2 * kernel[best, chosen].sum() + kernel[best, best]
        across += columns[best]
        chosen[best] = True
        open_scores[best] = -np.inf
        if everything + inner / taken**2 - 2 * across / taken < enough:
            break
    return chosen
