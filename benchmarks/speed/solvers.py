"""python -m benchmarks.speed solvers: layer-wise solvers next to the products they cannot avoid.

One layer of random weights per number of inputs, whose inputs are correlated. Both sides of every
ratio are measured in this process, in turns, as CPU time of one thread; the best of the rounds
counts, because other work on the machine only ever adds time.

- SparseGPT over one Cholesky factorisation and the products with what lies left of each block;
- ALPS over one eigendecomposition and two products for each of its steps, as published code has
  them, and over what ours takes: a factorisation for every penalty, two triangular solves a step;
- the Gram matrix over the whole product at the rate of sgemm;
- two forwards of a decoder block with the sums of squares of its inputs, over the two alone;
- SparseGPT's algorithm written in plain torch, over ours.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.results import recorded
from vlp_plugins.calibration.moments import InputGram, sum_of_squares
from vlp_plugins.methods.reconstruction.alps import Alps
from vlp_plugins.methods.reconstruction.layer import Largest, Layer
from vlp_plugins.methods.reconstruction.sparsegpt import BLOCK, DAMPING, SparseGpt

TARGETS = {"sparsegpt": 1.5, "alps": 1.5, "gram": 1.0, "squares": 1.1}
TOKENS = 2048


class Counted:
    """`Largest`, with the number of times that it was asked."""

    def __init__(self, remove: int) -> None:
        self.remove, self.calls, self._rule = remove, 0, Largest(remove)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self._rule.mask(scores)


def layer_of(inputs: int, outputs: int) -> tuple[Layer, torch.Tensor]:
    """A layer, and inputs of it `[tokens, inputs]`: of low rank, noise, a few large columns."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs // 4, inputs, generator=generator) / (inputs // 4) ** 0.5
    scales = torch.randn(inputs, generator=generator).exp()
    scales[:: max(1, inputs // 16)] *= 8
    tokens = max(TOKENS, 2 * inputs)
    values = torch.randn(tokens, inputs // 4, generator=generator) @ mixing
    values = values.add_(torch.randn(tokens, inputs, generator=generator), alpha=0.1).mul_(scales)
    weight = torch.randn(outputs, inputs, generator=generator)
    return Layer(weight, values.T @ values), values[:TOKENS].contiguous()


def plain_sparsegpt(weight: torch.Tensor, gram: torch.Tensor, remove: float) -> torch.Tensor:
    """SparseGPT as its paper has it (Frantar & Alistarh, ICML 2023, Algorithm 1), in torch."""
    weight, gram = weight.clone(), gram.clone()
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        block, inside = weight[:, start : start + BLOCK], factor[start:, start:][:BLOCK, :BLOCK]
        cost = block.square() / inside.diagonal().square()
        threshold = cost.flatten().sort().values[int(cost.numel() * remove)]
        errors, gone = torch.zeros_like(block), cost <= threshold
        for j in range(block.shape[1]):
            column = block[:, j].clone()
            column[gone[:, j]] = 0
            error = (block[:, j] - column) / inside[j, j]
            block[:, j:] -= error[:, None] * inside[j, j:]
            block[:, j] = column
            errors[:, j] = error
        weight[:, start + BLOCK :] -= errors @ factor[start : start + BLOCK, start + BLOCK :]
    return weight


def decoder_block(width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A decoder block of Qwen2 with random weights, and four times as wide a feed-forward part."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    block: nn.Module = Qwen2DecoderLayer(config, 0).eval()
    rotary = Qwen2RotaryEmbedding(config)
    for parameter in block.parameters():
        parameter.requires_grad_(False)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        out = block(hidden, position_embeddings=rotary(hidden, positions))
        return out[0] if isinstance(out, tuple) else out

    return forward


def best_cpu_seconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of every run, the best of the rounds, in turns."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def measure(inputs: int, outputs: int, sparsity: float, rounds: int) -> dict[str, Any]:
    """All figures of one number of inputs."""
    layer, values = layer_of(inputs, outputs)
    scores, rule = layer.weight.abs(), Largest(int(sparsity * layer.weight.numel()))
    counted = Counted(rule.remove)
    Alps().solve(layer, scores, [counted])
    steps = counted.calls - 2  # the first is of the start, the last of the result
    weight, target = layer.weight, layer.weight.clone()
    gram, positive = layer.gram, layer.scaled(DAMPING, dtype=torch.float32).gram
    lower = torch.linalg.cholesky(positive)

    def lefts() -> None:
        for start in range(BLOCK, inputs, BLOCK):
            weight[:, :start] @ gram[:start, start : start + BLOCK]

    runs: dict[str, Callable[[], Any]] = {
        "sparsegpt": lambda: SparseGpt().solve(layer, scores, [rule]),
        "plain": lambda: plain_sparsegpt(weight, gram, sparsity),
        "alps": lambda: Alps().solve(layer, scores, [rule]),
        "cholesky": lambda: torch.linalg.cholesky(positive),
        "lefts": lefts,
        "eigh": lambda: torch.linalg.eigh(positive),
        "product": lambda: weight @ gram,
        "solve": lambda: torch.cholesky_solve(target.T, lower),
        "gram": lambda: InputGram().measure(values),
        "sgemm": lambda: values.T @ values,
    }
    seconds = best_cpu_seconds(runs, rounds)
    refits = Alps().refit_steps + 2
    factorised = -(-steps // 3)
    floors = {
        "sparsegpt": seconds["cholesky"] + seconds["lefts"],
        "alps": seconds["eigh"] + (2 * steps + refits) * seconds["product"],
        "alps_own": factorised * seconds["cholesky"]
        + steps * seconds["solve"]
        + refits * seconds["product"],
        "gram": seconds["sgemm"],
    }
    seconds |= squares(inputs, rounds)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "alps_steps": steps,
        "seconds": seconds,
        "over": {
            "sparsegpt": seconds["sparsegpt"] / floors["sparsegpt"],
            "alps": seconds["alps"] / floors["alps"],
            "alps_own": seconds["alps"] / floors["alps_own"],
            "gram": seconds["gram"] / floors["gram"],
            "squares": 1 + seconds["squares"] / (2 * seconds["forward"]),
            "plain": seconds["plain"] / seconds["sparsegpt"],
        },
    }


@torch.inference_mode()
def squares(width: int, rounds: int) -> dict[str, float]:
    """A forward of a decoder block, and the sums of squares of what enters its seven layers."""
    forward, hidden = decoder_block(width), torch.randn(1, TOKENS // 4, width)
    # Query, key and value read the same, as do gate and up; down reads four times as many.
    read = [torch.randn(TOKENS // 4, each) for each in (width, width, width, 4 * width)]
    runs = {"forward": lambda: forward(hidden), "squares": lambda: [*map(sum_of_squares, read)]}
    return best_cpu_seconds(runs, rounds)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and records; 1 if something is above its target."""
    torch.set_num_threads(1)
    print(f"{'inputs':>6} {'SparseGPT':>10} {'over':>6} {'plain/ours':>10} {'ALPS':>8} {'over':>6} "
          f"{'own floor':>9} {'Gram':>7} {'over':>6} {'squares':>8}")  # fmt: skip
    figures, missed = [], False
    for inputs in options.inputs:
        f = measure(inputs, options.outputs or inputs, options.sparsity, options.rounds)
        figures.append(f)
        s, over = f["seconds"], f["over"]
        above = [name for name, most in TARGETS.items() if over[name] > most]
        missed |= bool(above)
        print(f"{inputs:6,} {s['sparsegpt']:8.3f} s {over['sparsegpt']:6.2f} {over['plain']:10.2f} "
              f"{s['alps']:6.2f} s {over['alps']:6.2f} {over['alps_own']:9.2f} {s['gram']:5.2f} s "
              f"{over['gram']:6.2f} {over['squares']:8.3f}  "
              f"{'ABOVE in ' + ', '.join(above) if above else 'ok'}", flush=True)  # fmt: skip
    for one, other in pairwise(figures):
        wider = other["inputs"] / one["inputs"]
        grown = ", ".join(
            f"{name} ^{math.log(other['seconds'][name] / one['seconds'][name], wider):.2f}"
            for name in ("sparsegpt", "alps", "cholesky", "eigh")
        )
        print(f"from {one['inputs']:,} to {other['inputs']:,} inputs: {grown}")
    print(recorded("solvers-speed", figures, options.out))
    return int(missed)
