"""The block-by-block pass, compared with whole forwards: of a dense and of a half pruned model."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import chat_models
import pytest
import torch
from chat_models import qwen_batch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import ToyAdapter, toy_batches, toy_model
from two_processes import run_two_processes

import vlp_plugins as vlp
from vlp_plugins.calibration.block_pass import BlockPass
from vlp_plugins.calibration.block_sums import BlockStatistics, Sums
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.calibration.moments import (
    INPUT_GRAM,
    INPUT_SECOND_MOMENT,
    InputGram,
    InputSecondMoment,
    Site,
)
from vlp_plugins.calibration.paused import HiddenStates, Visit
from vlp_plugins.calibration.selections import (
    Atv,
    BlockCall,
    ImageTokens,
    SelectionState,
    TextTokens,
    TokenSelection,
)
from vlp_plugins.masks.packed import Pruned, pack
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.resolve import resolve_method
from vlp_plugins.models.adapter import Owner, TokenKind
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime import artifacts
from vlp_plugins.runtime.errors import (
    NonFiniteError,
    OutputError,
    StatisticsError,
    UnsupportedError,
)
from vlp_plugins.scoring.allocation import RowAllocation
from vlp_plugins.scoring.score import Evidence
from vlp_plugins.scoring.wanda import Wanda


@pytest.fixture(scope="module")
def qwen() -> nn.Module:
    torch.manual_seed(0)
    return chat_models.qwen().eval()


def block_pass(model: nn.Module, batches: Any, **options: Any) -> BlockPass:
    adapter = options.pop("adapter", None) or registry().adapter_for(model)
    return BlockPass(model, adapter, WeightMap.of(model, adapter), batches, **options)


def measured(walk: BlockPass, **options: Any) -> dict[str, Tensor]:
    """The second moments of a walk that prunes nothing."""
    found: dict[str, Tensor] = {}

    def keep(_: Visit, weights: Any, statistics: BlockStatistics) -> dict[str, Pruned]:
        found.update({name: statistics.mean(INPUT_SECOND_MOMENT, name) for name in weights})
        ones = {
            name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()
        }
        return {name: Pruned(pack(mask)) for name, mask in ones.items()}

    walk.run([InputSecondMoment()], keep, **options)
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_walk_that_prunes_nothing_measures_what_the_dense_model_does() -> None:
    """Also where layers run twice, share a weight, or stand in no list."""
    model, batches = toy_model(), toy_batches(4)
    walk = block_pass(model, batches, adapter=ToyAdapter())
    dense = vlp.gather(model, batches, adapter=ToyAdapter(), method="wanda")
    for name, moment in measured(walk).items():
        torch.testing.assert_close(moment, dense.mean(INPUT_SECOND_MOMENT, name), rtol=1e-6, atol=0)
    assert Visit("feed", 1) in walk.visits
    assert walk.pruned_at(Visit("feed", 0)) == ()
    assert walk.pruned_at(Visit("feed", 1)) == ("text.feed",)
    assert walk.pruned_at(Visit("decoder_out", 0)) == ("text.out_proj",)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_block_is_pruned_by_what_the_pruned_ones_before_it_give(
    qwen: nn.Module, method: str
) -> None:
    """The same by whole forwards of the half pruned model, a pass over the data for each block."""
    batches = [qwen_batch(0), qwen_batch(1, image=False), qwen_batch(2)]
    before = state(qwen)
    prune = partial(vlp.prune, qwen, batches, method=method, sparsity=0.5)
    masks = prune(walk="blocks")
    assert same(qwen, before)
    walk = block_pass(qwen, batches)
    wrong = 0
    for visit in walk.visits:
        expected = prune(walk="model")
        for name in walk.pruned_at(visit):
            wrong += int((expected[name] != masks[name]).sum())
            weight = WeightMap.of(qwen, registry().adapter_for(qwen))[name]
            values = None if masks.new_values is None else masks.new_values[name]
            Pruned(masks.packed[name], values).write(weight.parameter.detach())
    qwen.load_state_dict(before)
    assert wrong == 0


def test_the_model_and_its_configuration_are_as_before(qwen: nn.Module) -> None:
    before, flags = state(qwen), [module.training for module in qwen.modules()]
    cached: Any = qwen
    vlp.prune(qwen, [qwen_batch(0)], method="wanda", sparsity=0.5, walk="blocks")
    assert same(qwen, before)
    assert [module.training for module in qwen.modules()] == flags
    assert not any("forward" in vars(module) for module in qwen.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in qwen.modules())
    assert cached.config.text_config.use_cache


def test_weights_that_read_the_same_inputs_have_one_gram_matrix(qwen: nn.Module) -> None:
    walk = block_pass(qwen, [qwen_batch(seed) for seed in range(3)])
    seen: list[list[str]] = []

    def keep(_: Visit, weights: Any, statistics: BlockStatistics) -> dict[str, Pruned]:
        means = {name: statistics.mean(INPUT_GRAM, name) for name in weights}
        shared: dict[int, list[str]] = {}
        for name, mean in means.items():
            shared.setdefault(id(mean), []).append(name.rsplit(".", 1)[-1])
        seen.append(sorted(",".join(sorted(names)) for names in shared.values()))
        return {n: Pruned(pack(torch.ones(w.shape).bool())) for n, w in weights.items()}

    walk.run([InputGram()], keep)
    assert seen[-1] == ["down_proj", "gate_proj,up_proj", "k_proj,q_proj,v_proj", "o_proj"]
    assert len(seen) == len(walk.visits)


@given(
    parts=st.lists(st.lists(st.tuples(st.sampled_from("qkvo"), st.integers(0, 2))), min_size=1),
    taken=st.sets(st.sampled_from("qkvo")),
)
def test_sums_are_the_same_as_if_each_weight_had_its_own(
    parts: list[list[tuple[str, int]]], taken: set[str]
) -> None:
    """Whichever weights read one tensor, in whatever batch, and whatever is decided first."""
    owner = Owner("layer", TokenKind.TEXT)
    sums = Sums(Fake(), {"gram": torch.float32}, None, skip_nonfinite=False)
    expected: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        values = [torch.tensor([0.1 + number + value / 3]) for value in range(3)]
        sums.probe.found = [
            (("gram", Site(name, "text", 0)), owner, values[value]) for name, value in part
        ]
        sums.take(Fake())
        for name, value in part:
            before = expected.get(name)
            expected[name] = values[value] if before is None else before + values[value]
        if number == len(parts) // 2:
            for total in sums.taken(taken).values():
                total.fill_(7)
            expected = {name: each for name, each in expected.items() if name not in taken}
    found = {key[1].weight: total for key, total in sums.taken("qkvo").items()}
    assert found == expected


def test_a_mean_over_two_sites_is_not_that_of_a_mean() -> None:
    one, two = torch.tensor([3.0]), torch.tensor([5.0])
    key = partial(Site, stream="text")
    statistics = BlockStatistics(
        {("m", key("q", owner=0)): one, ("m", key("k", owner=0)): one,
         ("m", key("k", owner=1)): two, ("m", key("v", owner=0)): two}, samples=4,
    )  # fmt: skip
    for _ in range(2):
        assert [statistics.mean("m", name).item() for name in "qkv"] == [0.75, 2.0, 1.25]


class Fake:
    """A probe, and a forward, as far as sums read them."""

    def __init__(self) -> None:
        self.index = 0
        self.found: list[Any] = []

    def taken(self) -> list[Any]:
        return self.found


class Reverse(nn.Module):
    """A block that changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, states: Tensor) -> Tensor:
        return self.layer(states.mul_(2))


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


def chain_pass(model: nn.Module, **options: Any) -> Any:
    return vlp.prune(
        model, [{"states": torch.ones(2, 4)}, {"states": torch.full((2, 4), 2.0)}],
        method="wanda", adapter="module", sparsity=0.5, walk="blocks", **options,
    )  # fmt: skip


def test_a_block_that_changes_its_input_is_an_error() -> None:
    model = Chain(nn.Linear(4, 4), Reverse())
    before = state(model)
    with pytest.raises(UnsupportedError, match="layers.1 changes its inputs in place"):
        chain_pass(model)
    assert same(model, before)


class Spoil(nn.Module):
    """Infinity from the second batch on."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.where(states.abs().max() > 1.5, torch.inf, states)


def test_a_batch_that_becomes_infinite_is_named_or_left_out() -> None:
    model = Chain(nn.Linear(4, 4), Spoil(), nn.Linear(4, 4))
    nn.init.eye_(model.layers[0].weight)
    nn.init.zeros_(model.layers[0].bias)
    with pytest.raises(NonFiniteError, match=r"layers\.2 .* in batch 1"):
        chain_pass(model)
    assert chain_pass(model, skip_nonfinite=True).removed == 16


class Again(nn.Module):
    """Runs its layer once for each unit of the largest number that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, states: Tensor) -> Tensor:
        for _ in range(int(states.max())):
            states = self.layers[0](states).clamp(0, 1)
        return states


def test_a_block_that_is_called_more_often_than_foreseen_is_an_error() -> None:
    once, twice = {"states": torch.ones(2, 4)}, {"states": torch.full((2, 4), 2.0)}
    prune = partial(
        vlp.prune, Again(), method="wanda", adapter="module", sparsity=0.5, walk="blocks"
    )
    with pytest.raises(UnsupportedError, match=r"batch 1 calls block layers.0 2 times"):
        prune([once, twice])
    assert prune([twice, once]).removed == 8


class Broken(Exception):
    pass


LONG_ALPS = pytest.param("alps", marks=pytest.mark.long)  # `chita` does all that it does


@pytest.mark.parametrize("method", ["wanda", LONG_ALPS, "chita"])
def test_a_walk_is_resumed_behind_its_last_block(
    qwen: nn.Module, tmp_path: Path, method: str
) -> None:
    batches = [qwen_batch(0), qwen_batch(1)]
    prune = partial(vlp.prune, qwen, batches, method=method, sparsity=[0.5, 0.7], walk="blocks")
    whole = prune()
    before = state(qwen)
    for stop in (2, 3):
        left = stop * len(batches)

        def interrupt(done: int, _: int | None, left: int = left) -> None:
            if done == left:
                raise Broken

        with pytest.raises(Broken):
            prune(workplace=tmp_path, resume=stop > 2, progress=interrupt)
        assert same(qwen, before)
    written = len(list(tmp_path.iterdir()))
    assert written == 3
    assert prune(workplace=tmp_path, resume=True) == whole
    with pytest.raises(StatisticsError, match="of another run|the folder that"):
        prune(resume=True)


def test_batches_wait_on_the_disk_beyond_the_budget(
    qwen: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = partial(
        vlp.prune, qwen, [qwen_batch(seed) for seed in range(4)],
        method="wanda", sparsity=0.5, walk="blocks",
    )  # fmt: skip
    away: set[int] = set()
    path = HiddenStates._path

    def noted(store: HiddenStates, index: int) -> Path:
        away.add(index)
        return path(store, index)

    monkeypatch.setattr(HiddenStates, "_path", noted)
    assert prune(memory_budget=3_000, workplace=tmp_path) == prune()
    assert away == {2, 3}
    assert not list(tmp_path.glob("hidden-*"))


def test_a_plan_says_what_a_walk_needs(qwen: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = registry().adapter_for(qwen)
    method = resolve_method("sparsegpt", None, [0.5], {})
    weights = WeightMap.of(qwen, adapter)
    context = Context(
        qwen, adapter, weights, [qwen_batch(0)], targets=[0.5], walk="blocks", limit=8
    )
    assert isinstance(method, Composition)
    in_memory = method.cost(context)
    monkeypatch.setattr(artifacts, "MAPPED", 1)
    cost = method.cost(context)
    layer = [weights[name] for name in weights if name.startswith("language_model.layers.0.")]
    gram = sum(4 * w.rows_and_columns[1] ** 2 + w.numel * 4 for w in layer)
    assert cost.ram_bytes == gram + 8 * method.cost(replace(context, limit=1)).ram_bytes - 8 * gram
    assert cost.disk_bytes == 4 * weights.numel // 2
    assert in_memory.ram_bytes == cost.ram_bytes + cost.disk_bytes
    assert in_memory.disk_bytes == 0
    assert cost.forward_batches == 16
    assert any("6 blocks" in note for note in cost.notes)


@pytest.mark.parametrize("options", [
    {"method": "wanda", "allocation": "owl"},
    {"method": "multiflow", "tokens": "text"},
    {"method": "wanda", "allocation": "das"},
], ids=str)  # fmt: skip
def test_walks_of_what_compares_layers_are_resumed(
    qwen: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    batches = [qwen_batch(0), qwen_batch(1)]
    prune = partial(vlp.prune, qwen, batches, sparsity=0.5, walk="blocks", **options)
    whole = prune(workplace=tmp_path)
    states = sorted(tmp_path.glob("block-*"))
    assert len(states) == 6
    states[-1].unlink()
    with caplog.at_level("INFO", "vlp_plugins.methods"):
        assert prune(workplace=tmp_path, resume=True) == whole
    assert "resuming after 5 blocks" in caplog.text


def test_a_score_that_changes_its_evidence_changes_that_of_no_other_weight(qwen: nn.Module) -> None:
    class InPlace(Wanda):
        name = "in-place"

        def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
            found = super().score(weight, evidence)
            evidence.statistics["input_second_moment"].zero_()
            return found

    prune = partial(vlp.prune, qwen, [qwen_batch(0)], sparsity=0.5, walk="blocks")
    method = Composition("in-place", InPlace(), RowAllocation())
    wanda = prune(method="wanda")
    assert all(torch.equal(mask, wanda[name]) for name, mask in prune(method=method).items())


def test_a_disk_without_room_for_new_values_is_told_before_the_walk(
    qwen: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = partial(
        vlp.prune, qwen, [qwen_batch(0)], method="refit", sparsity=[0.5, 0.75], walk="blocks",
        workplace=tmp_path,
    )  # fmt: skip
    values = 3 * WeightMap.of(qwen, registry().adapter_for(qwen)).numel
    monkeypatch.setattr(artifacts, "MAPPED", values)
    usage = shutil.disk_usage(tmp_path)
    free = values - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(OutputError, match="will take .* and its disk has"):
        prune()
    assert not list(tmp_path.iterdir())
    free = values
    whole = prune()
    last = sorted(tmp_path.glob("block-*"))[-1]
    free = last.stat().st_size  # what is there already is not asked for
    last.unlink()
    assert free < values
    assert prune(resume=True) == whole


def test_a_batch_that_was_left_out_is_left_out_of_a_resumed_walk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    batches = [{"states": torch.rand(2, 4)}, {"states": torch.full((2, 4), 1e25)}]
    prune = partial(
        vlp.prune, model, batches, method="wanda", adapter="module", sparsity=0.5,
        walk="blocks", skip_nonfinite=True, workplace=tmp_path,
    )  # fmt: skip
    whole = prune()
    sorted(tmp_path.glob("block-*"))[-1].unlink()
    assert prune(resume=True) == whole
    assert (
        vlp.prune(model, batches[:1], method="wanda", adapter="module", sparsity=0.5, walk="blocks")
        == whole
    )


LARGEST = 2 * 4 * 7680 + (8 * 2 * 64 * 64 + 8 * 64 * 2**2 + 32 * 64**2)
"""Bytes of two batches' gradients by the largest block of `qwen`, with what its widest layer takes;
smaller blocks go together."""

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {toys!r})
import chat_models
import torch
import vlp_plugins as vlp

torch.set_num_threads({threads})

def kill(done, total):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

vlp.prune(
    chat_models.qwen(), [chat_models.qwen_batch(seed) for seed in (0, 1)], method={method!r},
    sparsity=0.5, walk="blocks", workplace=Path({work!r}), memory_budget={budget}, progress=kill,
)
"""


@pytest.mark.parametrize(
    ("method", "budget"),
    [("chita", LARGEST), pytest.param("alps", 1, marks=pytest.mark.long)],
)
def test_a_walk_that_was_killed_is_resumed_with_the_same_bits(
    tmp_path: Path, method: str, budget: int
) -> None:
    toys = Path(__file__).parents[1] / "toys"
    # Sums of products are the same to the bit for the same number of threads.
    script = KILLED.format(
        toys=str(toys), work=str(tmp_path), method=method, budget=budget,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(list(tmp_path.glob("block-*"))) == 3
    prune = partial(
        vlp.prune, chat_models.qwen(), [qwen_batch(0), qwen_batch(1)],
        method=method, sparsity=0.5, walk="blocks",
    )  # fmt: skip
    assert prune(workplace=tmp_path, resume=True) == prune()


class Words(TokenSelection):
    """The words alone."""

    name = "words"

    class State(SelectionState):
        def __init__(self) -> None:
            self.kinds: dict[int, Tensor] = {}

        def observe(self, call: BlockCall) -> None:
            assert call.inputs.shape == call.outputs.shape
            self.kinds[call.sample] = call.kinds == TokenKind.TEXT

        def selected(self, sample: int, weight: str) -> Tensor:
            return self.kinds[sample]

    def begin(self, *, published: bool = False) -> SelectionState:
        return self.State()


def test_tokens_that_are_not_selected_do_not_count(qwen: nn.Module) -> None:
    """A sum over words: the decoder's first inputs, before they have seen an image, tell."""
    batches = [qwen_batch(0), qwen_batch(1)]
    found = measured(block_pass(qwen, batches), tokens=Words())
    plain = measured(block_pass(qwen, batches))
    inputs: list[Tensor] = []
    layer: Any = qwen.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        qwen(**batch)
    handle.remove()
    words = sum(
        states[batch["input_ids"] != 5].square().sum(0)
        for states, batch in zip(inputs, batches, strict=True)
    )
    name = "language_model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(found[name], words.double() / 2, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain[name], found[name])


class ReadingText(TextTokens):
    reads_outputs = True


@pytest.mark.parametrize(("tokens", "runs"), [
    (TextTokens(), 2), (ImageTokens(), 2), (ReadingText(), 3), (Atv(), 3),
], ids=str)  # fmt: skip
def test_a_block_runs_again_only_for_what_a_selection_reads(
    qwen: nn.Module, tokens: TokenSelection, runs: int
) -> None:
    batches = [qwen_batch(0), qwen_batch(1)]
    calls: list[int] = []
    layer: Any = qwen.get_submodule("model.language_model.layers.1.mlp")
    walk = block_pass(qwen, batches)  # runs a batch, too
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    found = measured(walk, tokens=tokens)
    handle.remove()
    assert len(calls) == runs * len(batches)
    adapter = registry().adapter_for(qwen)
    context = Context(
        qwen, adapter, WeightMap.of(qwen, adapter), batches, targets=[0.5], tokens=tokens, limit=2
    )
    wanda = resolve_method("wanda", None, [0.5], {})
    assert isinstance(wanda, Composition)
    assert wanda.cost(context).forward_batches == runs * len(batches)
    if isinstance(tokens, ReadingText):
        plain = measured(block_pass(qwen, batches), tokens=TextTokens())
        assert all(torch.equal(plain[name], each) for name, each in found.items())


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "gradients": ({"method": "snip", "walk": "blocks"}, "gradients"),
    "procedure": ({"method": "tamt", "walk": "blocks"}, "block by block"),
    "rounds": ({"method": "chita++", "walk": "blocks"}, "block by block"),
    "lambda": ({"method": "chita", "walk": "blocks", "lambda": 0.1}, "of the whole model"),
    "weight": ({"method": "chita", "gradient_weight": 0.5}, "walk='blocks' alone reads"),
    "too much": (
        {"method": "chita", "walk": "blocks", "gradient_weight": 1.0},
        "number from 0 .* below 1",
    ),
    "published": ({"method": "chita", "walk": "blocks", "variant": "published"}, "no published"),
    "budget": (
        {"method": "chita", "walk": "blocks", "memory_budget": 9_000},
        "of 1 batch by the block of weight 'visual.* more, and 8.8 KiB of memory may be used; take",
    ),
    "tokens": ({"method": "wanda", "walk": "model", "tokens": Words()}, "leave walk out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_walk_so_says_it(qwen: nn.Module, case: str) -> None:
    options, message = MISTAKES[case]
    with pytest.raises(UnsupportedError, match=message):
        vlp.prune(qwen, [qwen_batch(0)], sparsity=0.5, **options)


def test_two_processes_make_the_masks_of_one(qwen: nn.Module, tmp_path: Path) -> None:
    run_two_processes(Path(__file__).with_name("walk_in_processes.py"), tmp_path)
    batches = [qwen_batch(seed) for seed in range(5)]
    # Where a search goes, rounding of the sums decides in places: of `alps`, too.
    for method, share in {"wanda": 1e-3, "sparsegpt": 1e-3, "chita": 1e-2}.items():
        one = vlp.prune(qwen, batches, method=method, sparsity=0.5, walk="blocks")
        two = vlp.Masks.load(tmp_path / f"{method}.safetensors")
        different = sum(int((one[name] != two[name]).sum()) for name in one)
        assert different <= share * one.total
    adapter = registry().adapter_for(qwen)
    weights = WeightMap.of(qwen, adapter)
    with LossProbe(qwen, adapter, weights).attached() as probe:
        measured = [dict(probe.measure(each, i) or {}) for i, each in enumerate(batches)]
    parts = [load_file(tmp_path / f"rows-{rank}.safetensors") for rank in (0, 1)]
    assert sorted([*parts[0], *parts[1]]) == sorted(weights)
    for name, rows in (parts[0] | parts[1]).items():
        assert torch.equal(rows, torch.stack([each[name] for each in measured]))


ERRORS = """
import random
from contextlib import nullcontext
import torch
from torch import nn
from vlp_plugins.calibration.paused import ForwardThread, HiddenStates, PausedForward, pausing
from vlp_plugins.models.adapter import Stream

def deep(n, run):
    sorted([0], key=lambda _: (deep(n - 1, run), 0)[1]) if n else run()

def mistaken():
    try:
        torch.zeros(2) + torch.zeros(3)
    except RuntimeError:
        pass

def streams(batch):
    def run():
        for _ in range(6):
            deep(random.randrange(4), lambda: block(batch["states"]))
            deep(random.randrange(4), mistaken)
    yield Stream("all", run)

random.seed(0)
block = nn.Linear(4, 4)
thread = ForwardThread(nullcontext)
forwards, store = [], HiddenStates(None, None)
with pausing(block, "block"):
    for index in range(40):
        batch = {"states": torch.rand(2, 4)}
        deep(random.randrange(12), lambda: forwards.append(
            PausedForward(index, batch, streams, store, thread)))
    while left := [each for each in forwards if not each.dead]:
        forward = random.choice(left)
        deep(random.randrange(12), lambda: forward.proceed(forward.run_block()))
thread.end()
"""


def test_errors_of_torch_within_a_forward_that_has_waited() -> None:
    """They walk the stack of the thread, which must be as it was when the forward started."""
    done = subprocess.run([sys.executable, "-c", ERRORS], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
