"""CHITA++: rounds, what stays removed, and going on after an interruption."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from chita_runs import context_of, values_of
from toy_loss import LosingAdapter

from vlp_plugins.methods.chita.method import chita, chita_plus_plus
from vlp_plugins.methods.chita.pruner import stay_removed
from vlp_plugins.methods.chita.setup import Setup
from vlp_plugins.runtime.errors import DataError, SparsityError, UnsupportedError
from vlp_plugins.scoring.allocation import ModalityAllocation


class Stopped(Exception):
    pass


def stop_after(monkeypatch, gradients):
    """The loss fails after so many batches."""
    left = [gradients]
    original = LosingAdapter.losses

    def losses(self, model, batch, **options):
        if torch.is_grad_enabled():
            if not left[0]:
                raise Stopped
            left[0] -= 1
        return original(self, model, batch, **options)

    monkeypatch.setattr(LosingAdapter, "losses", losses)
    return original


@pytest.mark.parametrize("schedule", ["exp", "linear", "const", "cubic"])
def test_every_schedule_ends_exactly_at_the_target(schedule):
    method = chita_plus_plus(lambda_=0.1, rounds=3, schedule=schedule)

    masks = method.run(context_of(targets=[0.9]))[0]

    assert masks.removed == int(0.9 * masks.total)


def test_one_round_is_chita():
    method = chita_plus_plus(lambda_=0.1, rounds=1)

    assert method.run(context_of()) == chita(lambda_=0.1).run(context_of())


def test_every_target_starts_from_the_dense_model():
    method = chita_plus_plus(lambda_=0.1, rounds=2)
    together = method.run(context_of(targets=[0.5, 0.75]))

    assert together[1] == method.run(context_of(targets=[0.75]))[0]


def test_removed_weights_stay_removed(monkeypatch):
    supports = []
    original = Setup.find

    def find(*arguments):
        [found] = original(*arguments)
        supports.append(found.solution.support.clone())
        return [found]

    monkeypatch.setattr(Setup, "find", find)
    chita_plus_plus(lambda_=0.01, rounds=3).run(context_of(targets=[0.8]))

    kept = [int(support.sum()) for support in supports]
    assert kept == sorted(kept, reverse=True)
    for before, after in pairwise(supports):
        assert not (after & ~before).any()


def test_a_removed_weight_that_fills_up_a_count_is_replaced():
    alive = torch.tensor([True, False, True, True, False])
    support = torch.tensor([True, True, False, False, False])

    assert stay_removed(support, alive).tolist() == [True, False, True, False, False]


def test_rounds_take_fresh_batches_and_start_over_with_a_warning(monkeypatch, caplog):
    context = context_of()
    numbers = {float(batch["pixel_values"].sum()): n for n, batch in enumerate(context.batches)}
    seen = []
    original = LosingAdapter.losses

    def losses(self, model, batch, **options):
        seen.append(numbers[float(batch["pixel_values"].sum())])
        return original(self, model, batch, **options)

    monkeypatch.setattr(LosingAdapter, "losses", losses)
    chita_plus_plus(lambda_=0.1, rounds=3).run(context)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert "after the last batch comes the first" not in caplog.text

    seen.clear()
    chita_plus_plus(lambda_=0.1, rounds=2, rows=4).run(context)
    assert seen == [0, 1, 2, 3, 4, 5, 0, 1]
    assert caplog.text.count("after the last batch comes the first") == 1


def test_rounds_take_fresh_batches_from_a_loader_too():
    class Loader:
        def __iter__(self):
            return iter(batches)

    batches = list(context_of().batches)
    method = chita_plus_plus(lambda_=0.1, rounds=3, rows=2)

    masks = method.run(context_of(batches=Loader()))

    assert masks == method.run(context_of(batches=batches))


def test_what_losses_remember_goes_on_from_round_to_round(monkeypatch):
    memories = []
    original = LosingAdapter.losses

    def losses(self, model, batch, **options):
        memories.append(model.memory.clone())
        return original(self, model, batch, **options)

    monkeypatch.setattr(LosingAdapter, "losses", losses)
    context = context_of()
    chita_plus_plus(lambda_=0.1, rounds=2, rows=2).run(context)

    assert not memories[0].any()
    assert memories[2].any()  # the second round starts where the first ended
    assert not context.model.memory.any()


def test_an_interrupted_run_goes_on_with_equal_result(tmp_path, monkeypatch, caplog):
    method = chita_plus_plus(lambda_=0.1, rounds=3)
    targets = [0.5, 0.75]
    expected = method.run(context_of(targets=targets))
    context = context_of(targets=targets, workplace=tmp_path)
    before = values_of(context)

    original = stop_after(monkeypatch, 9)  # in the second round of the second target
    with pytest.raises(Stopped):
        method.run(context)
    assert all(
        torch.equal(value, before[name]) for name, value in context.model.state_dict().items()
    )

    gradients = []

    def losses(self, model, batch, **options):
        gradients.append(1)
        return original(self, model, batch, **options)

    monkeypatch.setattr(LosingAdapter, "losses", losses)
    caplog.set_level(logging.INFO, "vlp_plugins.methods")
    found = method.run(context_of(targets=targets, workplace=tmp_path, resume=True))

    assert found == expected
    assert [masks.manifest.parameters["stages"] for masks in found] == [
        masks.manifest.parameters["stages"] for masks in expected
    ]
    assert len(gradients) == 4  # two rounds of the second target
    assert "chita++ resumes after round 1" in caplog.text


def test_other_data_is_noticed_when_a_run_goes_on(tmp_path):
    method = chita_plus_plus(lambda_=0.1, rounds=2)
    method.run(context_of(workplace=tmp_path))
    context = context_of(workplace=tmp_path, resume=True)
    context.batches.reverse()

    with pytest.raises(DataError, match="round 1 are not those"):
        method.run(context)


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, caplog):
    chita_plus_plus(lambda_=0.1, rounds=2).run(context_of(workplace=tmp_path))

    method = chita_plus_plus(lambda_=0.2, rounds=2)
    found = method.run(context_of(workplace=tmp_path, resume=True))

    assert "starting from the first stage" in caplog.text
    assert found == method.run(context_of())


def test_a_damaged_checkpoint_is_told(tmp_path):
    method = chita_plus_plus(lambda_=0.1, rounds=2)
    method.run(context_of(workplace=tmp_path))
    for path in tmp_path.glob("stages-*"):
        path.write_bytes(path.read_bytes()[:500])

    with pytest.raises(DataError, match="damaged"):
        method.run(context_of(workplace=tmp_path, resume=True))


def test_lambda_is_chosen_anew_in_every_round_near_that_of_the_round_before():
    masks = chita_plus_plus(lambda_="auto", rounds=2, effort="published").run(context_of())[0]

    found = masks.manifest.parameters["stages"]
    first, second = ([ridge for ridge, _ in each["lambda_curve"]] for each in found)
    assert min(len(first), len(second)) >= 3
    assert found[0]["lambda"] in second
    assert masks.manifest.parameters["lambda"] == found[-1]["lambda"]


def test_budgets_by_modality_rise_together():
    target = {"vision": 0.8, "text": 0.3}
    method = chita_plus_plus(lambda_=0.1, rounds=2).with_allocation(ModalityAllocation())
    masks = method.run(context_of(targets=[target]))[0]

    counts = masks.counts().by_modality
    assert {m: c.removed for m, c in counts.items()} == {
        m: int(target[m] * c.total) for m, c in counts.items()
    }


def test_rounds_and_schedules_that_make_no_sense_are_refused():
    with pytest.raises(UnsupportedError, match="rounds=0"):
        chita_plus_plus(rounds=0)
    with pytest.raises(SparsityError, match="did you mean 'linear'"):
        chita_plus_plus(schedule="linar")
