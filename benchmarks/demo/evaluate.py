"""Measure a demo model: `python -m benchmarks.demo.evaluate MODEL_DIR [--data DIR/test]`.

Retrieval is recall at 1 in per cent, both ways, among all pairs of the sample: by contrastive
similarity, and with the best candidates put in order by the matching head. Captioning (BLIP)
counts generated captions that name exactly the scene's objects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.demo import captions
from benchmarks.demo.families import caption_tokens, load, match_scores
from benchmarks.demo.processors import Family, normalise, tokenize
from benchmarks.demo.samples import Sample, read_folder, unseen_sample
from benchmarks.demo.scenes import HELD_OUT

BATCH = 100


def _rows(count: int) -> list[slice]:
    return [slice(start, start + BATCH) for start in range(0, count, BATCH)]


def recall_at_1(similarity: Tensor) -> tuple[float, float]:
    """Per cent of images whose own text comes first, and of texts whose own image does.

    Args:
        similarity: float `[n, n]`, images by texts; pairs stand on the diagonal. A tie with a
            wrong partner counts as a miss.
    """
    n = len(similarity)
    own = similarity.diagonal()
    wrong = similarity.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    by_image = (own > wrong.amax(dim=1)).float().mean()
    by_text = (own > wrong.amax(dim=0)).float().mean()
    return 100 * float(by_image), 100 * float(by_text)


def similarities(model: Any, tokenizer: Any, sample: Sample) -> Tensor:
    """Contrastive similarity of every image to every text, float32 `[n, n]`."""
    pixels = normalise(sample.images)
    ids, mask = tokenize(tokenizer, sample.captions)
    rows = _rows(len(sample))
    images = torch.cat([model.get_image_features(pixel_values=pixels[r]) for r in rows])
    texts = torch.cat(
        [model.get_text_features(input_ids=ids[r], attention_mask=mask[r]) for r in rows]
    )
    return images @ texts.T


def rerank(
    similarity: Tensor, candidates: int, score: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Recall at 1 when the matching head orders the best `candidates` of every query.

    Args:
        similarity: float `[n, n]`, images by texts.
        candidates: how many of each query's best to order; the others cannot win.
        score: maps int64 `[m]` image and text numbers to float `[m]` matching scores.
    """
    n = len(similarity)
    query = torch.arange(n).repeat_interleave(candidates)
    figures = []
    for by_image in (True, False):
        best = (similarity if by_image else similarity.T).topk(candidates, dim=1).indices
        pair = (query, best.flatten()) if by_image else (best.flatten(), query)
        scores = torch.cat([score(pair[0][r], pair[1][r]) for r in _rows(len(query))])
        first = best[torch.arange(n), scores.view(n, candidates).argmax(dim=1)]
        figures.append(100 * float((first == torch.arange(n)).float().mean()))
    return figures[0], figures[1]


def right_captions(model: Any, tokenizer: Any, sample: Sample) -> list[bool]:
    """Whether each greedily generated caption names exactly the objects of its scene."""
    pixels = normalise(sample.images)
    said: list[str] = []
    for rows in _rows(len(sample)):
        said += tokenizer.batch_decode(
            caption_tokens(model, pixels[rows]), skip_special_tokens=True
        )
    return [
        captions.is_fully_right(caption, facts)
        for caption, facts in zip(said, sample.facts, strict=True)
    ]


@torch.inference_mode()
def evaluate(
    model: Any, tokenizer: Any, family: Family, sample: Sample, *, candidates: int = 0
) -> dict[str, float]:
    """All figures of one model on one sample, in per cent.

    Args:
        model: a pre-training model of the family, in eval mode afterwards as before.
        tokenizer: the one it was trained with.
        family: `blip` or `xvlm`; captions are for BLIP only.
        sample: captioned scenes.
        candidates: also re-rank that many with the matching head (0: do not).
    """
    training = model.training
    model.eval()
    similarity = similarities(model, tokenizer, sample)
    figures = dict(zip(("r1_i2t", "r1_t2i"), recall_at_1(similarity), strict=True))
    if candidates:
        score = match_scores(model, tokenizer, family, sample)
        both = rerank(similarity, candidates, score)
        figures |= dict(zip(("r1_i2t_reranked", "r1_t2i_reranked"), both, strict=True))
    if family == "blip":
        right = torch.tensor(right_captions(model, tokenizer, sample)).float()
        figures["captions_right"] = 100 * float(right.mean())
        new = torch.tensor([any(fact[:2] in HELD_OUT for fact in facts) for facts in sample.facts])
        if new.any():
            figures["captions_right_new_combinations"] = 100 * float(right[new].mean())
    model.train(training)
    return {name: round(value, 1) for name, value in figures.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="an image folder; default: the 1,000 test pairs")
    parser.add_argument("--rerank", type=int, default=10, help="candidates for the matching head")
    args = parser.parse_args()
    family, model = load(args.model)
    sample = read_folder(args.data) if args.data else unseen_sample()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    print(json.dumps(evaluate(model, tokenizer, family, sample, candidates=args.rerank)))


if __name__ == "__main__":
    main()
