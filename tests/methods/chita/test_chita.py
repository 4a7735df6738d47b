"""CHITA on a model: counts, updates, the model left as found, what the manifest says."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import pytest
import torch
from chita_runs import BATCHES, context_of, pruned_weights, values_of
from toy_loss import losing_toy, spoilt

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.chita.method import chita
from vlp_plugins.methods.chita.solver.dual import Dual
from vlp_plugins.methods.chita.solver.problem import MemoryRows, Problem
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import DataError, NonFiniteError, SparsityError, UnsupportedError
from vlp_plugins.scoring.allocation import LayerAllocation, ModalityAllocation

TARGETS = [0.5, 0.75, 0.9]


def test_exactly_the_asked_number_of_weights_goes():
    context = context_of(targets=TARGETS)

    for effort in ("fast", "published"):
        found = chita(lambda_=0.1, effort=effort).run(context)

        for target, masks in zip(TARGETS, found, strict=True):
            assert masks.removed == int(target * masks.total)


def test_kept_weights_are_the_minimum_on_their_support():
    """Against the closed form, from gradients gathered here."""
    context = context_of()
    masks = chita(lambda_=0.1, block_size=None).run(context)[0]

    rows = []
    probe = LossProbe(context.model, context.adapter, context.weights)
    with probe.attached():
        for index, batch in enumerate(context.batches):
            gradients = probe.measure(batch, index)
            rows.append(torch.cat([gradients[name].flatten() for name in context.weights]))
    dense = torch.cat([w.parameter.detach().flatten() for w in context.weights.values()])
    support = torch.cat([masks[name].flatten() for name in context.weights])
    problem = Problem(dense, MemoryRows(torch.stack(rows)), 0.1, int(support.sum()))
    expected = Dual.of(problem, support).values(problem, support)

    new = pruned_weights(context, masks)
    assert torch.allclose(torch.cat([v.flatten() for v in new.values()]), expected, atol=1e-6)
    assert not torch.allclose(expected[support], dense[support], atol=1e-4)


def test_convolutions_and_ties_keep_their_shape():
    context = context_of()
    masks = chita(lambda_=0.1).run(context)[0]

    assert masks["vision.patch"].shape == (6, 3, 4, 4)
    model = losing_toy()
    masks.apply(model, context.adapter)
    assert model.encoder_out.weight is model.decoder_out.weight
    assert masks.verify(model, context.adapter) == []


def test_several_targets_equal_separate_runs():
    method = chita(lambda_="auto", effort="published")
    together = method.run(context_of(targets=TARGETS))

    for target, masks in zip(TARGETS, together, strict=True):
        assert masks == method.run(context_of(targets=[target]))[0]


@pytest.mark.parametrize("lambda_", [0.1, "auto"])
def test_the_model_is_left_as_it_was(lambda_):
    model = losing_toy().train()
    context = context_of(model)
    before, state = values_of(context), torch.get_rng_state()

    chita(lambda_=lambda_, effort="published").run(context)

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_model_is_left_as_it_was_after_an_error_too():
    context = context_of()
    context.batches[3] = spoilt(context.batches[3])
    before = values_of(context)

    with pytest.raises(NonFiniteError, match="batch 3"):
        chita(lambda_=0.1).run(context)

    assert all(
        torch.equal(value, before[name]) for name, value in context.model.state_dict().items()
    )


def test_a_batch_that_is_not_finite_can_be_left_out():
    context = context_of(skip_nonfinite=True)
    context.batches[3] = spoilt(context.batches[3])

    masks = chita(lambda_=0.1).run(context)[0]

    assert masks.manifest.parameters["rows"] == BATCHES - 1


def test_half_precision_models_are_solved_in_float32():
    model = losing_toy().to(torch.bfloat16)
    batches = [
        {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
        for batch in context_of().batches
    ]
    context = context_of(model, batches=batches)
    before = values_of(context)

    masks = chita(lambda_="auto", effort="published").run(context)[0]

    assert masks.removed == int(0.5 * masks.total)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    masks.apply(model, context.adapter)
    assert model.feed.weight.dtype == torch.bfloat16


def test_budgets_by_modality_are_met():
    context = context_of(targets=[{"vision": 0.8, "text": 0.3}])

    masks = chita(lambda_=0.1).with_allocation(ModalityAllocation()).run(context)[0]

    counts = masks.counts().by_modality
    assert counts["vision"].removed == int(0.8 * counts["vision"].total)
    assert counts["text"].removed == int(0.3 * counts["text"].total)


def test_a_single_modality_is_the_same_problem_as_no_modalities():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    batches = [(torch.randn(5, 8), torch.randn(5, 4)) for _ in range(4)]

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    options = {"sparsity": 0.5, "adapter": ModuleAdapter(model, loss=loss), "method": "chita"}
    assert prune(model, batches, **options, lambda_=0.1) == prune(
        model, batches, **options, lambda_=0.1, allocation="modality"
    )


def test_the_published_variant_counts_as_the_published_code():
    masks = chita(lambda_=0.1).run(context_of(targets=[0.63], published=True))[0]

    assert masks.kept == int((1 - 0.63) * masks.total)
    parameters = masks.manifest.parameters
    assert (parameters["effort"], parameters["block_size"]) == ("published", 10_000)
    assert parameters["first_order"] is True
    assert parameters["variant"] == "published"


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("options", "weight"), [({}, 1.0), ({"first_order": False}, 0.0)])
def test_the_published_weights_are_those_of_the_formula_whatever_the_batch_size(
    size, options, weight, caplog
):
    """Gradients of single samples too: c = 1 / samples of a batch, ridge n lambda."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False), torch.nn.Linear(8, 4))
    data = torch.randn(10 * size, 12), torch.randint(4, (10 * size,))
    batches = [{"x": x, "y": y} for x, y in zip(*(each.split(size) for each in data), strict=True)]

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    masks = prune(
        model,
        batches,
        adapter=ModuleAdapter(model, loss=loss),
        method="chita",
        sparsity=0.5,
        variant="published",
        **{"lambda": 0.01},
        **options,
    )

    weights = {name: model.get_parameter(f"{name}.weight") for name in masks}
    rows = {name: [] for name in masks}
    for batch in batches:
        found = torch.autograd.grad(loss(model, batch), list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            rows[name].append(gradient.flatten().double())
    pruned = deepcopy(model)
    masks.apply(pruned, ModuleAdapter(pruned, loss=loss))
    for name in masks:  # each is a block
        a, w, kept = (
            torch.stack(rows[name]),
            weights[name].detach().flatten(),
            masks[name].flatten(),
        )
        inside, ridge = a[:, kept], len(a) * 0.01
        right = inside.T @ (a @ w.double()) + ridge * w[kept] - weight / size * inside.sum(0)
        left = inside.T @ inside + ridge * torch.eye(int(kept.sum()), dtype=torch.float64)
        expected = torch.linalg.solve(left, right)
        values = pruned.get_parameter(f"{name}.weight").detach().flatten()[kept]
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)
    warned = "batches of one sample" in caplog.text
    assert warned == (size == 1 and weight > 0)


def test_a_first_order_term_that_is_given_holds_in_every_variant():
    for given, published in product([True, False, 0.5], [True, False]):
        masks = chita(lambda_=0.1, first_order=given).run(context_of(published=published))[0]
        assert masks.manifest.parameters["first_order"] is given
    assert chita(lambda_=0.1).run(context_of())[0].manifest.parameters["first_order"] is False


def test_the_manifest_says_how_masks_were_made():
    masks = chita(lambda_=0.1, rows=4).run(context_of())[0]

    parameters = masks.manifest.parameters
    assert (parameters["lambda"], parameters["rows"], parameters["effort"]) == (0.1, 4, "fast")
    assert parameters["objective"] > 0
    assert parameters["sweeps"] > 0
    assert masks.manifest.calibration["batches"] == 4
    assert masks.manifest.calibration["samples"] == 12


def test_the_name_lambda_is_taken_from_recipes_and_python():
    context = context_of()
    options = {"adapter": context.adapter, "method": "chita", "sparsity": 0.5}

    first = prune(context.model, context.batches, **options, **{"lambda": 0.3})

    assert first == prune(context.model, context.batches, **options, lambda_=0.3)
    assert first.manifest.parameters["lambda"] == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_": 0}, "lambda=0; the ridge penalty must be a number above 0"),
        ({"lambda_": -1.0}, "lambda=-1.0"),
        ({"lambda_": float("nan")}, "lambda=nan"),
        ({"lambda_": True}, "lambda=True"),
        ({"lambda_": "automatic"}, "lambda='automatic'; give a number above 0, or auto"),
        ({"effort": "bst"}, "did you mean 'best'"),
        ({"block_size": 0}, "block_size=0"),
        ({"rows": 0}, "rows=0"),
        ({"keep_in": "memory"}, "keep_in='memory'"),
        ({"row_dtype": "float16"}, "row_dtype='float16'"),
        ({"first_order": -1.0}, "first_order=-1.0"),
        ({"held_out": 1.5}, "held_out=1.5"),
    ],
)
def test_values_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(UnsupportedError, match=message):
        chita(**options)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (chita(lambda_=0.1), {"batches": []}, DataError, "is empty"),
        (chita(lambda_=0.1, rows=7), {}, DataError, "rows=7 needs as many batches"),
        (chita(lambda_="auto", rows=6), {}, DataError, "there are 5 next to the 1 held out"),
        (chita(lambda_="auto"), {"limit": 1}, DataError, "lambda=auto holds 1"),
        (chita(lambda_="auto", held_out=6), {}, DataError, "lambda=auto holds 6"),
        (chita(lambda_=0.1), {"floor": 0.1}, SparsityError, "has no floor"),
        (chita(lambda_=0.1), {"targets": [{"vision": 0.5}]}, SparsityError, "takes one sparsity"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_are_refused_before_any_gradient(method, options, error, message):
    context = context_of(**options)
    context.adapter.losses = None  # whoever calls it fails

    with pytest.raises(error, match=message):
        method.run(context)


@pytest.mark.parametrize("keep_in", ["disk", "passes"])
@pytest.mark.parametrize("lambda_", [0.1, "auto"])
def test_where_rows_are_kept_changes_nothing(keep_in, lambda_, tmp_path):
    """Rows that are kept nowhere are gradients of the dense model in every sweep."""
    options = {"lambda_": lambda_, "effort": "published", "block_size": 100}
    expected = chita(**options).run(context_of())[0]

    context = context_of(memory_budget=8_000, workplace=tmp_path)
    found = chita(**options, keep_in=keep_in).run(context)[0]

    assert found.manifest.parameters["rows_kept_in"] == keep_in
    curve, same = (m.manifest.parameters.get("lambda_curve", []) for m in (found, expected))
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in same], rel=1e-5)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    one, other = pruned_weights(context, found), pruned_weights(context, expected)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_bfloat16_rows_say_what_rounding_changed():
    masks = chita(lambda_=0.1, row_dtype="bfloat16").run(context_of())[0]

    assert 0 < masks.manifest.parameters["rows_rounding"] < 0.01


def test_an_iterator_serves_if_its_length_is_given():
    expected = chita(lambda_=0.1, rows=4).run(context_of())[0]

    found = chita(lambda_=0.1, rows=4).run(context_of(batches=iter(context_of().batches)))[0]

    assert found == expected
    with pytest.raises(DataError, match="unknown length"):
        chita(lambda_=0.1).run(context_of(batches=iter(context_of().batches)))


def test_loaders_give_what_lists_give():
    class Loader:
        def __iter__(self):
            return iter(context_of().batches)

    for method in (chita(lambda_=0.1), chita(lambda_="auto", effort="published")):
        assert method.run(context_of(batches=Loader())) == method.run(context_of())


def test_allocations_that_share_out_by_layer_are_refused():
    with pytest.raises(UnsupportedError, match="within modalities"):
        chita().with_allocation(LayerAllocation())
