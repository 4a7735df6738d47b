"""Image-text retrieval: recall at k, by features and re-ranked by a matching head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlp_plugins.adapter import Adapter, Batch, MatchingAdapter, RetrievalAdapter
from vlp_plugins.calibration.batches import to_device
from vlp_plugins.errors import DataError, UnsupportedError
from vlp_plugins.evaluation.inference import evaluating
from vlp_plugins.evaluation.reranking import PairInputs, match_scores, reranked

# Rows of the similarity matrix that are compared at a time: bounds the temporaries.
_BLOCK = 512


@dataclass(frozen=True)
class Recall:
    """Recall at k in per cent.

    Attributes:
        image_to_text: by k, the share of images that find one of their texts among the first k.
        text_to_image: by k, the share of texts that find their image among the first k.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over both directions and every k."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)


def recall_at_k(
    similarity: Tensor, targets: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> Recall:
    """Recall at k both ways.

    A wrong partner that is as similar as the right one counts as ahead of it, and so does NaN:
    a collapsed model, whose features are all alike, finds nothing.

    Args:
        similarity: float `[I, T]`, images by texts.
        targets: integer `[T]`, the image that each text describes; None if text i describes
            image i (then I = T). Every image has at least one text.
        ks: cut-offs.

    Raises:
        DataError: if targets do not fit, or a cut-off is below 1.
    """
    images, texts = similarity.shape
    if targets is None:
        targets = torch.arange(texts)
    targets = targets.to(similarity.device)
    _check_targets(targets, images, texts)
    if not ks or min(ks) < 1:
        raise DataError(f"recall at k needs cut-offs from 1 on, not {list(ks)}")
    ahead_of_text = torch.zeros(texts, dtype=torch.int64, device=similarity.device)
    ahead_of_image = torch.empty(images, dtype=torch.int64, device=similarity.device)
    own_of_text = similarity[targets, torch.arange(texts, device=similarity.device)]
    for start in range(0, images, _BLOCK):
        rows = similarity[start : start + _BLOCK]
        numbers = torch.arange(start, start + len(rows), device=similarity.device)
        own = targets[None, :] == numbers[:, None]
        best = rows.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ahead_of_image[start : start + len(rows)] = (~own & ~(rows < best)).sum(dim=1)
        ahead_of_text += (~own & ~(rows < own_of_text)).sum(dim=0)
    return Recall(
        {k: 100 * float((ahead_of_image < k).double().mean()) for k in ks},
        {k: 100 * float((ahead_of_text < k).double().mean()) for k in ks},
    )


def retrieval(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    *,
    rerank: int | None = None,
    image_ids: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Recall:
    """Recall of a model among all pairs of the batches.

    Features are kept, images are not, unless they are needed again for re-ranking: then their
    `pixel_values` stay in memory (600 kB each at 224 x 224 pixels).

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
    inputs = PairInputs()
    with evaluating(model) as device:
        for batch in batches:
            there = to_device(batch, device)
            image_features.append(adapter.image_features(model, there).float().cpu())
            text_features.append(adapter.text_features(model, there).float().cpu())
            if rerank is not None:
                inputs.add(batch)
        if not image_features:
            raise DataError("there are no batches to measure retrieval on")
        texts = torch.cat(text_features)
        first, targets = _unique_images(len(texts), image_ids)
        similarity = torch.cat(image_features)[first] @ texts.T
        if rerank is not None and matching is not None:
            scores = match_scores(model, matching, inputs, similarity, first, rerank)
            ways = [recall_at_k(matrix, targets, ks) for matrix in reranked(similarity, *scores)]
            return Recall(ways[0].image_to_text, ways[1].text_to_image)
    return recall_at_k(similarity, targets, ks)


def _unique_images(pairs: int, image_ids: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Pair that holds each image first `[I]`, and the image of every pair `[pairs]`."""
    if image_ids is None:
        return torch.arange(pairs), torch.arange(pairs)
    if len(image_ids) != pairs:
        raise DataError(f"{len(image_ids):,} image_ids were given for {pairs:,} pairs")
    numbers: dict[int, int] = {}
    first: list[int] = []
    for pair, identity in enumerate(image_ids):
        if identity not in numbers:
            numbers[identity] = len(first)
            first.append(pair)
    return torch.tensor(first), torch.tensor([numbers[identity] for identity in image_ids])


def _check_targets(targets: Tensor, images: int, texts: int) -> None:
    if targets.shape != (texts,):
        raise DataError(f"targets are {list(targets.shape)}; there are {texts} texts")
    found = torch.unique(targets)
    if found.numel() != images or int(found[0]) != 0 or int(found[-1]) != images - 1:
        raise DataError(
            f"targets name {found.numel()} different images; each of the {images} needs a text"
        )
