"""The small ViT of Table 6: the images that prune it, and its objective with a head found again.

Data-driven methods see images of pre-training, never those of a downstream set. Mask training
descends on the objective of pre-training, which a linear head reads off the features; that head
was thrown away with pre-training, and least squares on the dense model's features find it again.
A ViT of one's own has an objective that nobody knows here, and learns to do what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.papers.downstream.splits import scans_of
from benchmarks.papers.downstream.views import unlabelled
from benchmarks.papers.downstream.vit import SCAN, normalise, recovery_loss
from vlp_plugins.models.adapter import Adapter, Batch, Negatives, need
from vlp_plugins.models.restricted import DelegatingAdapter

RIDGE = 1e-3
"""Of the head, in mean squares of the features: enough to keep the equations well-posed."""
_DRAWN = 128  # images at a time: fewer images are then the first ones of more


def images(count: int, batch_size: int, seed: int) -> list[Batch]:
    """Pre-training images with what they were made from; the last batch may be smaller.

    Args:
        count: how many; fewer are the first ones of more.
        batch_size: images of a batch.
        seed: another one draws other images.

    Returns:
        Batches of `pixel_values` `[B, 3, 32, 32]`, `scans` `[B, 8, 8]`, `colours` `[B, 3]`.
    """
    scans, generator = scans_of("train"), torch.Generator().manual_seed(seed)
    drawn = [unlabelled(_DRAWN, scans, generator) for _ in range(-(-count // _DRAWN))]
    whole = {
        "pixel_values": normalise(torch.cat([part.images for part in drawn])),
        "scans": torch.cat([part.scans for part in drawn]),
        "colours": torch.cat([part.colours for part in drawn]),
    }
    return [
        {key: value[start : min(start + batch_size, count)] for key, value in whole.items()}
        for start in range(0, count, batch_size)
    ]


class RecoveryAdapter(DelegatingAdapter):
    """The adapter of a ViT with the loss of its pre-training; all else is as it was.

    Attributes:
        head: reads scan and colour off the features; it is not trained.
    """

    def __init__(self, adapter: Adapter, head: nn.Linear) -> None:
        """Goes by the name of `adapter`, so masks are those of the plain ViT."""
        super().__init__(adapter)
        self.head = head.requires_grad_(requires_grad=False)

    @classmethod
    def fitted(
        cls, adapter: Adapter, model: nn.Module, batches: Sequence[Batch]
    ) -> RecoveryAdapter:
        """With the head that fits a model as it is now.

        Args:
            adapter: of the model.
            model: in evaluation mode, not pruned.
            batches: see `images`.
        """
        with torch.no_grad():
            found = torch.cat([class_states(model, batch) for batch in batches])
        return cls(adapter, fitted_head(found, torch.cat([_wanted(batch) for batch in batches])))

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """The mean squared error of scans and colours, `recovery`."""
        scans, colours = need(batch, "scans", "colours")
        return {"recovery": recovery_loss(self.head(class_states(model, batch)), scans, colours)}


class MatchingAdapter(DelegatingAdapter):
    """The adapter of a ViT with the loss of giving out other than the dense model.

    The distillation of mask training (Liu et al., "Learning to Win Lottery Tickets in BERT Transfer
    via Task-Agnostic Mask Training", NAACL 2022), on the states of the last layer.

    Attributes:
        dense: what the model was.
    """

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        """Keeps a copy of the model as it is now."""
        super().__init__(adapter)
        self.dense = deepcopy(model).requires_grad_(requires_grad=False).eval()

    def losses(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        negatives: Negatives | None = None,
        published: bool = False,
    ) -> dict[str, Tensor]:
        """The mean squared difference of the last states over that of the dense ones, `matching`.

        It is 0 for the dense model and 1 for one whose states are the mean of the batch's.
        """
        (pixels,) = need(batch, "pixel_values")
        with torch.no_grad():
            wanted = self.dense(pixel_values=pixels).last_hidden_state
        found = model(pixel_values=pixels).last_hidden_state
        apart = (found - wanted).square().mean()
        return {"matching": apart / (wanted - wanted.mean(0)).square().mean()}


def class_states(model: nn.Module, batch: Batch) -> Tensor:
    """States of the class token, `[B, width]`."""
    (pixels,) = need(batch, "pixel_values")
    states: Tensor = model(pixel_values=pixels).last_hidden_state
    return states[:, 0]


def fitted_head(found: Tensor, wanted: Tensor, ridge: float = RIDGE) -> nn.Linear:
    """The linear layer with the least squared error; the bias is not shrunk.

    Args:
        found: features, `[n, d]`.
        wanted: targets, `[n, k]`.
        ridge: penalty of squared weights, in mean squares of the features.
    """
    x, y = found.double(), wanted.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    products = x.T @ x
    shrink = ridge * products.diagonal().mean()
    weight = torch.linalg.solve(
        products + shrink * torch.eye(len(products), dtype=x.dtype), x.T @ (y - y_mean)
    ).T
    head = nn.Linear(x.shape[1], y.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(y_mean - weight @ x_mean)
    return head


def _wanted(batch: Batch) -> Tensor:
    """Targets as `recovery_loss` orders them, `[B, 67]`."""
    scans, colours = need(batch, "scans", "colours")
    return torch.cat([scans.reshape(-1, SCAN * SCAN), colours], dim=1)
