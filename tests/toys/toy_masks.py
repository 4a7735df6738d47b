"""A tiny model family for the tests of masks: a pre-training model with a tie and odd sizes, and a
captioning model of the same family with other paths and a copied weight."""

import torch
from torch import nn

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.adapter import Adapter, Owner, WeightSpec
from vlp_plugins.models.weights import WeightMap


class Pretraining(nn.Module):
    """`encoder.ffn` and `decoder.ffn` share one Parameter."""

    def __init__(self, width=5):
        super().__init__()
        self.vision = nn.ModuleDict({"patch": nn.Conv2d(1, 3, 2), "ffn": nn.Linear(width, 3)})
        self.encoder = nn.ModuleDict({"ffn": nn.Linear(3, 7)})
        self.decoder = nn.ModuleDict({"ffn": nn.Linear(3, 7), "out": nn.Linear(7, 3)})
        self.decoder["ffn"].weight = self.encoder["ffn"].weight
        self.head = nn.Linear(3, 2)


class Captioning(nn.Module):
    """No encoder; `tower` is the vision part, `lm.cross` began as a copy of the encoder's ffn."""

    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleDict({"patch": nn.Conv2d(1, 3, 2), "ffn": nn.Linear(5, 3)})
        self.lm = nn.ModuleDict({"cross": nn.Linear(3, 7), "out": nn.Linear(7, 3)})


class ToyAdapter(Adapter):
    name = "toy"

    def claims(self, model):
        return isinstance(model, Pretraining | Captioning)

    def weights(self, model):
        if isinstance(model, Captioning):
            yield WeightSpec("vision.patch", "vision", 0, (Owner("tower.patch", "vision"),))
            yield WeightSpec("vision.ffn", "vision", 0, (Owner("tower.ffn", "vision"),))
            cross = Owner("lm.cross", "text")
            yield WeightSpec("caption.cross", "text", 0, (cross,), copy_of="text.ffn")
            yield WeightSpec("text.out", "text", 0, (Owner("lm.out", "text"),))
            return
        yield WeightSpec("vision.patch", "vision", 0, (Owner("vision.patch", "vision"),))
        yield WeightSpec("vision.ffn", "vision", 0, (Owner("vision.ffn", "vision"),))
        owners = (Owner("encoder.ffn", "text"), Owner("decoder.ffn", "text"))
        yield WeightSpec("text.ffn", "text", 0, owners)
        yield WeightSpec("text.out", "text", 0, (Owner("decoder.out", "text"),))

    def streams(self, model, batch, *, published=False):
        return iter(())

    def original_name(self, path):
        if path.startswith("vision."):
            return path.replace("vision.", "visual_encoder.", 1)
        return path


ADAPTER = ToyAdapter()


def random_masks(model, *, density=0.4, seed=0, adapter=ADAPTER, **about):
    """Masks for a model, by default a toy, that keep about `density` of every weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = WeightMap.of(model, adapter)
    dense = {
        name: torch.rand(weight.shape, generator=generator) < density
        for name, weight in weights.items()
    }
    return Masks.from_dense(dense, Manifest.for_weights(weights, method="toy", **about))
