"""`platon` and `taylor` as methods: exact masks with new values, and the model as it was."""

from __future__ import annotations

import logging

import pytest
import torch
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy, spoilt

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.gradual.method import platon, taylor
from vlp_plugins.methods.method import Context
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import (
    DataError,
    NonFiniteError,
    SparsityError,
    StatisticsError,
    UnsupportedError,
)
from vlp_plugins.scoring.allocation import ModalityAllocation, Pattern


def context_of(model=None, batches=None, **options):
    model = losing_toy() if model is None else model
    adapter = LosingAdapter()
    return Context(
        model,
        adapter,
        WeightMap.of(model, adapter),
        toy_batches(8) if batches is None else batches,
        **{"targets": [0.75], **options},
    )


def all_equal(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", [platon, taylor])
def test_masks_are_exact_and_bring_new_values(method):
    model = losing_toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    context = context_of(model)

    masks = method(steps=12).run(context)[0]

    assert masks.removed == int(0.75 * masks.total)
    assert all_equal(model.state_dict(), before)  # queues included
    values = masks.new_values
    moved = [
        not torch.equal(values[name], weight.parameter.detach()[masks[name]])
        for name, weight in context.weights.items()
    ]
    assert sum(moved) > len(moved) // 2
    masks.apply(model, LosingAdapter())
    for name, weight in context.weights.items():
        assert torch.equal(weight.parameter[masks[name]], values[name])
        assert not weight.parameter[~masks[name]].any()


def test_the_loss_is_far_below_that_of_the_magnitudes():
    batches = toy_batches(8)

    def loss_under(masks):
        model = losing_toy()
        masks.apply(model, LosingAdapter())
        context = context_of(model)
        probe = LossProbe(model, context.adapter, context.weights)
        with probe.attached():
            return sum(probe.loss(batch, i) for i, batch in enumerate(batches))

    magnitudes = prune(losing_toy(), adapter=LosingAdapter(), method="omp", sparsity=0.75)
    for method in (platon, taylor):
        assert loss_under(method(steps=40, lr=0.01).run(context_of())[0]) < 0.7 * loss_under(
            magnitudes
        )


def test_what_was_set_is_recorded():
    context = context_of(seed=3)
    masks = platon(steps=10, warmup=(0.2, 0.5), beta2=0.9, every=2, revive=False).run(context)[0]

    manifest = masks.manifest
    assert manifest.method == "platon"
    assert manifest.parameters == {
        "beta1": 0.85,
        "beta2": 0.9,
        "steps": 10,
        "warmup": [2, 5],
        "every": 2,
        "schedule": "cubic",
        "allocation": "global",
        "floor": 0.0,
        "revive": False,
        "lr": 3e-4,
        "variant": "default",
    }
    assert manifest.seed == 3
    assert manifest.sparsity == 0.75
    assert manifest.calibration["batches"] == 10
    assert manifest.weights_hash == context.weights.content_hash()


def test_several_targets_are_those_of_separate_runs_and_progress_is_told():
    told = []
    together = platon().run(
        context_of(targets=[0.5, 0.75], progress=lambda done, total: told.append((done, total)))
    )

    for target, masks in zip((0.5, 0.75), together, strict=True):
        assert masks == platon().run(context_of(targets=[target]))[0]
    assert told == [(done, 16) for done in range(1, 17)]


def test_budgets_floors_and_patterns():
    budget = {"vision": 0.5, "text": 0.9}
    method = platon().with_allocation(ModalityAllocation())
    counts = method.run(context_of(targets=[budget], floor=0.05))[0].counts()

    for modality, count in counts.by_modality.items():
        assert count.removed == int(budget[modality] * count.total)
    assert all(count.kept >= 0.05 * count.total for count in counts.by_weight.values())
    pattern = platon().with_allocation(Pattern(keep=1, of=2))
    with pytest.raises(SparsityError, match="schedule='constant'"):
        pattern.run(context_of(targets=[0.5]))
    halves = platon(schedule="constant").with_allocation(Pattern(keep=1, of=2))
    assert halves.run(context_of(targets=[0.5]))[0].sparsity == 0.5


def test_factors_move_sparsity_and_give_the_name():
    names = list(context_of().weights)
    factors = {name: 9.0 if name.startswith("text") else 1.0 for name in names}
    guided = platon().with_factors(factors)

    masks = guided.run(context_of())[0]

    plain = platon().run(context_of())[0]
    assert guided.name == masks.manifest.method == "id*platon"
    assert masks.removed == plain.removed
    assert masks.counts().by_modality["text"].sparsity < plain.counts().by_modality["text"].sparsity
    assert masks.manifest.parameters["id_factors"]
    with pytest.raises(UnsupportedError, match="already"):
        guided.with_factors(factors)
    with pytest.raises(StatisticsError, match="no factor"):
        platon().with_factors({"text.q": 1.0}).run(context_of())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [5, 11, 14])
def test_an_interrupted_run_goes_on_to_the_same_masks_and_values(tmp_path, stop):
    def stopping(done, total):
        if done == stop:
            raise Interrupted

    method = platon(steps=16, warmup=(0.1, 0.25), every=3)
    whole = method.run(context_of())[0]
    model = losing_toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Interrupted):
        method.run(context_of(model, workplace=tmp_path, progress=stopping))
    assert all_equal(model.state_dict(), before)
    (file,) = tmp_path.glob("training-*.safetensors")
    told = []

    resumed = method.run(
        context_of(workplace=tmp_path, resume=True, progress=lambda done, _: told.append(done))
    )[0]

    assert told[0] == stop - stop % 2 + 1  # a checkpoint every second step
    assert resumed == whole
    assert all_equal(resumed.new_values, whole.new_values)
    assert resumed.manifest.calibration == whole.manifest.calibration
    other = context_of(batches=toy_batches(8, seed=5), workplace=tmp_path, resume=True)
    with pytest.raises(DataError, match="not those that checkpoint"):
        method.run(other)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match="damaged"):
        method.run(context_of(workplace=tmp_path, resume=True))


def test_other_settings_start_anew(tmp_path, caplog):
    platon(steps=4).run(context_of(workplace=tmp_path))

    with caplog.at_level(logging.WARNING):
        masks = platon(steps=4, lr=1e-4).run(context_of(workplace=tmp_path, resume=True))[0]

    assert "starting from the first step" in caplog.text
    assert all_equal(masks.new_values, platon(steps=4, lr=1e-4).run(context_of())[0].new_values)


def test_a_model_in_half_precision_is_trained_in_float32():
    batches = [
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        for batch in toy_batches(8)
    ]
    model = losing_toy().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    masks = platon(steps=8, lr=1e-5).run(context_of(model, batches))[0]

    assert all_equal(model.state_dict(), before)
    assert masks.removed == int(0.75 * masks.total)
    values = torch.cat(list(masks.new_values.values()))
    assert not torch.equal(values, values.bfloat16().float())  # steps below its precision add up


def test_a_batch_that_is_not_finite_is_an_error_or_left_out():
    batches = toy_batches(8)
    batches[3] = spoilt(batches[3])

    with pytest.raises(NonFiniteError, match="batch 3"):
        platon().run(context_of(batches=batches))
    masks = platon().run(context_of(batches=batches, skip_nonfinite=True))[0]

    assert masks.removed == int(0.75 * masks.total)


def test_the_cost_counts_what_is_kept():
    context = context_of(targets=[0.5, 0.75], limit=8)
    size = context.weights.numel

    of_platon, of_taylor = (method(steps=20).cost(context) for method in (platon, taylor))

    assert of_platon.gradient_batches == 40
    assert of_platon.passes == 6  # three each
    assert of_platon.ram_bytes - of_taylor.ram_bytes == 4 * size
    assert of_platon.disk_bytes == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"steps": 0}, DataError),
        ({"lr": 0.0}, UnsupportedError),
        ({"warmup": (0.5, 1.0)}, UnsupportedError),
        ({"warmup": ()}, UnsupportedError),
        ({"every": 0}, UnsupportedError),
        ({"schedule": "cubc"}, SparsityError),
    ],
)
def test_what_cannot_be_is_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        platon(**options)


def test_warm_ups_that_leave_no_step_are_refused():
    with pytest.raises(SparsityError, match="leave 0 for"):
        platon(steps=10, warmup=(0.5, 0.5)).run(context_of())


def test_an_unknown_number_of_steps_is_asked_for():
    with pytest.raises(DataError, match="give steps"):
        platon().run(context_of(batches=iter(toy_batches(3))))
    masks = platon(steps=3).run(context_of(batches=iter(toy_batches(3))))[0]
    assert masks.removed == int(0.75 * masks.total)
