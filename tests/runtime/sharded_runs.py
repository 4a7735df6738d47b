"""What two processes do with models under fully_shard; started by test_sharded under torchrun."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import chat_models
import torch
from leaving import leave
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks.parity.family import Family
from vlp_adapters.transformers import TransformersAdapter
from vlp_plugins.methods.composition import Composition
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
    "wanda by blocks": ("words", "wanda", {"walk": "blocks"}),
    "alps by blocks": ("qwen", "alps", {"walk": "blocks"}),
}
LAYERS = {
    "snip-vit": ("ViTLayer",),
    "wanda by blocks": ("Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer"),
    "alps by blocks": ("Qwen2_5_VLDecoderLayer",),
}


class Qwen:
    """A chat model in place of a recorded one."""

    def __init__(self, *images: bool) -> None:
        """Whether each of its batches has an image."""
        self._images = images

    def model(self) -> nn.Module:
        return chat_models.qwen()

    def batches(self) -> list[dict[str, torch.Tensor]]:
        return [chat_models.qwen_batch(n, image=image) for n, image in enumerate(self._images)]


def family_of(kind: str) -> Family | Qwen:
    """A recorded family, or chat: two batches are added in the same order by two processes."""
    chat = {"qwen": Qwen(True, True), "words": Qwen(True, False, True)}
    return chat[kind] if kind in chat else Family(GOLDEN / kind)


def sharded(
    family: Family | Qwen, layers: tuple[str, ...] = (), *, twins: bool = False
) -> nn.Module:
    """The recorded model, its root sharded, and modules of some classes apart from it."""
    model = family.model()
    adapter = registry().adapter_for(model)
    changed = {p for p in adapter.loss_state(model) if isinstance(p, nn.Parameter)}
    scalars = {p for p in model.parameters() if not p.ndim}
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module)
    fully_shard(model, ignored_params=scalars if twins else scalars | changed)
    return model


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that the model holds."""
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def run(folder: Path, name: str) -> None:
    """One method on one model: masks, and the model before, after and under them."""
    kind, method, options = RUNS[name]
    family = family_of(kind)
    model = sharded(family, LAYERS.get(name, ()))
    compare(folder, name, model, family.batches()[:3], method=method, **options)


def compare(folder: Path, name: str, model: nn.Module, batches: list, **options: object) -> None:
    """Masks of a model, which stays as it is, and what it holds under them."""
    before, found = whole_state(model), structure(model)
    masks = prune(model, batches, sparsity=0.75, **options)
    after = whole_state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert structure(model) == found
    masks.apply(model)
    assert not masks.verify(model)
    rank = distributed.get_rank()
    masks.save(folder / f"{name}{rank}.safetensors")
    torch.save(whole_state(model), folder / f"{name}{rank}.pt")


def structure(model: nn.Module) -> list[object]:
    """What a run may replace: parameters, hooks, training flags, methods."""
    found: list[object] = [(id(parameter), type(parameter)) for parameter in model.parameters()]
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found += [hooks, module.training, "forward" in vars(module)]
    return found


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


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def nested(model: nn.Module) -> None:
    """Everything apart, also what is in blocks and what they are in; nothing stays gathered."""
    text = model.model.language_model
    for module in (
        *(layer.mlp for layer in text.layers), *blocks_of(model), text.embed_tokens, text,
        model.model.visual, model.lm_head, model,
    ):  # fmt: skip
        fully_shard(module, reshard_after_forward=True)


def together(model: nn.Module) -> None:
    """Several modules in one call, also of blocks with others."""
    text = model.model.language_model
    fully_shard(list(text.layers))
    fully_shard([model.model.visual.blocks[0], text.norm, model.lm_head])
    fully_shard(model)


def twice(model: nn.Module) -> None:
    """On a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh)


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "root": fully_shard,
    "parts": lambda model: [fully_shard(block) for block in blocks_of(model)[1:3]],
    "nested": nested,
    "together": together,
    "twice": twice,
}
WALKS = {
    "wanda": ("words", {"method": "wanda"}),
    "omp": ("words", {"method": "omp"}),
    "tamp": ("words", {"method": "tamp"}),
    "owl": ("words", {"method": "wanda", "allocation": "owl", "memory_budget": 4000}),
    "text": ("words", {"method": "wanda", "adapter": TransformersAdapter(exclude="visual")}),
    "sparsegpt": ("qwen", {"method": "sparsegpt"}),
    "alps": ("qwen", {"method": "alps"}),
    "chita": ("qwen", {"method": "chita"}),
}


def walks(folder: Path) -> None:
    """Walks over a chat model that is sharded in all ways."""
    for way, shard in WAYS.items():
        for name, (kind, options) in WALKS.items():
            family = family_of(kind)
            model = family.model()
            shard(model)
            options = {"walk": "blocks", **options}
            compare(folder, f"{name} {way} ", model, family.batches(), **options)


def cast() -> nn.Module:
    """A float32 model whose values bfloat16 can hold, run in bfloat16."""
    model = chat_models.qwen()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*blocks_of(model), model):
        fully_shard(module, mp_policy=policy)
    return model


def tensor_parallel() -> nn.Module:
    model = chat_models.qwen()
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    plan["down_proj"] = RowwiseParallel()
    for layer in model.model.language_model.layers:
        parallelize_module(layer.mlp, init_device_mesh("cpu", (2,)), plan)
    return model


def interrupted_walk(folder: Path) -> None:
    """A walk that ends in one process, then is resumed; no block is left gathered meanwhile."""
    family = family_of("words")
    model = sharded(family, LAYERS["wanda by blocks"])
    found, reduced, calls = structure(model), Composition.reduced, []
    parameters = [p for block in blocks_of(model) for p in block.parameters()]

    def broken(self, context, weight, *args):
        calls.append(weight.name)
        if distributed.get_rank() and len(calls) == 8:
            raise UnsupportedError("broken off")
        return reduced(self, context, weight, *args)

    def at_rest(*_: object) -> None:
        now = [p for block in blocks_of(model) for p in block.parameters()]
        assert list(map(id, now)) == list(map(id, parameters))

    prune_by_blocks = {
        "method": "wanda", "sparsity": 0.75, "walk": "blocks", "workplace": folder / "walk",
        "progress": at_rest,
    }  # fmt: skip
    Composition.reduced = broken
    error = error_of(UnsupportedError, model, family.batches(), **prune_by_blocks)
    Composition.reduced = reduced
    assert structure(model) == found
    rank = distributed.get_rank()
    (folder / f"broken{rank}").write_text(error)
    masks = prune(model, family.batches(), resume=True, **prune_by_blocks)
    masks.save(folder / f"walk{rank}.safetensors")


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
    model = sharded(vit, ("ViTLayer",))
    error = error_of(DataError, model, batches, method="wanda", sparsity=0.5, walk="blocks")
    (folder / f"walked{rank}").write_text(error)


def long(folder: Path) -> None:
    walks(folder)
    interrupted_walk(folder)
    rank, batches = distributed.get_rank(), Qwen(*[True] * 5).batches()
    by_blocks = {"method": "wanda", "sparsity": 0.75, "walk": "blocks"}
    prune(cast(), batches, **by_blocks).save(folder / f"cast{rank}.safetensors")
    error = error_of(UnsupportedError, tensor_parallel(), batches, **by_blocks)
    (folder / f"parallel{rank}").write_text(error)
    batches[3]["pixel_values"] *= float("nan")
    model = chat_models.qwen()
    nested(model)
    error = error_of(NonFiniteError, model, batches, **by_blocks)
    (folder / f"nan{rank}").write_text(error)
    masks = prune(model, batches, skip_nonfinite=True, **by_blocks)
    masks.save(folder / f"skipped{rank}.safetensors")
    batch = batches[0] | {"labels": batches[0]["input_ids"]}
    model(**batch).loss.backward()
    trained = {name: whole(each.grad) for name, each in model.named_parameters()}
    torch.save(trained, folder / f"trained{rank}.pt")


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    (long if "long" in sys.argv else main)(Path(sys.argv[1]))
    leave()
