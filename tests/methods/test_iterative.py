"""Methods in rounds: what is dead stays dead, the model comes back, a run can be resumed."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy, spoilt

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods import iterative as running
from vlp_plugins.methods.builtin import multiflow, omp
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.iterative import Iterative, itersnip, remove_weights
from vlp_plugins.methods.method import Context
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import DataError, NonFiniteError, SparsityError
from vlp_plugins.scoring.allocation import ModalityAllocation, Pattern
from vlp_plugins.scoring.magnitude import Random
from vlp_plugins.scoring.schedules import levels_of
from vlp_plugins.scoring.wanda import Wanda

ROUNDS = 3


def context_of(model: Any = None, batches: Any = None, **options: Any) -> Context:
    model = model or losing_toy()
    adapter = LosingAdapter()
    return Context(
        model,
        adapter,
        WeightMap.of(model, adapter),
        toy_batches(6) if batches is None else batches,
        **{"targets": [0.75], **options},
    )


def method(**options: Any) -> Iterative:
    return itersnip(**{"rounds": ROUNDS, **options})


class Interrupted(Exception):
    pass


def after_batches(count: int) -> Any:
    """Progress that breaks a run off."""

    def told(done: int, total: int | None) -> None:
        if done == count:
            raise Interrupted

    return told


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def all_rounds(monkeypatch):
    """The masks of every round."""
    found: list[Masks] = []
    remove = remove_weights

    def watching(weights: WeightMap, masks: Masks) -> None:
        found.append(masks)
        remove(weights, masks)

    monkeypatch.setattr(running, "remove_weights", watching)
    return found


RANDOM = Composition("random", Random(), ModalityAllocation())


@pytest.mark.parametrize(
    ("composition", "schedule"),
    [
        (itersnip().composition, "exp"),
        (multiflow(), "linear"),
        (Composition("wanda", Wanda()), "cubic"),
        (RANDOM, "exp"),
        (RANDOM, "const"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_removed_stays_removed_and_every_round_has_its_count(
    all_rounds, composition, schedule
):
    context = context_of()

    Iterative(composition, rounds=ROUNDS, schedule=schedule).run(context)

    levels = [float(level) for level in levels_of(0.75, schedule, ROUNDS)]
    for level, masks in zip(levels, all_rounds, strict=True):
        scopes = [context.weights.numel]
        if composition.allocation.name == "modality":
            groups = context.weights.by_modality().values()
            scopes = [sum(weight.numel for weight in group) for group in groups]
        assert masks.removed == sum(int(level * scope) for scope in scopes)
    for earlier, later in pairwise(all_rounds):
        assert all(not bool((later[name] & ~earlier[name]).any()) for name in later)


def test_a_round_is_the_composition_on_the_masked_model_with_the_next_batches():
    batches = toy_batches(6)
    found = method().run(context_of(batches=batches))[0]

    model = losing_toy()
    adapter = LosingAdapter()
    weights = WeightMap.of(model, adapter)
    snip = itersnip().composition
    for index, level in enumerate(levels_of(0.75, "exp", ROUNDS)):
        part = batches[2 * index : 2 * index + 2]
        # The memory of the losses goes on, as in one pass over all the data.
        statistics = calibrate(model, adapter, weights, part, snip.needs, keep_state=True)
        masks = snip.masks(Context(model, adapter, weights, targets=[level]), statistics)
        masks[0].apply(model, adapter)
    assert found == masks[0]


def test_the_model_is_as_before_also_after_an_error():
    model = losing_toy().train()
    before = snapshot(model)

    method().run(context_of(model))
    with pytest.raises(Interrupted):
        method().run(context_of(model, progress=after_batches(4)))

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_targets_are_the_same_as_separate_runs():
    targets = [0.5, 0.75, {"vision": 0.3, "text": 0.9}]
    modality = method().with_allocation(ModalityAllocation())

    together = modality.run(context_of(targets=targets))

    for target, masks in zip(targets, together, strict=True):
        assert masks == modality.run(context_of(targets=[target]))[0]
        assert masks.manifest.sparsity == target


def test_an_interrupted_run_goes_on_after_its_last_whole_round(tmp_path, caplog):
    whole = method().run(context_of())[0]
    with pytest.raises(Interrupted):
        method().run(context_of(workplace=tmp_path, progress=after_batches(5)))
    told: list[int] = []

    caplog.set_level(logging.INFO)
    resumed = method().run(
        context_of(workplace=tmp_path, resume=True, progress=lambda done, total: told.append(done))
    )[0]

    assert resumed == whole
    assert replace(resumed.manifest, created=None) == replace(whole.manifest, created=None)
    assert told == [5, 6]
    assert "resumes after round 2" in caplog.text


def test_a_finished_run_is_resumed_without_work(tmp_path):
    whole = method().run(context_of(workplace=tmp_path))[0]

    def never(done: int, total: int | None) -> None:
        raise AssertionError("a batch was run")

    assert method().run(context_of(workplace=tmp_path, resume=True, progress=never))[0] == whole


def test_resuming_without_a_folder_is_refused():
    with pytest.raises(DataError, match="give workplace"):
        method().run(context_of(resume=True))


def test_resuming_with_other_data_is_refused(tmp_path):
    method().run(context_of(workplace=tmp_path))

    with pytest.raises(DataError, match="round 1 are not those"):
        method().run(context_of(batches=toy_batches(6, seed=1), workplace=tmp_path, resume=True))


def test_the_state_of_the_losses_goes_on_from_round_to_round():
    class Forgetful(LosingAdapter):
        def loss_state(self, model):
            return [value.clone() for value in super().loss_state(model)]  # never put back

    # An adapter whose state nobody restores goes on by itself, so both must be the same.
    model = losing_toy()
    context = replace(context_of(model), adapter=Forgetful())
    forgetful = method().run(context)[0]

    assert method().run(context_of())[0] == forgetful


def test_data_that_is_too_short_starts_over_with_one_warning(caplog):
    batches = toy_batches(4)

    short = method(batches_per_round=2).run(context_of(batches=batches, targets=[0.5, 0.75]))

    again = method(batches_per_round=2).run(
        context_of(batches=[*batches, *batches[:2]], targets=[0.5, 0.75])
    )
    assert short == again
    assert caplog.text.count("comes the first again") == 1


def test_an_iterator_serves_one_target_that_reads_it_once():
    masks = method(batches_per_round=2).run(context_of(batches=iter(toy_batches(6))))

    assert masks == method().run(context_of())
    with pytest.raises(DataError, match="read once"):
        method(batches_per_round=2).run(
            context_of(batches=iter(toy_batches(6)), targets=[0.5, 0.75])
        )
    with pytest.raises(DataError, match="give batches_per_round, a limit"):
        method().run(context_of(batches=iter(toy_batches(6))))


def test_a_batch_that_is_not_finite_is_named_with_its_round():
    batches = toy_batches(6)
    batches[3] = spoilt(batches[3])

    with pytest.raises(NonFiniteError, match=r"round 2 of 3, whose batch 0 is batch 2 .*batch 1"):
        method().run(context_of(batches=batches))
    masks = method().run(context_of(batches=batches, skip_nonfinite=True))[0]
    assert masks.removed == int(0.75 * masks.total)


def test_a_method_without_data_needs_none():
    masks = prune(
        losing_toy(),
        adapter=LosingAdapter(),
        method=Iterative(omp(), rounds=ROUNDS),
        sparsity=0.75,
    )

    assert masks == prune(losing_toy(), adapter=LosingAdapter(), method="omp", sparsity=0.75)
    assert masks.manifest.method == "iteromp"


def test_a_pattern_cannot_rise():
    with pytest.raises(SparsityError, match="fixes the sparsity"):
        method().with_allocation(Pattern(1, 2)).run(context_of(targets=[0.5]))


def test_wrong_settings_are_refused_at_once():
    with pytest.raises(SparsityError, match="rounds=0"):
        itersnip(rounds=0)
    with pytest.raises(SparsityError, match="unknown schedule"):
        itersnip(schedule="sudden")
    with pytest.raises(DataError, match="batches_per_round=0"):
        itersnip(batches_per_round=0)


def test_the_cost_counts_batches_passes_and_copies():
    context = context_of(targets=[0.5, 0.75], limit=6)

    cost = method().cost(replace(context, batches=()))

    assert cost.gradient_batches == 2 * ROUNDS * 2
    assert cost.passes == 2
    assert cost.ram_bytes > 4 * context.weights.numel
