"""Image-text retrieval: recall at k by features, and re-ranked by a matching head.

By its score alone, as the evaluations of ALBEF and X-VLM do; BLIP's own adds the similarity of the
features to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.batches import check_batches, to_device
from vlp_plugins.models.adapter import (
    Adapter,
    Batch,
    ImageTokensAdapter,
    MatchingAdapter,
    RetrievalAdapter,
    need,
)
from vlp_plugins.runtime.errors import DataError, UnsupportedError
from vlp_plugins.runtime.model_state import evaluating, takes_model
from vlp_plugins.runtime.offload import device_of

# Rows of the similarity matrix that are compared at a time: bounds the temporaries.
_BLOCK = 512


@dataclass(frozen=True)
class Recall:
    """Recall at k in percent.

    Attributes:
        image_to_text: by k, the share of images that find one of their texts among the first k.
        text_to_image: by k, the share of texts that find their image among the first k.
        ahead_of_image: of every image, how many texts of others come before its own; int64 `[I]`.
        ahead_of_text: of every text, how many other images come before its own; int64 `[T]`.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    ahead_of_image: Tensor | None = field(default=None, compare=False, repr=False)
    ahead_of_text: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def mean(self) -> float:
        """Mean over both directions and every k."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)

    def by_image(self, image_of: Sequence[int]) -> tuple[list[float], list[float]]:
        """R@1 both ways in percent, a value for each image, whose mean is the R@1.

        Texts of one image are not independent samples, so that the error of the mean comes from
        images. Where they have one text each, its value is 0 or 100; else the mean over texts is a
        ratio of two sums over images, and an image stands for what it adds to it (delta method).

        Args:
            image_of: of every text, the number of its image, from 0 without gaps.
        """
        assert self.ahead_of_image is not None  # `recall_at_k` gives both
        assert self.ahead_of_text is not None
        image = torch.tensor(image_of, device="cpu")
        hits = 100 * (self.ahead_of_text.cpu() < 1).double()
        mean, texts = hits.mean(), torch.bincount(image).double()
        by_text = mean + torch.bincount(image, weights=hits - mean) / texts.mean()
        by_image = 100 * (self.ahead_of_image.cpu() < 1).double()
        return by_image.tolist(), by_text.tolist()

    def as_dict(self) -> dict[str, float]:
        """`image_to_text_r1`, ..., `text_to_image_r10`, `mean`; percent."""
        ways = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        named = {f"{way}_r{k}": value for way, by_k in ways.items() for k, value in by_k.items()}
        return named | {"mean": self.mean}


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
        targets = torch.arange(texts, device=similarity.device)
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
        ahead_of_image,
        ahead_of_text,
    )


def _check_targets(targets: Tensor, images: int, texts: int) -> None:
    if targets.shape != (texts,):
        raise DataError(f"targets are {list(targets.shape)}; there are {texts} texts")
    found = torch.unique(targets)
    if found.numel() != images or int(found[0]) != 0 or int(found[-1]) != images - 1:
        raise DataError(
            f"targets name {found.numel()} different images; each of the {images} needs a text"
        )


_ROWS = 64  # pairs per call of the matching head


@dataclass
class PairInputs:
    """Inputs of the matching head, row by row, so that any image can meet any text.

    Attributes:
        images: per pair, the tensors that belong to its image; empty if another pair has them.
        texts: per pair, its token tensors without the padding.
    """

    images: list[dict[str, Tensor]] = field(default_factory=list)
    texts: list[dict[str, Tensor]] = field(default_factory=list)
    pad: dict[str, float] = field(default_factory=dict)

    def add(self, batch: Batch, new: Sequence[int] | None = None) -> None:
        """Keeps the rows of a batch.

        Args:
            batch: `attention_mask` `[B, L]`, padded on the right; tensors of its shape belong to
                the text, all others with `B` rows to the image.
            new: the rows whose image is in no row before; None for all.

        Raises:
            BatchError: if there is no attention mask.
        """
        (mask,) = need(batch, "attention_mask")
        tensors = {key: value.cpu() for key, value in batch.items() if torch.is_tensor(value)}
        texts = {key: value for key, value in tensors.items() if value.shape == mask.shape}
        images = {k: v for k, v in tensors.items() if k not in texts and len(v) == len(mask)}
        kept = set(range(len(mask)) if new is None else new)
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 1 for row in mask.cpu()]
        for row, length in enumerate(lengths):
            if length < mask.shape[1]:  # what the tokenizer pads with
                self.pad.update({key: value[row, -1].item() for key, value in texts.items()})
            self.texts.append({key: value[row, :length] for key, value in texts.items()})
            has_image = row in kept
            self.images.append({k: v[row] for k, v in images.items()} if has_image else {})

    def image_batch(self, pairs: list[int]) -> dict[str, Tensor]:
        """The images of these pairs."""
        first = self.images[pairs[0]]
        return {key: torch.stack([self.images[i][key] for i in pairs]) for key in first}

    def text_batch(self, pairs: list[int]) -> dict[str, Tensor]:
        """The texts of these pairs, padded to the longest."""
        batch = {}
        for key in self.texts[pairs[0]]:
            batch[key] = nn.utils.rnn.pad_sequence(
                [self.texts[i][key] for i in pairs],
                batch_first=True,
                padding_value=self.pad.get(key, 0),
            )
        return batch


class MatchScores(NamedTuple):
    """Scores of the candidates.

    Attributes:
        scores: float32 `[I, T]`, meaningful where one of the others is true.
        by_image: bool `[I, T]`, the text is a candidate of the image.
        by_text: bool `[I, T]`, the image is a candidate of the text.
    """

    scores: Tensor
    by_image: Tensor
    by_text: Tensor


def match_scores(
    model: nn.Module,
    adapter: MatchingAdapter,
    inputs: PairInputs,
    similarity: Tensor,
    image_pairs: Sequence[int],
    candidates: int,
) -> MatchScores:
    """Asks the matching head about the best candidates of every image and of every text.

    A pair that is a candidate both ways is asked about once. Where the adapter encodes images
    apart, the image of successive pairs is encoded once. `similarity` is `[I, T]`, by features;
    `image_pairs` says which pair holds each image.
    """
    count, texts = similarity.shape
    # A collapsed model may have NaN here; it must not crash the choice of candidates.
    ranked = similarity.nan_to_num(nan=-torch.inf)
    best_texts = ranked.topk(min(candidates, texts), dim=1).indices
    best_images = ranked.topk(min(candidates, count), dim=0).indices
    nothing = torch.zeros(count, texts, dtype=torch.bool, device=similarity.device)
    by_image = nothing.scatter(1, best_texts, True)
    by_text = nothing.scatter(0, best_images, True)
    asked = (by_image | by_text).nonzero()
    scores = torch.zeros(count, texts, dtype=torch.float32, device="cpu")
    device = device_of(model)
    for part in asked.split(_ROWS):
        rows, columns = part.unbind(1)
        here, of_pair = rows.unique(return_inverse=True)
        images = to_device(
            inputs.image_batch([image_pairs[image] for image in here.tolist()]), device
        )
        if isinstance(adapter, ImageTokensAdapter):
            images = {"image_embeds": adapter.image_embeds(model, images)}
        images = {key: value[of_pair.to(value.device)] for key, value in images.items()}
        texts_here = to_device(inputs.text_batch(columns.tolist()), device)
        answer = adapter.match(model, {**images, **texts_here})
        scores[rows, columns] = answer.float().cpu()
    return MatchScores(scores, by_image, by_text)


def reranked(
    similarity: Tensor, scores: Tensor, by_image: Tensor, by_text: Tensor
) -> tuple[Tensor, Tensor]:
    """Matrices that rank candidates by their score, and all others after them by similarity.

    The similarity of candidates is not added to their score, as BLIP's own evaluation does. All are
    `[I, T]`; see `MatchScores`.

    Returns:
        float64 `[I, T]` for images as queries, and for texts as queries.
    """
    # float64, so that the shift does not swallow differences of similarity.
    others = similarity.double()
    finite = scores[scores.isfinite()]
    lowest = float(finite.min()) if finite.numel() else 0.0
    highest = others[others.isfinite()]
    shift = (float(highest.max()) if highest.numel() else 0.0) - lowest + 1
    below = others - shift
    wide = scores.double()
    return torch.where(by_image, wide, below), torch.where(by_text, wide, below)


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
        """Figures of the last stage; those by features alone as `features_...` next to them."""
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
    inputs, pairs = PairInputs(), 0
    first, of_pair = _unique_images(() if image_ids is None else image_ids)
    firsts = set(first)
    check_batches(batches)
    with evaluating(model) as device:
        for batch in batches:
            there = to_device(batch, device)
            text_features.append(adapter.text_features(model, there).float().cpu())
            rows = len(text_features[-1])
            new = [n for n in range(rows) if image_ids is None or pairs + n in firsts]
            pairs += rows
            if new:
                part = there if len(new) == rows else _rows_of(there, new, rows)
                image_features.append(adapter.image_features(model, part).float().cpu())
            if rerank is not None:
                inputs.add(batch, new)
        if not pairs:
            raise DataError("there are no batches to measure retrieval on")
        if image_ids is None:
            first = of_pair = list(range(pairs))
        elif len(image_ids) != pairs:
            raise DataError(f"{len(image_ids):,} image_ids were given for {pairs:,} pairs")
        targets = torch.tensor(of_pair, device="cpu")
        similarity = torch.cat(image_features) @ torch.cat(text_features).T
        by_features = recall_at_k(similarity, targets, ks)
        if rerank is None or matching is None:
            return TwoStages(by_features)
        scores = match_scores(model, matching, inputs, similarity, first, rerank)
    ways = [recall_at_k(matrix, targets, ks) for matrix in reranked(similarity, *scores)]
    found = Recall(
        ways[0].image_to_text, ways[1].text_to_image, ways[0].ahead_of_image, ways[1].ahead_of_text
    )
    return TwoStages(by_features, found)


def _rows_of(batch: Batch, chosen: Sequence[int], rows: int) -> dict[str, Any]:
    """Some of the rows of a batch."""
    return {
        key: value[list(chosen)]
        if torch.is_tensor(value) and value.ndim and len(value) == rows
        else value
        for key, value in batch.items()
    }


def _unique_images(image_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The pair that holds each image first, and the number of the image of every pair."""
    numbers: dict[int, int] = {}
    first: list[int] = []
    for pair, identity in enumerate(image_ids):
        if identity not in numbers:
            numbers[identity] = len(first)
            first.append(pair)
    return first, [numbers[identity] for identity in image_ids]
