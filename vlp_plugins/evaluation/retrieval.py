"""Image-text retrieval: recall at k, by features and re-ranked by a matching head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.batches import check_batches, to_device
from vlp_plugins.evaluation.recall import Recall, recall_at_k
from vlp_plugins.evaluation.reranking import PairInputs, match_scores, reranked
from vlp_plugins.models.adapter import Adapter, Batch, MatchingAdapter, RetrievalAdapter
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.model_state import evaluating, takes_model


@dataclass(frozen=True)
class TwoStages:
    """Recall of both stages of retrieval.

    Attributes:
        features: ranked by the similarity of features alone.
        reranked: with the best candidates in the order of the matching head; None without it.
    """

    features: Recall
    reranked: Recall | None = None

    @property
    def final(self) -> Recall:
        """Of the last stage."""
        return self.reranked or self.features

    def as_dict(self) -> dict[str, float]:
        """Figures of the last stage; those by features alone as `features_...` beside it."""
        found = self.final.as_dict()
        if self.reranked is not None:
            found |= {f"features_{name}": v for name, v in self.features.as_dict().items()}
        return found


@takes_model
def retrieval(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    *,
    rerank: int | None = None,
    image_ids: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Recall:
    """Recall of a model among all pairs of the batches, by the last stage.

    See `two_stage_retrieval`, whose arguments these are.
    """
    found = two_stage_retrieval(model, adapter, batches, rerank=rerank, image_ids=image_ids, ks=ks)
    return found.final


@takes_model
def two_stage_retrieval(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    *,
    rerank: int | None = None,
    image_ids: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> TwoStages:
    """Recall of a model among all pairs of the batches, by features and re-ranked.

    Features are kept, images are not, unless they are needed again for re-ranking: then their
    `pixel_values` stay in memory (600 kB each at 224 x 224 pixels). An image that is in several
    pairs is encoded with the first of them.

    Args:
        model: is left in the mode it was in.
        adapter: knows how the model embeds images and texts (and matches them, to re-rank).
        batches: row i of a batch pairs an image with a text.
        rerank: order the best so many candidates of every query by the matching head, ahead of
            all others; None ranks by the features alone.
        image_ids: for every pair, a number that images in several pairs have in common; None if
            every pair has an image of its own.
        ks: cut-offs.

    Raises:
        UnsupportedError: if the family does not embed, or does not match.
        DataError: if there are no pairs, or `image_ids` are not as many.
    """
    if not isinstance(adapter, RetrievalAdapter):
        raise UnsupportedError(
            f"adapter {adapter.name!r} does not say how images and texts are embedded; retrieval "
            "needs its image_features and text_features"
        )
    matching = adapter if isinstance(adapter, MatchingAdapter) else None
    if rerank is not None and matching is None:
        raise UnsupportedError(
            f"adapter {adapter.name!r} has no matching head; measure retrieval without rerank"
        )
    if rerank is not None and rerank < 1:
        raise DataError(f"re-ranking needs at least 1 candidate, not {rerank}")
    image_features: list[Tensor] = []
    text_features: list[Tensor] = []
    inputs, seen, pairs = PairInputs(), set[int](), 0
    check_batches(batches)
    with evaluating(model) as device:
        for batch in batches:
            there = to_device(batch, device)
            text_features.append(adapter.text_features(model, there).float().cpu())
            rows = len(text_features[-1])
            new = _new_images(rows, image_ids, pairs, seen)
            pairs += rows
            if len(new):
                part = there if len(new) == rows else _rows_of(there, new, rows)
                image_features.append(adapter.image_features(model, part).float().cpu())
            if rerank is not None:
                inputs.add(batch, new)
        if not pairs:
            raise DataError("there are no batches to measure retrieval on")
        first, targets = _unique_images(pairs, image_ids)
        similarity = torch.cat(image_features) @ torch.cat(text_features).T
        by_features = recall_at_k(similarity, targets, ks)
        if rerank is None or matching is None:
            return TwoStages(by_features)
        scores = match_scores(model, matching, inputs, similarity, first, rerank)
    ways = [recall_at_k(matrix, targets, ks) for matrix in reranked(similarity, *scores)]
    return TwoStages(by_features, Recall(ways[0].image_to_text, ways[1].text_to_image))


def _new_images(rows: int, image_ids: Sequence[int] | None, done: int, seen: set[int]) -> Tensor:
    """The rows of a batch, after `done` pairs, whose image was not there; they join `seen`."""
    if image_ids is None:
        return torch.arange(rows, device="cpu")
    new = []
    for row, identity in enumerate(image_ids[done : done + rows]):
        if identity not in seen:
            seen.add(identity)
            new.append(row)
    return torch.tensor(new, dtype=torch.int64, device="cpu")


def _rows_of(batch: Batch, chosen: Tensor, rows: int) -> dict[str, Any]:
    """Some of the rows of a batch."""
    return {
        key: value[chosen.to(value.device)]
        if torch.is_tensor(value) and value.ndim and len(value) == rows
        else value
        for key, value in batch.items()
    }


def _unique_images(pairs: int, image_ids: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Pair that holds each image first `[I]`, and the image of every pair `[pairs]`."""
    if image_ids is None:
        every = torch.arange(pairs, device="cpu")
        return every, every
    if len(image_ids) != pairs:
        raise DataError(f"{len(image_ids):,} image_ids were given for {pairs:,} pairs")
    numbers: dict[int, int] = {}
    first: list[int] = []
    for pair, identity in enumerate(image_ids):
        if identity not in numbers:
            numbers[identity] = len(first)
            first.append(pair)
    of_pair = [numbers[identity] for identity in image_ids]
    return torch.tensor(first, device="cpu"), torch.tensor(of_pair, device="cpu")
