"""What the caller has set for the whole process, or around the call, changes no result."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.loading import load_model
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.sparse import load_sparse, save_sparse
from vlp_plugins.methods.gradual.pruning import GradualPruning
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import gather, measure_id, prune, split_half
from vlp_plugins.structured.check import example_batch
from vlp_plugins.structured.cuts import cut, prepare
from vlp_plugins.structured.files import rebuild, save_structured
from vlp_plugins.structured.record import Kept
from vlp_plugins.structured.survey import blocks_of
from vlp_plugins.tasks.sensitivity.measure import sensitivity

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
QUICK: dict[str, dict[str, Any]] = {
    "chita": {"lambda": 0.1},
    "chita++": {"lambda": 0.1, "rounds": 2},
    "itersnip": {"rounds": 2},
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def tf32_on_gpus() -> Iterator[None]:
    """After which torch's getters of the older switches raise."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "TF32 on GPUs": tf32_on_gpus,
}


@pytest.fixture(scope="module")
def model():
    return model_from_golden(GOLDEN)


@pytest.fixture(scope="module")
def batches():
    """Enough different ones for an intrinsic dimension."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for batch in batches_from_golden(GOLDEN)[:4] * 2:
        ids = torch.randint(5, 40, batch["input_ids"].shape, generator=rng)
        ids[:, 0] = batch["input_ids"][:, 0]
        pixels = torch.randn(batch["pixel_values"].shape, generator=rng)
        found.append({**batch, "input_ids": ids, "pixel_values": pixels})
    return found


def state_of(model: nn.Module) -> list[tuple[str, list[float]]]:
    return [(name, value.double().tolist()) for name, value in model.state_dict().items()]


def check(run: Callable[[], Any], expected: Any = None) -> None:
    """`run` gives the same in every state; nothing of the state is lost."""
    expected = run() if expected is None else expected
    for name, state in STATES.items():
        with state():
            before = (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
            device = torch.empty(1).device
            found = run()
            assert found == expected, name
            assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == before, name
            assert torch.empty(1).device == device, name


@pytest.mark.parametrize("method", registry().method_names())
def test_masks_of_every_method(model, batches, method):
    options = {"method": method, "sparsity": 0.75, **QUICK.get(method, {})}
    check(lambda: prune(model, batches[:3], **options))


@pytest.mark.parametrize("method", registry().method_names())
def test_masks_of_a_model_whose_own_dtype_is_the_default(method):
    """Its forward runs with the default dtype that the caller has set."""
    rng = torch.Generator().manual_seed(0)
    wide = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 8)).double()
    for parameter in wide.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    rows = [torch.randn(7, 6, generator=rng, dtype=torch.float64) for _ in range(3)]
    adapter = ModuleAdapter(wide, loss=lambda model, batch: model(batch).square().mean())
    options = {"method": method, "sparsity": 0.5, "adapter": adapter, **QUICK.get(method, {})}
    plain = prune(wide, rows, **options)
    sums = [v.tolist() for v in gather(wide, rows, method="wanda", adapter=adapter).sums.values()]

    with default_dtype(torch.float64):
        assert prune(wide, rows, **options) == plain
        found = gather(wide, rows, method="wanda", adapter=adapter).sums.values()
        assert [value.tolist() for value in found] == sums


@pytest.mark.parametrize("name", ["snip", "multiflow"])
def test_autocast_that_is_asked_for_is_opened(model, batches, name):
    check(lambda: prune(model, batches[:3], method=name, sparsity=0.75, autocast="bfloat16"))


def test_statistics_dimensions_and_what_is_made_of_them(model, batches, tmp_path):
    statistics = gather(model, batches)
    statistics.save(tmp_path / "statistics.safetensors")
    profile = measure_id(model, batches)
    profile.save(tmp_path / "dimensions.json")

    def masks_from_files():
        return [
            prune(model, statistics=tmp_path / "statistics.safetensors", sparsity=0.5, **options)
            for options in (
                {"allocation": "id", "id_profile": tmp_path / "dimensions.json"},
                {"method": "id*multiflow", "id_profile": tmp_path / "dimensions.json"},
            )
        ]

    def halves():
        read = Statistics.load(tmp_path / "statistics.safetensors")
        return {k: astuple(v) for k, v in split_half(model, read, sparsity=0.5).items()}

    def sums():
        found = gather(model, batches)
        return [(key, value.tolist()) for key, value in found.sums.items()]

    check(sums)
    check(masks_from_files)
    check(halves)
    check(lambda: measure_id(model, batches).layers, profile.layers)


def test_sensitivity(model, batches):
    options = {"groups": ["modality"], "sparsity": [0.5]}
    check(lambda: repr(sensitivity(model, batches[:2], **options)))


def test_masks_on_a_model(model, batches, tmp_path):
    masks = prune(model, batches[:3], method="chita", sparsity=0.5, **QUICK["chita"])
    masks.save(tmp_path / "masks.safetensors")

    def applied():
        pruned = copy.deepcopy(model)
        read = Masks.load(tmp_path / "masks.safetensors")
        assert read == masks
        read.apply(pruned)
        assert not read.verify(pruned)
        return state_of(pruned)

    def locked():
        pruned = copy.deepcopy(model)
        masks.apply(pruned)
        optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
        lock = SparsityLock(pruned, masks).attach(optimizer)
        for parameter in pruned.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        lock.check()
        return state_of(pruned)

    check(applied)
    check(locked)


@pytest.mark.parametrize("score", ["magnitude", "taylor", "platon"])
def test_gradual_pruning(model, score):
    def run():
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        options = {"sparsity": 0.75, "steps": 8, "every": 2, "warmup": (1, 2)}
        pruning = GradualPruning(trained, score=score, **options).attach(optimizer)
        rng = torch.Generator().manual_seed(0)
        drawing = {"generator": rng, "device": "cpu", "dtype": torch.float32}
        for step in range(8):
            for parameter in trained.parameters():
                parameter.grad = torch.randn(parameter.shape, **drawing)
            optimizer.step()
            if step == 4:
                state = {name: value.clone() for name, value in pruning.state_dict().items()}
                pruning.load_state_dict(state)
        pruning.check()
        return pruning.masks()

    check(run)


def test_models_that_are_made_anew(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    masks = prune(model, method="omp", sparsity=0.5)
    sparse = copy.deepcopy(model)
    masks.apply(sparse)
    save_sparse(sparse, tmp_path / "sparse")
    smaller = copy.deepcopy(model)
    adapter = registry().adapter_for(smaller)
    prepare(smaller, adapter)
    block = next(block for block in blocks_of(smaller, adapter) if not hasattr(block, "heads"))
    record = {block.name: Kept(units=tuple(range(block.width // 2)))}

    def cut_alike():
        again = copy.deepcopy(model)
        prepare(again, adapter)
        cut(again, adapter, record)
        return state_of(again)

    check(cut_alike)
    cut(smaller, adapter, record)
    save_structured(smaller, tmp_path / "smaller", record, adapter=adapter)
    check(lambda: state_of(load_model(str(tmp_path / "dense"), device="cpu")[0]))
    check(lambda: state_of(load_sparse(tmp_path / "sparse")[0]))
    check(lambda: state_of(rebuild(tmp_path / "smaller")[0]))
    check(lambda: {n: v.tolist() for n, v in example_batch(model, adapter).items()})


def test_a_forward_pass_may_rely_on_the_defaults_that_the_model_was_made_under():
    class Shifted(nn.Module):
        """As models of scripts that set float64 for everything."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x @ torch.eye(6))

    rng = torch.Generator().manual_seed(0)
    with default_dtype(torch.float64):
        made = Shifted()
        masks = prune(
            made,
            [torch.randn(8, 6, generator=rng) for _ in range(2)],
            method="wanda",
            sparsity=0.5,
            adapter=ModuleAdapter(made),
        )
    assert masks.removed == 12


def test_structured_pruning_by_torch_pruning(model, batches):
    host = pytest.importorskip("vlp_plugins.hosts.torch_pruning", reason="the host is an extra")

    def run():
        smaller = copy.deepcopy(model)
        host.prune_structured(smaller, batches[:2], importance="multiflow")
        return state_of(smaller)

    check(run)


def test_an_importance_in_a_pruner_of_torch_pruning(model, batches):
    host = pytest.importorskip("vlp_plugins.hosts.torch_pruning", reason="the host is an extra")
    examples = importlib.import_module("torch_pruning_examples")
    smaller = copy.deepcopy(model)
    adapter = registry().adapter_for(smaller)
    prepare(smaller, adapter)
    importance = host.Importance("multiflow", smaller, batches[:2], adapter=adapter)
    with examples.stock_pruner(smaller, adapter, importance) as pruner:
        groups = list(pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers))[:3]
        check(lambda: [None if v is None else v.tolist() for v in map(importance, groups)])


def test_a_pruner_of_nni(model, batches):
    pytest.importorskip("nni", reason="the host is an extra")
    host = importlib.import_module("vlp_plugins.hosts.nni")
    everything = [{"op_types": ["Linear"], "sparse_ratio": 0.75}]

    def run():
        pruner = host.pruner_class("multiflow")(
            copy.deepcopy(model), everything, batches=batches[:2]
        )
        pruner.compress()
        return host.masks_of(pruner)

    check(run)
