"""Train a demo model: `python -m benchmarks.demo.train blip|xvlm --out DIR --minutes 60`.

Fresh scenes for ever, AdamW, one cosine over the given time or steps; see `schedule` for what
changes on the way. Every few minutes the model folder (`from_pretrained` loads it) and a state to
resume from are written; `train.jsonl` in the folder logs losses and validation figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo import captions, schedule
from benchmarks.demo.evaluate import evaluate
from benchmarks.demo.families import build, training_losses
from benchmarks.demo.processors import FAMILIES, Family, build_tokenizer, save_processors
from benchmarks.demo.samples import validation_sample
from benchmarks.demo.scans import load_scans
from benchmarks.demo.scenes import draw
from vlp_plugins.runtime.artifacts import load_pickled

STATE_FILE = "training_state.pt"
CLIP_NORM = 1.0
TEMPERATURE_RANGE = (0.01, 0.5)


@dataclass
class Clock:
    """How far a run has come.

    Attributes:
        minutes: wall-clock length of the run, or None if it is counted in steps.
        steps: length in steps, or None.
        step: steps done.
        seconds: time spent on them, over all resumptions.
    """

    minutes: float | None
    steps: int | None
    step: int = 0
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        """0 at the start, 1 or more when the run is over."""
        by_step = self.step / self.steps if self.steps else 0.0
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_step, by_time)


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, a slower learning rate for the temperature."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    temperature = [p for name, p in trained if name == "temp"]
    matrices = [p for name, p in trained if p.ndim > 1 and "embedding" not in name]
    others = [p for name, p in trained if name != "temp" and (p.ndim <= 1 or "embedding" in name)]
    groups = [
        {"params": matrices, "weight_decay": 0.05, "rate": 1.0},
        {"params": others, "weight_decay": 0.0, "rate": 1.0},
        {"params": temperature, "weight_decay": 0.0, "rate": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=schedule.PEAK_LEARNING_RATE, betas=(0.9, 0.98))


def batches(seed: int, clock: Clock) -> Iterator[tuple[Tensor, list[str]]]:
    """Endless fresh training batches (images uint8, captions), as hard as progress says."""
    scans = load_scans("pretrain")
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    while True:
        scenes = draw(
            schedule.batch_size(clock.progress),
            scans,
            generator,
            single_fraction=schedule.single_fraction(clock.progress),
        )
        yield scenes.images, [captions.write(facts, rng) for facts in scenes.facts()]


def take_step(
    family: Family,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, list[str]],
    clock: Clock,
    low_precision: bool,
) -> dict[str, float]:
    """One step of optimisation; the losses by name."""
    progress = clock.progress
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * schedule.learning_rate(clock.step, progress)
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        matching = schedule.use_matching(clock.step, progress)
        losses = training_losses(family, model, tokenizer, *batch, matching=matching)
    descend(model, optimizer, losses)
    return {name: float(value.detach()) for name, value in losses.items()}


def descend(model: Any, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """A step down the sum of the losses: gradients clipped, the temperature kept in its range."""
    torch.stack(list(losses.values())).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.temp.clamp_(*TEMPERATURE_RANGE)


def save(
    folder: Path, family: Family, model: Any, optimizer: torch.optim.Optimizer, clock: Clock
) -> None:
    """Write the model folder, and the state to resume from (in one move, so never half)."""
    model.save_pretrained(folder)
    save_processors(family, folder)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "clock": asdict(clock),
        "rng": torch.get_rng_state(),
    }
    unfinished = folder / (STATE_FILE + ".new")
    torch.save(state, unfinished)
    unfinished.replace(folder / STATE_FILE)


def resume(folder: Path, model: Any, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Continue where `save` left off; the length of the run may be changed.

    Raises:
        FileNotFoundError: if there is nothing to resume in the folder.
    """
    state = load_pickled(folder / STATE_FILE, ValueError)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    clock.step, clock.seconds = state["clock"]["step"], state["clock"]["seconds"]
    torch.set_rng_state(state["rng"])


def forget_unsaved(log: Path, step: int) -> None:
    """Drop the records of a log that are later than `step`: a resumed run makes them again."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    log.write_text("".join(kept), encoding="utf-8")


def train(family: Family, folder: Path, clock: Clock, args: argparse.Namespace) -> None:
    """Train until the clock is over, logging and saving on the way."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(family)
    model = build(family, tokenizer)
    # transformers' other attention has a very slow bfloat16 backward on CPU
    model.set_attn_implementation("eager")
    model.train()
    optimizer = build_optimizer(model)
    if args.resume:
        resume(folder, model, optimizer, clock)
        forget_unsaved(folder / "train.jsonl", clock.step)
    validation = validation_sample()
    # a resumed run draws new scenes, not the first ones again
    source = batches(args.seed + clock.step, clock)
    folder.mkdir(parents=True, exist_ok=True)
    last_time, last_save = time.monotonic(), clock.seconds
    with (folder / "train.jsonl").open("a", encoding="utf-8") as log:
        while clock.progress < 1:
            low = args.bf16 and schedule.use_low_precision(clock.progress)
            batch = next(source)
            losses = take_step(family, model, tokenizer, optimizer, batch, clock, low)
            clock.step += 1
            now = time.monotonic()
            clock.seconds += now - last_time
            last_time = now
            over = clock.progress >= 1
            due = clock.seconds - last_save > 60 * args.save_minutes
            if clock.step % args.log_steps == 0 or due or over:
                record: dict[str, float] = {
                    "step": clock.step,
                    "seconds": round(clock.seconds, 1),
                    "progress": round(clock.progress, 4),
                    "batch_size": len(batch[1]),
                    "temperature": round(float(model.temp.detach()), 4),
                    **{name: round(value, 4) for name, value in losses.items()},
                }
                if due or over:
                    record |= evaluate(model, tokenizer, family, validation)
                    save(folder, family, model, optimizer, clock)
                    last_save = clock.seconds
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(json.dumps(record), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="faster where the CPU has bfloat16")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--log-steps", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = Clock(minutes=args.minutes, steps=args.steps)
    train(args.family, args.out, clock, args)


if __name__ == "__main__":
    main()
