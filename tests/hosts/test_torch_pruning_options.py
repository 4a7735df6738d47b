"""What Torch-Pruning is told about a model, how much goes, and layers that share Parameters."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch_pruning_examples import golden, named, stock_pruner, values_of

from vlp_plugins.hosts.torch_pruning.importance import Importance
from vlp_plugins.hosts.torch_pruning.options import forward_of, pruner_options, shared_modules
from vlp_plugins.hosts.torch_pruning.plan import least, plan_of, removed_after
from vlp_plugins.hosts.torch_pruning.recorder import Recorder
from vlp_plugins.hosts.torch_pruning.structured import prune_structured
from vlp_plugins.models.parts import Attention
from vlp_plugins.runtime.errors import NonFiniteError, SparsityError, UnsupportedError
from vlp_plugins.structured.check import example_batch
from vlp_plugins.structured.cuts import patch
from vlp_plugins.structured.survey import blocks_of


@given(
    size=st.integers(1, 200),
    ratio=st.floats(0, 0.99),
    steps=st.integers(1, 6),
    round_to=st.none() | st.integers(1, 16),
)
def test_counts_grow_to_the_exact_one(
    size: int, ratio: float, steps: int, round_to: int | None
) -> None:
    counts = [removed_after(size, ratio, t, steps, round_to) for t in range(steps + 1)]

    assert counts[0] == 0
    assert counts == sorted(counts)
    left = size - counts[-1]
    assert left >= 1
    if round_to is None:
        assert counts[-1] == int(ratio * size)
    else:
        assert left == size or left % round_to == 0
        assert left < size - int(ratio * size) + round_to


@given(st.data())
def test_the_least_of_all_vectors_go_and_each_keeps_its_floor(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    few = st.integers(0, 3)  # many are equal
    vectors = [
        torch.tensor(data.draw(st.lists(few, min_size=n, max_size=n)), dtype=torch.float)
        for n in sizes
    ]
    remove = data.draw(st.integers(0, sum(sizes) - len(sizes)))

    counts = least(vectors, remove)

    assert sum(counts) == remove
    assert all(count < size for count, size in zip(counts, sizes, strict=True))
    gone = [v.sort().values[:c] for v, c in zip(vectors, counts, strict=True)]
    left = [v.sort().values[c:] for v, c in zip(vectors, counts, strict=True)]
    for i, mine in enumerate(gone):
        for j, others in enumerate(left):
            if i != j and len(mine) and len(others) > 1:
                assert mine[-1] <= others[0]


def test_more_than_there_is_and_what_is_not_finite_cannot_go() -> None:
    with pytest.raises(SparsityError, match="cannot be removed"):
        least([torch.ones(4), torch.ones(4)], 7)
    with pytest.raises(SparsityError, match="ask for at most 0.99$"):  # 999 of 1000 are 1.00
        least([torch.ones(1000)], 1000)
    with pytest.raises(NonFiniteError, match="1 of 2"):
        least([torch.tensor([1.0, torch.nan])], 1)


@pytest.mark.parametrize("cut", [("heads", "ffn"), ("dims", "ffn")])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("steps", [1, 3])
def test_torch_prunings_own_pruner_removes_exact_counts(cut: Any, ratio: float, steps: int) -> None:
    model, adapter = golden()
    dense = blocks_of(model, adapter)
    importance = Importance("omp", model, adapter=adapter)

    with stock_pruner(model, adapter, importance, cut=cut, ratio=ratio, steps=steps) as pruner:
        recorder = Recorder(pruner.DG, model, adapter)
        for _ in range(steps):
            pruner.step()
    patch(model, adapter, recorder.heads())

    now = {block.name: block for block in blocks_of(model, adapter)}
    for block in dense:
        left = now[block.name]
        if not isinstance(block, Attention):
            assert left.width == block.width - int(ratio * block.width)
        elif "heads" in cut:
            assert left.heads == block.heads - int(ratio * block.heads)
            assert left.head_dim == block.head_dim
        else:
            assert left.heads == block.heads
            assert left.head_dim == block.head_dim - int(ratio * block.head_dim)


def test_blocks_ranked_together_by_torch_pruning_are_those_of_ours() -> None:
    model, adapter = golden()
    ours, _ = golden()
    options: Any = {"ratio": 0.5, "scope": "block kind", "cut": "ffn"}
    importance = Importance("omp", model, adapter=adapter)
    with stock_pruner(model, adapter, importance, **options) as pruner:
        recorder = Recorder(pruner.DG, model, adapter)
        pruner.step()

    assert recorder.record() == prune_structured(ours, importance="omp", **options).record


def test_what_only_our_pruner_can_do_is_told() -> None:
    model, adapter = golden()
    with shared_modules(model):
        with pytest.raises(UnsupportedError, match="prune_structured"):
            pruner_options(adapter, model, scope="block kind", ratio={"vision": 0.25, "text": 0.5})
        with pytest.raises(UnsupportedError, match="prune_structured"):
            pruner_options(adapter, model, scope="block kind", cut="dims", round_to=2)


def test_options_are_new_each_time_and_know_the_model() -> None:
    model, adapter = golden()
    with shared_modules(model):
        first, second = (pruner_options(adapter, model) for _ in range(2))
        tp.pruner.BasePruner(model, importance=tp.importance.GroupMagnitudeImportance(), **first)
    query = model.get_submodule("text_encoder.encoder.layer.0.crossattention.self.query")

    assert second["num_heads"][query] == 4
    assert second["in_channel_groups"] == {} == second["out_channel_groups"]
    keys = list(second["pruning_ratio_dict"])
    assert sorted(map(len, keys)) == [2, 2, 6, 18]  # modality x kind: fc1, and q, k, v of each
    ignored = {id(layer) for layer in second["ignored_layers"]}
    output = model.get_submodule("text_encoder.encoder.layer.0.output.dense")
    assert id(output) in ignored
    assert id(query) not in ignored
    assert id(model.itm_head) in ignored


def test_tied_layers_must_be_shared_first() -> None:
    model, adapter = golden()

    with pytest.raises(UnsupportedError, match="shared_modules"):
        pruner_options(adapter, model)


def test_shared_modules_are_one_inside_and_two_again_afterwards() -> None:
    model, _ = golden()
    before = values_of(model)
    encoder = "text_encoder.encoder.layer.0.output"
    decoder = "text_decoder.bert.encoder.layer.0.output"
    one, two = model.get_submodule(f"{encoder}.dense"), model.get_submodule(f"{decoder}.dense")

    with shared_modules(model):
        assert model.get_submodule(f"{decoder}.dense") is one
        tp.prune_linear_in_channels(one, [0, 5])

    assert model.get_submodule(f"{decoder}.dense") is two
    assert two.weight is one.weight
    assert two.bias is one.bias
    assert two.in_features == one.in_features == 62
    assert list(model.state_dict()) == list(before)


def test_shared_modules_come_back_after_an_error() -> None:
    model, _ = golden()
    two = model.get_submodule("text_decoder.bert.encoder.layer.0.output.dense")

    with pytest.raises(KeyError), shared_modules(model):
        raise KeyError

    assert model.get_submodule("text_decoder.bert.encoder.layer.0.output.dense") is two


def test_a_frozen_tower_is_traced_and_stays_frozen() -> None:
    model, adapter = golden()
    model.vision_model.requires_grad_(False)

    found = forward_of(adapter)(model, example_batch(model, adapter))

    assert len(found) == 3
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    result = prune_structured(model, importance="omp")
    assert result.removed["vision", "ffn"] == (96, 192)
    assert named(model, adapter, "vision.0.mlp").width == 48


def test_a_model_without_blocks_says_where_the_reasons_are() -> None:
    with pytest.raises(UnsupportedError, match="uncut"):
        plan_of([])
    with pytest.raises(UnsupportedError, match="no blocks"):
        prune_structured(nn.Sequential(nn.Linear(4, 4)), importance="omp", adapter="module")


def test_without_torch_pruning_the_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "try:\n    import vlp_plugins.hosts.torch_pruning\n"
        "except ImportError as error:\n    print(error)\n"
    )

    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )

    assert 'pip install "vlp-plugins[torch-pruning]"' in told.stdout
