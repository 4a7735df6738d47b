"""A vision-language model in small, with everything that makes a data pass difficult.

Two towers; query, key and value that read one tensor; two cross-attention layers whose keys and
values read the image; a layer that runs twice in one stream; an encoder and a decoder that share
a Parameter; a convolution.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlp_plugins.calibration.moments import InputSecondMoment
from vlp_plugins.models.adapter import Adapter, Batch, Owner, Stream, WeightSpec, need

WIDTH, FEED = 6, 10


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, states: Tensor, context: Tensor | None = None) -> Tensor:
        context = states if context is None else context
        mixed = F.scaled_dot_product_attention(self.q(states), self.k(context), self.v(context))
        return states + self.out(mixed)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.vision = Attention()
        self.words = nn.Embedding(20, WIDTH)
        self.text = Attention()
        self.cross = nn.ModuleList([Attention(), Attention()])
        self.feed = nn.Linear(WIDTH, WIDTH)
        self.encoder_out = nn.Linear(WIDTH, FEED)
        self.decoder_out = nn.Linear(WIDTH, FEED)
        self.decoder_out.weight = self.encoder_out.weight
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(FEED, 2)

    def see(self, pixels: Tensor) -> Tensor:
        return self.vision(self.patch(pixels).flatten(2).transpose(1, 2))

    def read(self, ids: Tensor, image: Tensor) -> Tensor:
        states = self.text(self.words(ids))
        for layer in self.cross:
            states = layer(states, image)
        states = states + self.feed(states)
        states = self.drop(states + self.feed(states))
        return self.encoder_out(states)

    def write(self, ids: Tensor) -> Tensor:
        return self.decoder_out(self.words(ids))


class ToyAdapter(Adapter):
    name = "toy"

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, Toy)

    def weights(self, model: nn.Module) -> Iterator[WeightSpec]:
        yield WeightSpec("vision.patch", "vision", 0, (Owner("patch", "pixels"),))
        for part in ("q", "k", "v", "out"):
            yield WeightSpec(f"vision.{part}", "vision", 1, (Owner(f"vision.{part}", "image"),))
        for part in ("q", "k", "v", "out"):
            yield WeightSpec(f"text.{part}", "text", 0, (Owner(f"text.{part}", "text"),))
        for layer in (0, 1):
            for part in ("q", "k", "v", "out"):
                tokens = "image" if part in "kv" else "text"
                owner = Owner(f"cross.{layer}.{part}", tokens)
                yield WeightSpec(f"cross.{layer}.{part}", "text", layer, (owner,))
        yield WeightSpec("text.feed", "text", 2, (Owner("feed", "text"),))
        owners = (Owner("encoder_out", "text"), Owner("decoder_out", "text"))
        yield WeightSpec("text.out_proj", "text", 3, owners)

    def streams(
        self, model: nn.Module, batch: Batch, *, published: bool = False
    ) -> Iterator[Stream]:
        assert isinstance(model, Toy)
        pixels, ids, mask = need(batch, "pixel_values", "input_ids", "attention_mask")
        real = {"text": mask.bool(), "image": None, "pixels": None}
        shared: dict[str, Tensor] = {}

        def see() -> None:
            shared["image"] = model.see(pixels)

        yield Stream("vision", see, {"image": None, "pixels": None})
        yield Stream("text", lambda: model.read(ids, shared["image"]), real)
        yield Stream("decoder", lambda: model.write(ids), real)


class Counting(InputSecondMoment):
    """Counts how often it measures, and how many tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def measure(self, inputs: Tensor) -> Tensor:
        self.tokens.append(len(inputs))
        return super().measure(inputs)


def toy_model() -> Toy:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Toy()


def toy_batches(count: int, size: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of `size` images of 4 tokens and texts of 2 to 5 real tokens out of 5."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        lengths = torch.randint(2, 6, (size, 1), generator=rng)
        batches.append(
            {
                "pixel_values": torch.rand(size, 3, 8, 8, generator=rng),
                "input_ids": torch.randint(1, 20, (size, 5), generator=rng),
                "attention_mask": (torch.arange(5) < lengths).long(),
            }
        )
    return batches
