"""What two processes do with models under fully_shard; started by test_sharded under torchrun."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from leaving import leave
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from benchmarks.parity.family import Family
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import DataError, NonFiniteError, UnsupportedError
from vlp_plugins.runtime.sharding import whole

GOLDEN = Path(__file__).parents[1] / "golden"
CHITA = {"lambda_": 0.01, "block_size": 500}
RUNS = {
    "omp": ("vit", "omp", {}),
    "lamp": ("vit", "lamp", {}),
    "multiflow": ("vit", "multiflow", {}),
    "snip-vit": ("vit", "snip", {}),
    "snip-xvlm": ("xvlm", "snip", {}),
    "snip-blip": ("blip", "snip", {}),
    "chita-vit": ("vit", "chita", {"block_size": 500, "lambda_": "auto", "held_out": 1}),
    "chita-passes": ("vit", "chita", {**CHITA, "keep_in": "passes", "memory_budget": "60KiB"}),
    "chita-xvlm": ("xvlm", "chita", CHITA),
    "chita-blip": ("blip", "chita", CHITA),
    "chita++": ("blip", "chita++", {**CHITA, "rounds": 2, "rows": 2}),
    "itersnip": ("vit", "itersnip", {"rounds": 2}),
}


def sharded(family: Family, layers: str = "", *, twins: bool = False) -> nn.Module:
    """The recorded model, its root sharded, and modules of one class apart from it."""
    model = family.model()
    adapter = registry().adapter_for(model)
    changed = {p for p in adapter.loss_state(model) if isinstance(p, nn.Parameter)}
    scalars = {p for p in model.parameters() if not p.ndim}
    for module in model.modules():
        if type(module).__name__ == layers:
            fully_shard(module)
    fully_shard(model, ignored_params=scalars if twins else scalars | changed)
    return model


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that the model holds."""
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def run(folder: Path, name: str) -> None:
    """One method on one model: masks, and the model before, after and under them."""
    kind, method, options = RUNS[name]
    family = Family(GOLDEN / kind)
    model = sharded(family, "ViTLayer" if name == "snip-vit" else "")
    before = whole_state(model)
    masks = prune(model, family.batches()[:3], method=method, sparsity=0.75, **options)
    after = whole_state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    masks.apply(model)
    assert not masks.verify(model)
    rank = distributed.get_rank()
    masks.save(folder / f"{name}{rank}.safetensors")
    torch.save(whole_state(model), folder / f"{name}{rank}.pt")


def error_of(kind: type[Exception], *args, **options) -> str:
    try:
        prune(*args, **options)
    except kind as error:
        return str(error)
    return "no error"


def as_found(family: Family) -> str:
    """What a run changes beside the weights, of a model that the user has run and trained."""
    model, batch = sharded(family), family.batches()[0]
    model(pixel_values=batch["pixel_values"]).logits.sum().backward()
    with torch.no_grad():
        model(pixel_values=batch["pixel_values"])  # leaves the root's parameters gathered
    parameters = list(WeightMap.of(model, registry().adapter_for(model)).values())
    frozen = parameters[0].parameter.requires_grad_(False)
    gradients = [weight.parameter.grad.full_tensor().clone() for weight in parameters]
    prune(model, [batch], method="snip", sparsity=0.5)
    kept = [w.parameter.grad.full_tensor() for w in parameters]
    same = all(torch.equal(one, two) for one, two in zip(gradients, kept, strict=True))
    return f"{same} {frozen.requires_grad} {parameters[1].parameter.requires_grad}"


def resumed(family: Family, folder: Path) -> None:
    """A pass that is stopped, at different batches, and goes on."""

    def broken(count: int):
        yield from family.batches()[:count]
        raise KeyboardInterrupt

    file = folder / "pass.ckpt"
    with contextlib.suppress(KeyboardInterrupt):
        prune(sharded(family), broken(2), method="snip", sparsity=0.75, checkpoint=file)
    distributed.barrier()
    masks = prune(
        sharded(family), family.batches()[:3], method="snip", sparsity=0.75,
        checkpoint=file, resume=True,
    )  # fmt: skip
    masks.save(folder / f"resumed{distributed.get_rank()}.safetensors")


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name in RUNS:
        # Threads that gathered weights each in their own order would never meet.
        torch.set_num_threads(2 if name in ("omp", "lamp") else 1)
        run(folder, name)
    vit = Family(GOLDEN / "vit")
    resumed(vit, folder)
    (folder / f"found{rank}").write_text(as_found(vit))
    blip = Family(GOLDEN / "blip")
    error = error_of(
        UnsupportedError, sharded(blip, twins=True), blip.batches()[:1], method="snip", sparsity=0.5
    )
    (folder / f"twins{rank}").write_text(error)
    batches = vit.batches()[:2]
    batches[1] = {**batches[1], "pixel_values": batches[1]["pixel_values"] * float("nan")}
    error = error_of(NonFiniteError, sharded(vit), batches, method="snip", sparsity=0.5)
    (folder / f"nan{rank}").write_text(error)
    masks = prune(sharded(vit), batches, method="chita", sparsity=0.5, skip_nonfinite=True, **CHITA)
    masks.save(folder / f"skipped{rank}.safetensors")
    batches = vit.batches()[rank : rank + 2]
    error = error_of(DataError, sharded(vit), batches, method="snip", sparsity=0.5)
    (folder / f"data{rank}").write_text(error)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
