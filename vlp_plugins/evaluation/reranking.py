"""The second stage of retrieval: a matching head orders the best candidates of each query.

By its score alone, as the evaluations of ALBEF and X-VLM do; BLIP's own adds the similarity of the
features to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlp_plugins.calibration.batches import to_device
from vlp_plugins.models.adapter import Batch, ImageTokensAdapter, MatchingAdapter, need

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

    def add(self, batch: Batch, new: Tensor | None = None) -> None:
        """Keeps the rows of a batch.

        Args:
            batch: `attention_mask` `[B, L]`, padded on the right; tensors of its shape belong to
                the text, all others with `B` rows to the image.
            new: int64, the rows whose image has not been there yet; None if all have not.

        Raises:
            BatchError: if there is no attention mask.
        """
        (mask,) = need(batch, "attention_mask")
        tensors = {key: value.cpu() for key, value in batch.items() if torch.is_tensor(value)}
        texts = {key: value for key, value in tensors.items() if value.shape == mask.shape}
        images = {k: v for k, v in tensors.items() if k not in texts and len(v) == len(mask)}
        kept = set(range(len(mask)) if new is None else new.tolist())
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
    image_pairs: Tensor,
    candidates: int,
) -> MatchScores:
    """Asks the matching head about the best candidates of every image and of every text.

    A pair that is a candidate both ways is asked about once. Where the adapter encodes images
    apart, the image of successive pairs is encoded once.

    Args:
        model: in evaluation mode.
        adapter: its matching head.
        inputs: of all pairs.
        similarity: `[I, T]`, by features.
        image_pairs: `[I]`, the pair that holds each image.
        candidates: how many per query.
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
    device = next(model.parameters()).device
    for part in asked.split(_ROWS):
        rows, columns = part.unbind(1)
        here, of_pair = rows.unique(return_inverse=True)
        images = to_device(inputs.image_batch(image_pairs[here].tolist()), device)
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

    The similarity of candidates is not added to their score, as BLIP's own evaluation does.

    Args:
        similarity: `[I, T]`.
        scores: see `MatchScores`.
        by_image: see `MatchScores`.
        by_text: see `MatchScores`.

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
