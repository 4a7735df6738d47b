"""Pre-train the small ViT: `python -m benchmarks.papers.downstream.pretrain_vit --out DIR`.

Fresh images for ever, no labels, AdamW, a warm-up and one cosine. Labels of the development split
serve to watch how it goes (a nearest neighbour in the features) and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from transformers import ViTModel

from benchmarks.papers.downstream.classes import SETS
from benchmarks.papers.downstream.splits import scans_of
from benchmarks.papers.downstream.views import unlabelled
from benchmarks.papers.downstream.vit import (
    build_image_processor,
    build_vit,
    features,
    nearest_labels,
    recovery,
    recovery_loss,
)

PEAK_LEARNING_RATE = 1e-3
WARM_UP_STEPS = 50
CLIP_NORM = 1.0


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def watch(model: ViTModel, known: int) -> dict[str, float]:
    """Per cent of development images whose nearest of `known` in training has their label."""
    model.eval()
    found = {}
    for name in ("digits", "coloured"):
        there, asked = SETS[name].draw("train", known), SETS[name].draw("dev", known // 4)
        labels = nearest_labels(model, there.images, there.labels, asked.images)
        right = (labels == asked.labels).float().mean()
        found[f"neighbour_{name}"] = round(100 * float(right), 1)
    model.train()
    return found


def train(
    folder: Path,
    steps: int,
    batch_size: int = 128,
    seed: int = 0,
    *,
    log_steps: int = 100,
    watched: int = 2000,
) -> None:
    """Trains and writes the model folder with its log, `train.jsonl`.

    Args:
        folder: made if missing.
        steps: of the optimizer.
        batch_size: images of a step.
        seed: of weights and images.
        log_steps: steps from one line of the log to the next.
        watched: labelled training images that a line looks at; of the development split it looks
            at a quarter as many.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scans = scans_of("train")  # those of the demo's pre-training
    model, head = build_vit().train(), recovery()
    # transformers' other attention has a very slow bfloat16 backward on CPU
    model.set_attn_implementation("eager")
    both = nn.ModuleList([model, head])
    matrices = [p for p in both.parameters() if p.ndim == 2]
    others = [p for p in both.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as log:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            batch = unlabelled(batch_size, scans, generator)
            with torch.autocast("cpu", torch.bfloat16):
                found = head(features(model, batch.images))
            loss = recovery_loss(found, batch.scans, batch.colours)
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % log_steps == 0 or step + 1 == steps:
                spent = round(time.monotonic() - start, 1)
                record = {"step": step + 1, "seconds": spent, "loss": round(loss.item(), 4)}
                log.write(json.dumps(record | watch(model, watched)) + "\n")
                log.flush()
    model.eval().save_pretrained(folder)
    build_image_processor().save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.steps, args.batch_size, args.seed, log_steps=args.log_steps)


if __name__ == "__main__":
    main()
