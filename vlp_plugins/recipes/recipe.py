"""What a recipe says: the values of one run of `vlp prune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlp_plugins.models.request import Target

LAMBDA = "lambda"
"""The parameter that has a key and an option of its own; `Recipe.parameters` holds it."""


@dataclass(frozen=True)
class DataRecipe:
    """Where batches come from.

    Attributes:
        source: folder, tar shards, or dataset; see `open_source`.
        split: None takes the only one, or `train`.
        batch_size: pairs in a batch.
        batches: how many to read; None reads all.
        seed: mixes the pairs; None keeps their order.
        image_column: None finds it.
        caption_column: None finds it.
        max_length: most tokens of a caption; None asks the tokenizer.
    """

    source: str | None = None
    split: str | None = None
    batch_size: int = 32
    batches: int | None = None
    seed: int | None = None
    image_column: str | None = None
    caption_column: str | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One run of `vlp prune`.

    Attributes:
        model: path or hub id.
        adapter: name; None asks all.
        processor: path or hub id; None takes the model's.
        method: registered name, or `id*` and one.
        parameters: of the method.
        sparsity: targets; one mask set each. Empty with a pattern.
        allocation: `global`, `modality`, `layer`, `row`, `id`, or a pattern such as `keep=2,of=4`;
            None takes the method's own.
        floor: least fraction that every tensor keeps.
        owners: `all` or `first`: whose inputs count for a tied weight; None: by the variant.
        variant: `default` or `published`.
        data: where batches come from.
        statistics: file of an earlier pass, used instead of data.
        id_profile: file with the model's intrinsic dimensions, for `id*NAME` and the allocation
            `id`; None measures them from the data.
        out: folder to make.
        seed: for scores that draw random numbers.
        save_model: also write the pruned checkpoints.
        checkpoint_every: batches between two checkpoints of the data pass.
        memory_budget: how much gradients of many batches may take, `8GiB`; None: what is free.
        autocast: `bfloat16` or `float16` for forward passes of the loss; None runs in `dtype`.
        skip_nonfinite: leave out batches whose loss or gradients are not finite.
        keep_statistics: write statistics that are larger than 1 GB, too.
        dtype: of the model.
        device: None takes a GPU if there is one.
    """

    model: str | None = None
    adapter: str | None = None
    processor: str | None = None
    method: str = "multiflow"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sparsity: tuple[Target, ...] = ()
    allocation: str | None = None
    floor: float = 0.0
    owners: str | None = None
    variant: str = "default"
    data: DataRecipe = field(default_factory=DataRecipe)
    statistics: str | None = None
    id_profile: str | None = None
    out: str | None = None
    seed: int = 0
    save_model: bool = False
    checkpoint_every: int = 50
    memory_budget: str | None = None
    autocast: str | None = None
    skip_nonfinite: bool = False
    keep_statistics: bool = False
    dtype: str = "float32"
    device: str | None = None
