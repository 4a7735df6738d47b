"""Gradual pruning in a loop of one's own: three lines, resumed bit by bit, any way of stepping."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import toy_batches
from toy_loops import ADAPTER, loss_of, removed_of, train, weights_of, zeros_of
from toy_loss import losing_toy

from benchmarks.parity.blip import model_from_golden
from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.methods.gradual.pruning import GradualPruning
from vlp_plugins.methods.gradual.rising_masks import RisingMasks
from vlp_plugins.methods.gradual.scores import Platon
from vlp_plugins.runtime.errors import MaskError, UnknownNameError, UnsupportedError

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
SCORES = ["magnitude", "taylor", "platon"]


def pruning_of(model, **options):
    settings = {"sparsity": 0.75, "steps": 20, "every": 3, "warmup": (2, 4), "adapter": ADAPTER}
    return GradualPruning(model, **(settings | options))


def begun(**options):
    model = losing_toy()
    optimizer = ADAMW(model.parameters())
    return model, optimizer, pruning_of(model, **options).attach(optimizer)


def all_equal(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_target_is_met_before_the_final_warm_up_and_zeros_stay(score, accumulate):
    model, optimizer, pruning = begun(score=score)

    def look(step):
        assert pruning.step == step
        if step >= 16:
            pruning.check()
            assert all_equal(zeros_of(model), removed_of(pruning.masks()))

    train(model, optimizer, 24, accumulate=accumulate, after=look)  # longer than it was told

    masks = pruning.masks()
    assert masks.removed == int(0.75 * masks.total)
    assert masks.manifest.method == score
    assert masks.manifest.parameters["steps"] == 20
    assert masks.manifest.sparsity == 0.75
    assert masks.manifest.weights_hash == weights_of(losing_toy()).content_hash()


@pytest.mark.parametrize("score", SCORES)
def test_without_revival_the_model_is_as_sparse_as_the_masks_at_every_step(score, caplog):
    model, optimizer, pruning = begun(score=score, revive=False)

    def look(step):
        if step >= 3:
            pruning.check()
            assert all_equal(zeros_of(model), removed_of(pruning.masks()))

    with caplog.at_level(logging.ERROR):
        train(model, optimizer, 20, clip=0.1, after=look)


def test_with_revival_removed_weights_train_on_between_two_choices():
    model, optimizer, pruning = begun()
    zeros = []

    train(
        model,
        optimizer,
        20,
        after=lambda _: zeros.append(sum(int(z.sum()) for z in zeros_of(model).values())),
    )

    removed = [int(pruning._rising.rise.timetable.level(0.75, s) * 960) for s in range(1, 21)]
    assert zeros[2] == removed[2] > 0
    assert zeros[3] == zeros[4] == 0
    assert zeros[15:] == [720] * 5


def test_gradients_are_read_once_per_step_and_are_those_the_optimizer_sees(monkeypatch):
    seen = []
    observe = RisingMasks.observe

    def watching(self, gradients):
        seen.append({name: g.clone() for name, g in gradients.items()})
        observe(self, gradients)

    monkeypatch.setattr(RisingMasks, "observe", watching)
    model, optimizer, _ = begun()
    batches = toy_batches(3)
    model.eval()
    for batch in batches:  # one step, of three batches
        loss_of(model, batch).backward()
    expected = {
        n: w.parameter.grad.clone()
        for n, w in weights_of(model).items()
        if w.parameter.grad is not None
    }
    optimizer.step()

    assert len(seen) == 1
    assert all_equal(seen[0], expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("revive", [True, False])
@pytest.mark.parametrize("kind", [ADAMW, partial(torch.optim.LBFGS, lr=0.01, max_iter=1)])
def test_under_a_closure_masks_and_weights_are_those_without(score, revive, kind):
    """L-BFGS of one iteration steps with the first gradients of its closure, as the others do."""
    runs = []
    for closure in (False, True):
        model = losing_toy()
        optimizer = kind(model.parameters())
        pruning = pruning_of(model, score=score, revive=revive).attach(optimizer)
        if kind is ADAMW or closure:
            train(model, optimizer, 20, clip=0.1, closure=closure)
        else:  # it steps with nothing but a closure, here one that has computed them before
            step = optimizer.step
            optimizer.step = lambda step=step: step(lambda: torch.zeros(()))
            train(model, optimizer, 20, clip=0.1)
        runs.append((model, pruning))

    (plain, without), (closed, with_closure) = runs
    assert with_closure.masks() == without.masks()
    assert all_equal(closed.state_dict(), plain.state_dict())


@pytest.mark.parametrize("kind", ["sam", "lbfgs"])
def test_a_closure_called_several_times_is_one_sample_of_the_weights_before(kind, monkeypatch):
    model = losing_toy()
    calls, seen = [], []
    observe = RisingMasks.observe

    def watching(self, gradients):
        seen.append(({name: g.clone() for name, g in gradients.items()}, copied(model)))
        observe(self, gradients)

    class Twice(torch.optim.Optimizer):
        """Looks at the gradients a second time at other weights, as SAM does."""

        def __init__(self, parameters):
            super().__init__(parameters, {})
            self.base = ADAMW([p for group in self.param_groups for p in group["params"]])

        @torch.no_grad()
        def step(self, closure):
            closure = torch.enable_grad()(closure)
            closure()
            moved = [p for p in model.parameters() if p.grad is not None]
            torch._foreach_add_(moved, 0.1)
            closure()
            torch._foreach_sub_(moved, 0.1)
            self.base.step()

    def copied(model):
        return {name: w.parameter.detach().clone() for name, w in weights_of(model).items()}

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, toy_batches(1)[0])
        loss.backward()
        gradients = {n: w.parameter.grad for n, w in weights_of(model).items()}
        calls.append({n: g.clone() for n, g in gradients.items() if g is not None})
        return loss

    monkeypatch.setattr(RisingMasks, "observe", watching)
    kinds = {"sam": Twice, "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3)}
    optimizer = kinds[kind](model.parameters())
    model.eval()
    with pruning_of(model).attach(optimizer) as pruning:
        before = copied(model)
        optimizer.step(closure)

    assert len(calls) > 1
    assert len(seen) == pruning.step == 1
    assert all_equal(seen[0][0], calls[0])
    assert all_equal(seen[0][1], before)


def test_lightning_whose_steps_have_closures_prunes_as_the_loop(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    batches = toy_batches(20, seed=1)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = losing_toy().eval()
            self.pruning = pruning_of(self.inner, score="taylor")

        def training_step(self, batch, _):
            return loss_of(self.inner.eval(), batch)

        def configure_optimizers(self):
            optimizer = ADAMW(self.inner.parameters())
            self.pruning.attach(optimizer)
            return optimizer

    module = Module()
    trainer = lightning.Trainer(
        max_steps=20,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    model, optimizer, pruning = begun(score="taylor")
    train(model, optimizer, 20, batches=batches)

    assert module.pruning.step == 20
    assert module.pruning.masks() == pruning.masks()
    assert all_equal(module.inner.state_dict(), model.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_gradient_scaler_is_taken_out(fused, monkeypatch):
    """Power-of-two scales change no bit, so that the states are equal, not only alike."""
    plain, scaled = losing_toy(), losing_toy()
    plain_optimizer = ADAMW(plain.parameters(), fused=fused)
    scaled_optimizer = ADAMW(scaled.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    one = pruning_of(plain).attach(plain_optimizer)
    other = pruning_of(scaled).attach(scaled_optimizer)
    train(plain, plain_optimizer, 5)

    scaled.eval()
    for batch in toy_batches(5, seed=1):
        scaled_optimizer.zero_grad()
        scaler.scale(loss_of(scaled, batch)).backward()
        scaler.step(scaled_optimizer)
        scaler.update()

    assert all_equal(other.state_dict(), one.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_is_not_counted_and_leaves_no_trace(fused):
    model = losing_toy()
    optimizer = ADAMW(model.parameters(), fused=fused)
    pruning = pruning_of(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train(model, optimizer, 1)
    before = {name: value.clone() for name, value in pruning.state_dict().items()}

    optimizer.zero_grad()
    scaler.scale(loss_of(model, toy_batches(1)[0])).backward()
    model.feed.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()

    assert pruning.step == 1
    assert all_equal(pruning.state_dict(), before)
    pruning.skip_step()
    assert pruning.step == 2


@pytest.mark.parametrize(
    ("score", "revive", "stop"),
    [
        ("platon", True, 1),  # in the initial warm-up
        ("platon", True, 7),  # between two choices
        ("platon", True, 9),  # right after one
        ("platon", False, 7),
        ("platon", False, 9),
        ("platon", True, 16),  # after the last one
        ("platon", False, 18),
        ("taylor", True, 7),
        ("taylor", False, 9),
        ("magnitude", False, 7),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(score, revive, stop, tmp_path):
    whole_model, whole_optimizer, whole = begun(score=score, revive=revive)
    train(whole_model, whole_optimizer, 20)

    model, optimizer, pruning = begun(score=score, revive=revive)
    train(model, optimizer, stop, batches=toy_batches(20, seed=1))
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "pruning": pruning.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    save_file(pruning.state_dict(), tmp_path / "pruning.safetensors")
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all_equal(load_file(tmp_path / "pruning.safetensors"), found["pruning"])

    again = losing_toy()
    again.load_state_dict(found["model"])
    second = ADAMW(again.parameters())
    second.load_state_dict(found["optimizer"])
    resumed = pruning_of(again, score=score, revive=revive)
    resumed.load_state_dict(found["pruning"])
    resumed.attach(second)
    assert resumed.step == stop
    train(again, second, 20, first=stop)

    assert resumed.masks() == whole.masks()
    assert resumed.masks().manifest.weights_hash == whole.masks().manifest.weights_hash
    assert all_equal(again.state_dict(), whole_model.state_dict())


def test_the_state_of_another_run_is_refused_and_says_why():
    _, _, pruning = begun()
    state = pruning.state_dict()
    other = partial(pruning_of, losing_toy())

    with pytest.raises(MaskError, match=r"its sparsity|its target is 0\.75, this one's is 0\.5"):
        other(sparsity=0.5).load_state_dict(state)
    with pytest.raises(MaskError, match="its steps is 20, this one's is 40"):
        other(steps=40).load_state_dict(state)
    with pytest.raises(MaskError, match=r"its beta2 is 0\.95"):
        other(score=Platon(beta2=0.9)).load_state_dict(state)
    with pytest.raises(MaskError, match="no state of gradual pruning"):
        other().load_state_dict({})


def test_the_state_of_an_earlier_step_lets_go_of_the_zeros():
    model, optimizer, pruning = begun()
    states = {}

    def keep(step):
        if step == 6:
            states.update({key: value.clone() for key, value in pruning.state_dict().items()})

    train(model, optimizer, 20, after=keep)
    pruning.load_state_dict(states)
    assert not pruning.finished

    train(model, optimizer, 7, first=6)
    assert not any(bool(zeros.any()) for zeros in zeros_of(model).values())
    train(model, optimizer, 20, first=7)
    pruning.check()
    assert all_equal(zeros_of(model), removed_of(pruning.masks()))


def test_a_damaged_state_is_refused_and_changes_nothing():
    model, optimizer, pruning = begun()
    train(model, optimizer, 7)
    state = pruning.state_dict()
    fresh = pruning_of(losing_toy())
    damaged = [
        state | {"about": state["about"][:-5]},
        state | {"keep|text.q": state["keep|text.q"][:-1]},
        state | {"state|sensitivity|text.q": torch.zeros(3)},
        {name: value for name, value in state.items() if name != "keep|text.q"},
    ]

    for each in damaged:
        with pytest.raises(MaskError, match="damaged"):
            fresh.load_state_dict(each)

    assert fresh.step == 0
    fresh.load_state_dict(state)
    assert fresh.step == 7


def test_masks_on_the_way_are_told_of(caplog):
    model, optimizer, pruning = begun()
    train(model, optimizer, 6)

    with caplog.at_level(logging.WARNING):
        masks = pruning.masks()

    assert "of step 6" in caplog.text
    assert masks.sparsity == pytest.approx(pruning.sparsity)


def test_before_the_first_choice_everything_is_kept():
    _, _, pruning = begun()

    assert pruning.sparsity == 0
    assert pruning.masks().removed == 0


def test_intrinsic_dimensions_are_the_factors(tmp_path):
    weights = weights_of(losing_toy())
    layers = tuple(
        LayerDimension(
            n, "s", 0, "m", w.modality, 0, 9.0 if w.modality == "text" else 1.0, 0.1, 5, 50
        )
        for n, w in weights.items()
    )
    profile = IdProfile(layers, weights.structure, "toy")
    profile.save(tmp_path / "id.json")
    sparsities = {}
    for name, given in (("plain", None), ("profile", profile), ("file", tmp_path / "id.json")):
        model, optimizer, pruning = begun(id_profile=given)
        train(model, optimizer, 20)
        counts = pruning.masks().counts()
        sparsities[name] = counts.by_modality["text"].sparsity
        assert counts.all.removed == 720
    by_hand = {name: 9.0 if w.modality == "text" else 1.0 for name, w in weights.items()}
    model, optimizer, pruning = begun(factors=by_hand)
    train(model, optimizer, 20)

    assert sparsities["profile"] == sparsities["file"] < sparsities["plain"]
    assert pruning.masks().counts().by_modality["text"].sparsity == sparsities["profile"]
    assert pruning.masks().manifest.method == "id*platon"
    with pytest.raises(UnsupportedError, match="not both"):
        pruning_of(losing_toy(), factors=by_hand, id_profile=profile)


def test_budgets_and_allocations_by_name():
    model, optimizer, pruning = begun(sparsity={"vision": 0.5, "text": 0.8}, allocation="modality")
    train(model, optimizer, 20)

    counts = pruning.masks().counts().by_modality
    assert counts["vision"].removed == int(0.5 * counts["vision"].total)
    assert counts["text"].removed == int(0.8 * counts["text"].total)


def test_letting_go_and_taking_up_again():
    model, optimizer, pruning = begun()
    train(model, optimizer, 20)
    pruning.detach()
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 21, first=20)
    with pytest.raises(MaskError):
        pruning.check()

    with pruning.attach(optimizer):
        pruning.check()
        train(model, optimizer, 22, first=21, after=lambda _: pruning.check())
        with pytest.raises(UnsupportedError, match="detach"):
            pruning.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_weights_outside_the_optimizer_are_no_business_of_gradient_scores():
    model = losing_toy()
    some = ADAMW([p for n, p in model.named_parameters() if not n.startswith("feed")])

    with pytest.raises(UnsupportedError, match=r"1 of 19 prunable.*'text\.feed'"):
        pruning_of(model).attach(some)
    pruning = pruning_of(model, score="magnitude").attach(some)
    train(model, some, 20)

    assert pruning.masks().removed == 720
    assert all_equal(zeros_of(model), removed_of(pruning.masks()))


def test_the_adapter_that_claims_the_model_is_found():
    model = model_from_golden(Path(__file__).parents[2] / "golden" / "blip")

    masks = GradualPruning(model, sparsity=0.5, steps=10).masks()

    assert masks.manifest.adapter == "blip"
    assert "text.0.ffn.fc2" in masks


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="'movement'"):
        pruning_of(losing_toy(), score="movement")
    with pytest.raises(UnsupportedError, match=r"not a torch\.optim"):
        pruning_of(losing_toy()).attach(object())
