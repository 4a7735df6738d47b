"""Models as users have them: wrapped, used by several threads, with torch's own fast paths."""

from __future__ import annotations

import inspect
import threading
import time
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import chat_models
import pytest
import torch
from equal_values import same
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import vlp_plugins
from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.sparse import load_sparse, save_sparse
from vlp_plugins.methods.gradual.pruning import GradualPruning
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, measure_id, prune, split_half
from vlp_plugins.structured.check import outputs
from vlp_plugins.structured.cuts import cut, masked, prepare
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of
from vlp_plugins.tasks.finetuning.finetune import finetune
from vlp_plugins.tasks.finetuning.settings import FinetuneSettings
from vlp_plugins.tasks.retrieval import retrieval
from vlp_plugins.tasks.sensitivity.measure import sensitivity

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
ROOMS = [
    "tasks.retrieval",
    "tasks.captioning",
    "tasks.vqa",
    "tasks.classification",
    "tasks.finetuning.finetune",
    "tasks.sensitivity.measure",
    "structured",
    "models.saving",
    "models.inspection",
]
# called by those above, with a model out of its wrapper
INNER = {"match_scores", "missing_points", "generate", "generates"}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batches() -> list[Any]:
    return list(batches_from_golden(GOLDEN)[:2])


@pytest.fixture(scope="module", params=["compile", "data parallel", "distributed", "both"])
def wrap(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a training library does with a model."""
    if request.param in ("compile", "data parallel"):
        yield torch.compile if request.param == "compile" else nn.DataParallel
        return
    rendezvous = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", f"file://{rendezvous}", rank=0, world_size=1)
    yield {
        "distributed": DistributedDataParallel,
        "both": lambda model: torch.compile(DistributedDataParallel(model)),
    }[request.param]
    distributed.destroy_process_group()


def many(batches: list[Any]) -> list[Any]:
    """Batches like these, of 24 samples that are all different."""
    rng = torch.Generator().manual_seed(0)
    pixels = batches[0]["pixel_values"]
    return [
        {
            "pixel_values": torch.randn(12, *pixels.shape[1:], generator=rng),
            "input_ids": torch.randint(5, 30, (12, 8), generator=rng),
            "attention_mask": torch.ones(12, 8, dtype=torch.int64),
        }
        for _ in batches
    ]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    found = WeightMap.of(model, registry().adapter("blip"))
    return {name: weight.parameter.detach().clone() for name, weight in found.items()}


def gradual(model: nn.Module, batches: list[Any], bare: nn.Module) -> Any:
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.01)
    pruning = GradualPruning(model, sparsity=0.5, steps=8, warmup=(1, 2), every=2)
    pruning.attach(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        for name, parameter in bare.named_parameters():
            parameter.grad = torch.full_like(parameter, len(name) / 100)
        optimizer.step()
    pruning.check()
    return pruning.masks()


def locked(model: nn.Module, batches: list[Any], bare: nn.Module) -> Any:
    masks = prune(model, method="omp", sparsity=0.5)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.01)
    masks.apply(model)
    with SparsityLock(model, masks).attach(optimizer) as lock:
        optimizer.step()
        lock.check()
    masks.verify(model)
    return values_of(bare)


def structured(model: nn.Module, batches: list[Any], bare: nn.Module) -> Any:
    adapter = registry().adapter_for(model)
    prepare(model, adapter)
    first = next(b for b in blocks_of(model, adapter) if b.name.endswith("ffn"))
    record = Record({first.name: Kept(units=tuple(range(2)))})
    with masked(model, adapter, record):
        expected = outputs(model, adapter, batches[0])
    cut(model, adapter, record)
    return expected, outputs(bare, adapter, batches[0])


def cut_by_torch_pruning(model: nn.Module, batches: list[Any], bare: nn.Module) -> Any:
    pytest.importorskip("torch_pruning")
    from vlp_plugins.hosts.torch_pruning.structured import prune_structured

    result = prune_structured(model, importance="magnitude")
    return result.record, values_of(bare)


def through_files(model: nn.Module, batches: list[Any], bare: nn.Module, folder: Path) -> Any:
    prune(bare, method="omp", sparsity=0.5).apply(model)
    save_sparse(model, folder / "sparse")
    load_sparse(folder / "sparse", into=model)
    vlp_plugins.models.saving.write_model(model, folder / "dense")
    return load_file(folder / "dense" / "model.safetensors")


def finetuned(model: nn.Module, batches: list[Any], bare: nn.Module) -> Any:
    adapter = registry().adapter_for(model)
    masks = prune(model, method="omp", sparsity=0.5)
    finetune(model, adapter, batches, task="pretraining", masks=masks,
             settings=FinetuneSettings(steps=2))  # fmt: skip
    return values_of(bare)


def of_any_module(model: nn.Module, batches: list[Any], bare: nn.Module) -> Any:
    adapter = ModuleAdapter(model, modalities={"vision": "vision"})
    return prune(model, adapter=adapter, method="omp", sparsity=0.5)


ENTRIES: dict[str, Any] = {
    "prune": lambda model, data, _: prune(model, data, sparsity=0.5),
    "by name": lambda model, data, _: prune(model=model, batches=data, sparsity=0.5),
    "procedure": lambda m, d, _: prune(m, d, method="itersnip", sparsity=0.5, rounds=2),
    "gather": lambda model, data, _: gather(model, data).sums,
    "split_half": lambda model, data, _: split_half(model, gather(model, data), sparsity=0.5),
    "measure_id": lambda model, data, _: measure_id(model, many(data)).layers,
    "inspect": lambda model, _, bare: (
        inspect_model(model, registry().adapter_for(model)).groups,
        inspect_model(model, registry().adapter_for(model)).model,
    ),
    "retrieval": lambda m, d, _: retrieval(m, registry().adapter_for(m), d).final,
    "sensitivity": lambda m, d, _: sensitivity(m, d, groups=["modality"], sparsity=[0.5]).curves,
    "apply, lock and verify": locked,
    "GradualPruning": gradual,
    "structured": structured,
    "prune_structured": cut_by_torch_pruning,
    "finetune": finetuned,
    "ModuleAdapter": of_any_module,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrapped_model_is_taken_for_what_is_in_it(
    entry: str, wrap: Any, dense: nn.Module, batches: list[Any]
) -> None:
    plain, inner = deepcopy(dense), deepcopy(dense)

    expected = ENTRIES[entry](plain, batches, plain)
    found = ENTRIES[entry](wrap(inner), batches, inner)

    assert same(found, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules())


def test_a_wrapped_model_is_saved_as_what_is_in_it(
    wrap: Any, dense: nn.Module, tmp_path: Path
) -> None:
    plain, inner = deepcopy(dense), deepcopy(dense)

    expected = through_files(plain, [], plain, tmp_path / "plain")
    found = through_files(wrap(inner), [], inner, tmp_path / "wrapped")

    assert same(found, expected)


def with_adapters(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))


def check_chat_model(wrap: Any, photos: Path, folder: Path) -> None:
    """A chat model in a wrapper gives what it gives by itself."""
    chat_models.save_llava(folder)

    def results(model: Any) -> list[Any]:
        data = vlp_plugins.batches(photos, model, batch_size=4, count=1)
        return [
            *(prune(model, data, method=method, sparsity=0.5) for method in ("multiflow", "snip")),
            dict(vlp_plugins.evaluate(model, photos, task="loss", limit=2)),
        ]

    plain, inner = (vlp_plugins.load(folder, device="cpu") for _ in range(2))
    assert same(results(wrap(inner)), results(plain))


def test_a_wrapped_chat_model_is_taken_for_what_is_in_it(
    wrap: Any, photos: Path, tmp_path: Path
) -> None:
    check_chat_model(wrap, photos, tmp_path)


def test_of_a_chat_model_with_lora_the_base_weights_are_pruned(
    photos: Path, tmp_path: Path
) -> None:
    check_chat_model(with_adapters, photos, tmp_path)


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_function_of_a_model_unwraps_it(room: str) -> None:
    module = import_module(f"vlp_plugins.{room}".rstrip("."))
    public = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    functions = [f for f in (getattr(module, name) for name in public) if inspect.isfunction(f)]
    functions = [f for f in functions if f.__name__ not in INNER]
    taking = [f for f in functions if "model" in inspect.signature(f).parameters]
    assert taking
    assert [f.__name__ for f in taking if not hasattr(f, "__wrapped__")] == []


class Slow(nn.Module):
    """So slow that two threads meet in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.01)
        hidden: Tensor = self.first(images).relu()
        time.sleep(0.01)
        logits: Tensor = self.second(hidden)
        return logits


def test_threads_take_turns_with_a_model() -> None:
    torch.manual_seed(0)
    model = Slow()
    data = [(torch.randn(5, 6), torch.arange(5) % 4) for _ in range(5)]
    cross_entropy = nn.functional.cross_entropy
    adapter = ModuleAdapter(model, loss=lambda m, b: cross_entropy(m(b[0]), b[1]))
    works = {
        "snip": lambda: prune(model, data, adapter=adapter, method="snip", sparsity=0.5),
        "multiflow": lambda: prune(model, data, adapter=adapter, sparsity=0.5),
        "itersnip": lambda: prune(
            nn.DataParallel(model), data, adapter=adapter, method="itersnip", sparsity=0.5, rounds=2
        ),
        "gather": lambda: gather(model, data, adapter=adapter).sums,
        "measure_id": lambda: measure_id(model, data, adapter=adapter).layers,
        "outputs": lambda: outputs(model, adapter, data[0]),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = {name: work() for name, work in works.items()}
    found: dict[str, Any] = {}

    threads = [
        threading.Thread(target=lambda n=name: found.update({n: works[n]()})) for name in works
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert same(found, {name: expected[name] for name in found})
    assert found.keys() == works.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert same(model.state_dict(), before)


def test_one_thread_may_nest_what_it_does_with_a_model() -> None:
    model = Slow()
    data = [(torch.randn(5, 6), torch.arange(5) % 4)]
    nested = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nested.append(prune(model, adapter=ModuleAdapter(model), method="omp", sparsity=0.5))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    prune(model, data, adapter=ModuleAdapter(model, loss=loss), method="snip", sparsity=0.5)

    assert len(nested) == 1


class TextEncoder(nn.Module):
    """torch's own encoder; with a padding mask its fast path packs real tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(tokens, src_key_padding_mask=attention_mask == 0)
        logits: Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize("exclude", [(), "encoder"])
def test_padding_in_torch_s_own_encoder_gives_what_its_layers_give(exclude: Any) -> None:
    torch.manual_seed(0)
    model = TextEncoder()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).repeat(4, 1)
    data = [{"tokens": torch.randn(12, 5, 8), "attention_mask": mask} for _ in range(2)]
    adapter = ModuleAdapter(
        model,
        exclude=exclude,
        tokens={"": "attention_mask"},
        loss=lambda model, batch: model(**batch).square().mean(),
    )

    def measured() -> Any:
        return (
            prune(model, data, adapter=adapter, sparsity=0.5),
            prune(model, data, adapter=adapter, method="snip", sparsity=0.5),
            gather(model, data, adapter=adapter).sums,
            measure_id(model, data, adapter=adapter).layers,
        )

    fast = measured()
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slow = measured()
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)

    assert same(fast, slow)


class Counting(nn.Module):
    """Whose forward updates a buffer, and depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("average", torch.zeros(6))

    def forward(self, images: Tensor) -> Tensor:
        self.average.mul_(0.5).add_(images.mean(0))
        logits: Tensor = self.second(self.first(images - self.average).relu())
        return logits


@pytest.mark.parametrize("method", ["multiflow", "snip", "itersnip"])
def test_a_forward_that_updates_a_buffer_leaves_it_as_it_was(method: str) -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    batches = [(torch.randn(4, 6), torch.randint(4, (4,))) for _ in range(3)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    adapter = ModuleAdapter(model, loss=loss)
    parameters = {"rounds": 2} if method == "itersnip" else {}
    once, again = (
        prune(model, batches, method=method, sparsity=0.5, adapter=adapter, **parameters)
        for _ in range(2)
    )

    assert once == again
    assert not model.average.any()
