"""What training made of the chat model: `python -m benchmarks.demo.trained MODEL_DIR --seed 0`.

Prints how far the weights of every part are from those they were drawn with, and the outlier
channels of every layer's output: channels whose root mean square over tokens is several times that
of the median channel.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo import chat
from benchmarks.demo.conversations import CAPTION_PROMPTS, Turn
from benchmarks.demo.courses import ChatCourse
from benchmarks.demo.processors import normalise
from benchmarks.demo.samples import Sample, calibration_sample
from benchmarks.demo.scenes import CHAT_OBJECTS

OUTLIER = 5.0


def initial_cosines(trained: nn.Module, initial: nn.Module) -> dict[str, float]:
    """Cosine of a model's matrices with those of another of its kind, by part of the model."""
    fresh = dict(initial.named_parameters())
    before: dict[str, list[Tensor]] = {}
    after: dict[str, list[Tensor]] = {}
    for name, parameter in trained.named_parameters():
        if parameter.ndim > 1:
            part = name.split(".")[1]
            before.setdefault(part, []).append(fresh[name].detach().flatten())
            after.setdefault(part, []).append(parameter.detach().flatten())
    return {
        part: float(torch.cosine_similarity(torch.cat(before[part]), torch.cat(after[part]), dim=0))
        for part in before
    }


@torch.inference_mode()
def outlier_channels(model: Any, tokenizer: Any, sample: Sample) -> dict[str, list[list[float]]]:
    """Of each layer's output, by tower: channels above `OUTLIER` medians, and the largest ratio."""
    turns = [[Turn(CAPTION_PROMPTS[0], caption)] for caption in sample.captions]
    ids, mask, _ = chat.encode(tokenizer, turns)
    pixels = normalise(sample.images)
    output = model(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, output_hidden_states=True
    )
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    read = [hidden[mask.bool()] for hidden in output.hidden_states]
    return {
        "vision": [_outliers(hidden.flatten(0, 1)) for hidden in seen[1:]],
        "text": [_outliers(hidden) for hidden in read[1:]],
    }


def _outliers(tokens: Tensor) -> list[float]:
    """Number of outlier channels of `[tokens, channels]`, and largest ratio to the median."""
    size = tokens.pow(2).mean(dim=0).sqrt()
    ratio = size / size.median()
    return [int((ratio > OUTLIER).sum()), round(float(ratio.max()), 1)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    initial = ChatCourse().model
    model, tokenizer = chat.load(args.model)
    found = {
        "cosine_with_initial_weights": {
            part: round(cosine, 3) for part, cosine in initial_cosines(model, initial).items()
        },
        "outlier_channels_and_largest_ratio": outlier_channels(
            model, tokenizer, calibration_sample(100, CHAT_OBJECTS)
        ),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
