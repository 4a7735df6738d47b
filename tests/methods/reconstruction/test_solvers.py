"""Layer-wise solvers: exact counts, errors, and what the published ones gave."""

import gc
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from drawn_layers import drawn_layer
from safetensors.torch import load_file

from benchmarks.parity.layers import compare_layers, held_out
from benchmarks.speed.solvers import plain_sparsegpt
from vlp_plugins.methods.reconstruction import layer as layers
from vlp_plugins.methods.reconstruction.alps import Alps, AlpsPlus
from vlp_plugins.methods.reconstruction.layer import Largest, Layer, Refit, cholesky
from vlp_plugins.methods.reconstruction.sparsegpt import SparseGpt
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.scoring.selection import RowSelection

GOLDEN = Path(__file__).parents[2] / "golden"
PROBLEMS = load_file(GOLDEN / "lvlm" / "layers" / "problems.safetensors")
SOLVERS = {solver.name: solver for solver in (SparseGpt(), Alps(), AlpsPlus(), Refit())}


def solved(name, layer, selection):
    return SOLVERS[name].solve(layer, layer.weight.abs(), [selection])[0]


def test_recorded_runs_are_reproduced():
    lines = list(compare_layers(GOLDEN))
    assert len(lines) == 12
    assert [str(line) for line in lines if not line.ok] == []


@pytest.mark.parametrize("name", SOLVERS)
def test_what_stays_makes_up_for_what_goes(name):
    layer = drawn_layer(0)
    support, values = solved(name, layer, Largest(layer.weight.numel() // 2))
    assert layer.error(values) < 0.8 * layer.error(layer.weight * support)
    magnitude = Largest(layer.weight.numel() // 2).mask(layer.weight.abs())
    assert layer.error(values) < 0.8 * layer.error(layer.weight * magnitude)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_scale_of_the_gram_matrix_is_free(name):
    layer = drawn_layer(1)
    found = solved(name, layer, Largest(200))
    scaled = solved(name, Layer(layer.weight, layer.gram * 4096), Largest(200))
    assert torch.equal(found[0], scaled[0])
    torch.testing.assert_close(found[1], scaled[1], atol=1e-6, rtol=0)


def test_the_refit_is_the_least_squares_on_its_support():
    layer = drawn_layer(2)
    support, values = solved("refit", layer, Largest(150))
    damped = layer.gram.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    for row, kept, found in zip(layer.weight.double(), support, values, strict=True):
        exact = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ row)
        torch.testing.assert_close(found[kept].double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["alps", "alps+", "refit"])
def test_a_large_layer_is_solved_some_rows_at_a_time(name, monkeypatch):
    layer = drawn_layer(4)
    whole = solved(name, layer, Largest(layer.weight.numel() // 2))
    monkeypatch.setattr(layers, "_ELEMENTS", 3 * layer.weight.shape[1])
    parts = solved(name, layer, Largest(layer.weight.numel() // 2))
    assert int((parts[0] != whole[0]).sum()) <= 2  # rounding
    same = parts[0] & whole[0]
    torch.testing.assert_close(parts[1][same], whole[1][same], atol=1e-3, rtol=1e-3)


def test_nothing_removed_changes_nothing():
    layer = drawn_layer(3)
    for name in SOLVERS:
        support, values = solved(name, layer, Largest(0))
        assert bool(support.all())
        torch.testing.assert_close(values, layer.weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sparsity", [50, 70, 90])
def test_alps_plus_is_better_than_alps_on_inputs_seen_and_unseen(sparsity):
    weight, inputs = PROBLEMS["a_96x64.W"], PROBLEMS["a_96x64.X"]
    seen, unseen = (Layer(weight, part.T @ part) for part in held_out(inputs, 6, 8))
    selection = Largest(weight.numel() * sparsity // 100)
    ours, theirs = (solved(name, seen, selection)[1] for name in ("alps+", "alps"))
    assert seen.error(ours) < seen.error(theirs)
    assert unseen.error(ours) < unseen.error(theirs)


def test_inputs_that_are_always_zero_take_no_share_of_the_others():
    layer = drawn_layer(4)
    gram = layer.gram.clone()
    gram[:8] = gram[:, :8] = 0
    layer = Layer(layer.weight, gram)
    selection = RowSelection(16, 12)
    kept = {
        p: SparseGpt(published=p).solve(layer, layer.weight, [selection])[0] for p in (True, False)
    }
    assert int(kept[True][0][:, :8].sum()) == 0  # sparsegpt-S1
    assert int(kept[False][0][:, :8].sum()) > 0.25 * 12 * 8
    support, values = kept[False]
    assert torch.equal(values[:, :8][support[:, :8]], layer.weight[:, :8][support[:, :8]])


def test_no_row_becomes_empty_unless_as_published():
    layer = drawn_layer(5)
    layer.weight[0].mul_(1e-4)
    selection = Largest(int(0.9 * layer.weight.numel()))
    published = Alps().as_published().solve(layer, layer.weight, [selection])[0][0]
    assert int(published[0].sum()) == 0  # alps-L2
    support = solved("alps", layer, selection)[0]
    assert int(support[0].sum()) == 1
    assert int((~support).sum()) == selection.remove


@pytest.mark.parametrize(
    ("gram", "error", "text"),
    [
        (torch.zeros(4, 4), UnsupportedError, "all inputs of a layer are zero"),
        (torch.full((4, 4), float("nan")), NonFiniteError, "NaN or infinity"),
        (torch.eye(3), UnsupportedError, r"\[3, 3\] does not fit weights of 4 inputs"),
    ],
)
def test_gram_matrices_that_say_nothing_are_refused(gram, error, text):
    with pytest.raises(error, match=text):
        Layer(torch.ones(2, 4), gram)


@pytest.mark.parametrize("make", [SparseGpt, Alps, AlpsPlus, Refit])
@pytest.mark.parametrize("damping", [0, -1, float("nan"), True, "0.1"])
def test_a_damping_that_is_none_is_refused(make, damping):
    with pytest.raises(UnsupportedError, match="damping=.*above 0"):
        make(damping=damping)


def test_gram_matrices_that_do_not_fit_are_refused_before_any_batch_is_read():
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    def batches():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(UnsupportedError, match="'alps' holds the Gram matrices .* 65.0 KiB, and"):
        prune(
            model,
            batches(),
            method="alps",
            sparsity=0.5,
            adapter=ModuleAdapter(model),
            memory_budget=50_000,
        )


@torch.no_grad()
def test_new_values_keep_what_every_layer_puts_out():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    mixing = torch.randn(32, 32) * torch.linspace(0.1, 2, 32)
    batches = [torch.randn(64, 32) @ mixing for _ in range(4)]
    dense = [model(batch) for batch in batches]

    def change(method):
        masks = prune(model, batches, method=method, sparsity=0.5, adapter=ModuleAdapter(model))
        assert masks.sparsity == 0.5
        pruned = deepcopy(model)
        masks.apply(pruned, adapter=ModuleAdapter(pruned))
        return sum(
            float((pruned(b) - d).square().sum()) for b, d in zip(batches, dense, strict=True)
        )

    changes = {method: change(method) for method in ("omp", "wanda", *SOLVERS)}
    assert max(changes[name] for name in SOLVERS) < 0.7 * min(changes["omp"], changes["wanda"])


def test_a_factorisation_that_rounding_spoils_is_made_in_float64(monkeypatch):
    """Equal inputs but for the last bits, and next to no damping."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 1, generator=generator).expand(64, 16).double()
    inputs = inputs + 1e-5 * torch.randn(64, 16, generator=generator, dtype=torch.float64)
    layer = Layer(torch.randn(8, 16, generator=generator), inputs.T @ inputs)
    tried = []
    original = torch.linalg.cholesky_ex

    def recorded(matrix, **options):
        found = original(matrix, **options)
        tried.append((matrix.dtype, int(found.info)))
        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", recorded)
    support, values = SparseGpt(1e-9).solve(layer, layer.weight.abs(), [Largest(64)])[0]
    assert tried[0][0] == torch.float32
    assert tried[0][1] > 0
    assert tried[1] == (torch.float64, 0)
    assert int((~support).sum()) == 64
    assert bool(torch.isfinite(values).all())


def test_a_matrix_that_no_format_can_factorise_is_named():
    with pytest.raises(UnsupportedError, match="not positive definite; give a larger damping"):
        cholesky(lambda dtype: torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=dtype))


def test_a_factor_takes_the_place_of_its_matrix():
    layer = drawn_layer(6)
    made = []

    def damped(dtype):
        made.append(layer.gram.to(dtype) + torch.eye(32, dtype=dtype))
        return made[-1]

    factor = cholesky(damped)
    assert factor.data_ptr() == made[0].data_ptr()
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, layer.gram + torch.eye(32), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["alps", "alps+"])
def test_one_factor_is_held_at_a_time(name, monkeypatch):
    layer, held = drawn_layer(0), []
    original = layers.cholesky

    def places():
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
        return {t.data_ptr() for t in tensors if t.shape == layer.gram.shape}

    before = places()

    def counted(matrix):
        if len(held) < 4:  # it takes a while
            held.append(places() - before)
        return original(matrix)

    monkeypatch.setattr(layers, "cholesky", counted)
    solved(name, layer, Largest(200))
    # Next to the layer's own the scaled one: none of the factor before.
    assert [len(each) for each in held] == [1] * 4


def test_sparsegpt_does_what_the_paper_writes():
    """Its algorithm in plain torch, as the timings compare with it."""
    layer = drawn_layer(7, rows=24, columns=256)
    expected = plain_sparsegpt(layer.weight, layer.gram, 0.5)
    values = SparseGpt(published=True).solve(layer, layer.weight, [Largest(24 * 128)])[0][1]
    assert torch.equal(values != 0, expected != 0)
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)
