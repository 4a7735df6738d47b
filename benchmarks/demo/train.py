"""Train a demo model: `python -m benchmarks.demo.train blip|xvlm|chat --out DIR --minutes 60`.

Fresh scenes for ever, AdamW, one cosine over the given time or steps; see `courses` for what is
learned and `schedule` for what changes on the way. Every few minutes the model folder
(`from_pretrained` loads it) and a state to resume from are written; `train.jsonl` in the folder
logs losses and validation figures.

`torchrun --nproc_per_node 2 -m benchmarks.demo.train chat ...` trains in two processes, each on its
half of every batch: on a busy machine faster than two threads, which wait for each other more.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from benchmarks.demo import schedule
from benchmarks.demo.courses import COURSES, Course, CourseName, course_of
from benchmarks.demo.schedule import Clock
from vlp_plugins.runtime.artifacts import load_pickled

STATE_FILE = "training_state.pt"
CLIP_NORM = 1.0
TEMPERATURE_RANGE = (0.01, 0.5)


def build_optimizer(
    model: torch.nn.Module, *, decay: float = 0.05, embeddings: bool = False
) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, a slower learning rate for the temperature.

    Args:
        model: to be trained.
        decay: weight decay.
        embeddings: whether embeddings (of patches, too) count as matrices.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    temperature = [p for name, p in trained if name == "temp"]
    matrices = [p for name, p in trained if p.ndim > 1 and (embeddings or "embedding" not in name)]
    chosen = {id(p) for p in (*temperature, *matrices)}
    groups = [
        {"params": matrices, "weight_decay": decay, "rate": 1.0},
        {
            "params": [p for _, p in trained if id(p) not in chosen],
            "weight_decay": 0.0,
            "rate": 1.0,
        },
        {"params": temperature, "weight_decay": 0.0, "rate": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=schedule.PEAK_LEARNING_RATE, betas=(0.9, 0.98))


def take_step(
    course: Course,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    clock: Clock,
    low_precision: bool,
) -> dict[str, float]:
    """One step of optimisation; the losses by name."""
    for group in optimizer.param_groups:
        rate = schedule.learning_rate(clock.step, clock.progress, course.peak)
        group["lr"] = group["rate"] * rate
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        losses = course.losses(batch, clock)
    descend(course.model, optimizer, losses)
    return {name: float(value.detach()) for name, value in losses.items()}


def descend(model: Any, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """A step down the sum of the losses: gradients clipped, a temperature kept in its range."""
    torch.stack(list(losses.values())).sum().backward()
    if distributed.is_initialized():
        _average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        if hasattr(model, "temp"):
            model.temp.clamp_(*TEMPERATURE_RANGE)


def _average_gradients(model: Any) -> None:
    """Over all processes, in one exchange."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= distributed.get_world_size()
    for gradient, part in zip(
        gradients, together.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def agree_on_time(clock: Clock) -> None:
    """The first process's clock is everyone's, and with it the schedule."""
    seconds = torch.tensor([clock.seconds], dtype=torch.float64)
    distributed.broadcast(seconds, src=0)
    clock.seconds = float(seconds)


def save(folder: Path, course: Course, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Write the model folder, and the state to resume from (in one move, so never half)."""
    course.model.save_pretrained(folder)
    course.save_processors(folder)
    state = {
        "model": course.model.state_dict(),
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


def train(name: CourseName, folder: Path, clock: Clock, args: argparse.Namespace) -> None:
    """Train until the clock is over, logging and saving on the way."""
    rank, processes = 0, 1
    if distributed.is_initialized():
        rank, processes = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(args.seed)
    course = course_of(name)
    model = course.model
    # transformers' other attention has a very slow bfloat16 backward on CPU
    model.set_attn_implementation("eager")
    model.train()
    optimizer = build_optimizer(model, decay=course.decay, embeddings=course.decay_embeddings)
    if args.resume:
        resume(folder, model, optimizer, clock)
        if rank == 0:
            forget_unsaved(folder / "train.jsonl", clock.step)
    # a resumed run draws new scenes, not the first ones again, and each process others
    source = course.batches(args.seed + clock.step + 1_000_000 * rank, clock, processes)
    folder.mkdir(parents=True, exist_ok=True)
    last_time, last_save, last_look = time.monotonic(), clock.seconds, clock.seconds
    log_file = folder / "train.jsonl" if rank == 0 else Path(os.devnull)
    with log_file.open("a", encoding="utf-8") as log:
        while clock.progress < 1:
            low = args.bf16 and schedule.use_low_precision(clock.progress)
            batch = next(source)
            losses = take_step(course, optimizer, batch, clock, low)
            clock.step += 1
            now = time.monotonic()
            clock.seconds += now - last_time
            last_time = now
            if processes > 1:
                agree_on_time(clock)
            over = clock.progress >= 1
            due = clock.seconds - last_save > 60 * args.save_minutes
            if rank == 0 and (clock.step % args.log_steps == 0 or due or over):
                record: dict[str, float] = {
                    "step": clock.step,
                    "seconds": round(clock.seconds, 1),
                    "progress": round(clock.progress, 4),
                    "batch_size": len(batch[0]) * processes,
                    **_temperature(model),
                    **{name: round(value, 4) for name, value in losses.items()},
                }
                if over or clock.seconds - last_look > 60 * args.evaluate_minutes:
                    record |= course.evaluate()
                    last_look = clock.seconds
                if due or over:
                    save(folder, course, optimizer, clock)
                    last_save = clock.seconds
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(json.dumps(record), flush=True)


def _temperature(model: Any) -> dict[str, float]:
    """That of the contrastive loss, if there is one."""
    return {"temperature": round(float(model.temp.detach()), 4)} if hasattr(model, "temp") else {}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=COURSES)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="faster where the CPU has bfloat16")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--evaluate-minutes", type=float, default=10.0)
    parser.add_argument("--log-steps", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # as torchrun sets it
        distributed.init_process_group("gloo")
    clock = Clock(minutes=args.minutes, steps=args.steps)
    train(args.model, args.out, clock, args)


if __name__ == "__main__":
    main()
