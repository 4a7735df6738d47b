"""Measure a demo model: `python -m benchmarks.demo.evaluate MODEL_DIR [--data DIR/test]`.

Retrieval is recall at 1 in per cent, both ways, among all pairs of the sample: by contrastive
similarity, and with the best candidates put in order by the matching head. Captioning (BLIP)
counts generated captions that name exactly the scene's objects.

Of the chat model: captions, and answers to one question of each kind about every scene, beside
the answers to the same questions about another scene's image, which need no eyes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.demo import captions, chat
from benchmarks.demo.conversations import BRIEFLY, CAPTION_PROMPTS, KINDS, Turn, ask
from benchmarks.demo.families import caption_tokens, load, match_scores, model_type
from benchmarks.demo.processors import Family, normalise, tokenize
from benchmarks.demo.samples import Sample, read_folder, unseen_sample
from benchmarks.demo.scenes import CHAT_OBJECTS, HELD_OUT, PAIRS

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
    return list(map(captions.is_fully_right, said, sample.facts))


def _percent(right: list[bool]) -> float:
    return 100 * sum(right) / len(right)


def _caption_figures(right: list[bool], sample: Sample) -> dict[str, float]:
    """Of all captions, and of scenes that show a combination that training never showed."""
    figures = {"captions_right": _percent(right)}
    new = [
        good
        for good, facts in zip(right, sample.facts, strict=True)
        if any(fact[:2] in HELD_OUT for fact in facts)
    ]
    if new:
        figures["captions_right_new_combinations"] = _percent(new)
    return figures


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
        figures |= _caption_figures(right_captions(model, tokenizer, sample), sample)
    model.train(training)
    return {name: round(value, 1) for name, value in figures.items()}


@torch.inference_mode()
def evaluate_chat(model: Any, tokenizer: Any, sample: Sample) -> dict[str, float]:
    """All figures of the chat model on one sample: answers and captions in per cent, and losses.

    `..._other_image` are answers to the same questions about the next scene's image: what can be
    guessed from the question. `..._new_combinations` are about objects whose colour and digit
    training never showed together.

    Args:
        model: the chat model, in eval mode afterwards as before.
        tokenizer: the one it was trained with.
        sample: captioned scenes.
    """
    training = model.training
    model.eval()
    rng = np.random.default_rng(0)
    prompts = [CAPTION_PROMPTS[0]] * len(sample)
    said = chat.reply(model, tokenizer, sample.images, prompts, longest=chat.CAPTION_TOKENS)
    figures = _caption_figures(list(map(captions.is_fully_right, said, sample.facts)), sample)
    right: dict[str, list[bool]] = {"answers": [], "other_image": [], "new_combinations": []}
    answer_losses = []
    for kind in KINDS:
        asked = [ask(kind, sorted(facts), rng) for facts in sample.facts]
        texts = [question.text + BRIEFLY for question in asked]
        seen, guessed = (
            [
                question.is_right(answer)
                for question, answer in zip(
                    asked,
                    chat.reply(model, tokenizer, images, texts, longest=chat.ANSWER_TOKENS),
                    strict=True,
                )
            ]
            for images in (sample.images, sample.images.roll(1, 0))
        )
        figures[f"{kind}_right"] = _percent(seen)
        right["answers"] += seen
        right["other_image"] += guessed
        right["new_combinations"] += [
            good
            for good, question in zip(seen, asked, strict=True)
            if question.fact is not None and question.fact[:2] in HELD_OUT
        ]
        turns = [
            Turn(text, question.answers[rng.integers(len(question.answers))])
            for text, question in zip(texts, asked, strict=True)
        ]
        answer_losses.append(_mean_loss(model, tokenizer, sample, turns))
    figures["answers_right"] = _percent(right["answers"])
    figures["answers_right_other_image"] = _percent(right["other_image"])
    if right["new_combinations"]:
        figures["answers_right_new_combinations"] = _percent(right["new_combinations"])
    model.train(training)
    described = list(map(Turn, prompts, sample.captions))
    return {name: round(value, 1) for name, value in figures.items()} | {
        "answer_loss": round(sum(answer_losses) / len(answer_losses), 4),
        "caption_loss": round(_mean_loss(model, tokenizer, sample, described), 4),
    }


def _mean_loss(model: Any, tokenizer: Any, sample: Sample, turns: list[Turn]) -> float:
    """Cross-entropy of one answer about every scene, averaged over batches."""
    losses = []
    for rows in _rows(len(sample)):
        seen = chat.look(model, sample.images[rows])
        losses.append(chat.answer_loss(model, tokenizer, seen, [[turn] for turn in turns[rows]]))
    return float(torch.stack(losses).mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="an image folder; default: 1,000 unseen scenes")
    parser.add_argument("--rerank", type=int, default=10, help="candidates for the matching head")
    args = parser.parse_args()
    is_chat = model_type(args.model) == "llava"
    objects = CHAT_OBJECTS if is_chat else PAIRS
    sample = read_folder(args.data) if args.data else unseen_sample(objects=objects)
    if is_chat:
        print(json.dumps(evaluate_chat(*chat.load(args.model), sample)))
        return
    family, model = load(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    print(json.dumps(evaluate(model, tokenizer, family, sample, candidates=args.rerank)))


if __name__ == "__main__":
    main()
