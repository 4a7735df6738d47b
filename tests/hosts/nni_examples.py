"""Small models, training loops and evaluators, as a user of NNI writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import nn

from benchmarks.parity.blip import batches_from_golden, model_from_golden

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
QUICK: dict[str, dict[str, Any]] = {
    "chita": {"lambda": 0.1},
    "chita++": {"lambda": 0.1, "rounds": 2},
    "itersnip": {"rounds": 2},
}
"""Parameters with which methods take less time and are the same methods."""


def blip() -> nn.Module:
    """With text towers that share Parameters."""
    return model_from_golden(GOLDEN)


def blip_batches() -> list[dict[str, torch.Tensor]]:
    return batches_from_golden(GOLDEN)[:4]


class Net(nn.Module):
    """Three layers and a pair that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 10)
        self.again = nn.Linear(10, 10)
        self.again.weight = self.second.weight
        self.norm = nn.LayerNorm(10)
        self.last = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.again(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.last(x)


def net() -> Net:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Net()


def net_batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=rng), torch.randint(0, 4, (8,), generator=rng))
        for _ in range(count)
    ]


def training_step(batch: Any, model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Any,
    scheduler: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    for batch in net_batches(max_steps or 4):
        optimizer.zero_grad()
        step(batch, model).backward()
        optimizer.step()


def torch_evaluator(model: nn.Module, parameters: Any = None) -> TorchEvaluator:
    parameters = model.parameters() if parameters is None else parameters
    optimizer = nni.trace(torch.optim.AdamW)(list(parameters), lr=0.05, weight_decay=0.1)
    return TorchEvaluator(training, optimizer, training_step)


def sparsity(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())
