"""The lock: zeros stay zero under whatever an optimizer does, and everything else trains."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn
from toy import toy_batches
from toy_loops import ADAPTER, loss_of, removed_of, train, weights_of, zeros_of
from toy_loss import losing_toy
from toy_masks import ADAPTER as FAMILY
from toy_masks import Captioning, Pretraining

from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import MaskError, UnsupportedError

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
AMSGRAD = partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True)


def masks_for(model, sparsity=0.75):
    return prune(model, adapter=ADAPTER, method="omp", sparsity=sparsity)


def all_equal(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW, AMSGRAD], ids=["sgd", "adamw", "amsgrad"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_exactly_what_is_masked_is_zero_after_every_step(optimizer, accumulate):
    model = losing_toy()
    masks = masks_for(model)
    before = {name: w.parameter.detach().clone() for name, w in weights_of(model).items()}
    optimizer = optimizer(model.parameters())
    steps = []

    def look(step):
        steps.append(step)
        assert all_equal(zeros_of(model), removed_of(masks))
        lock.check()

    lock = SparsityLock(model, masks, ADAPTER).attach(optimizer)
    train(model, optimizer, 8, accumulate=accumulate, after=look)

    assert steps == list(range(1, 9))
    for name, weight in weights_of(model).items():
        kept = masks[name] & (before[name] != 0)
        assert bool((weight.parameter != before[name])[kept].all()), name


def test_a_lock_that_comes_late_is_stronger_than_the_momentum():
    model = losing_toy()
    optimizer = ADAMW(model.parameters())
    train(model, optimizer, 5)
    masks = masks_for(model)

    SparsityLock(model, masks, ADAPTER).attach(optimizer)

    assert all_equal(zeros_of(model), removed_of(masks))
    train(model, optimizer, 5, after=lambda _: _same(model, masks))


def _same(model, masks):
    assert all_equal(zeros_of(model), removed_of(masks))


def test_without_the_lock_the_zeros_are_gone_after_one_step():
    model = losing_toy()
    masks = masks_for(model)
    masks.apply(model, ADAPTER)

    train(model, ADAMW(model.parameters()), 1)

    assert not all_equal(zeros_of(model), removed_of(masks))


def test_removed_elements_count_in_no_gradient_norm():
    model = losing_toy()
    masks = masks_for(model, 0.9)
    SparsityLock(model, masks, ADAPTER).attach(ADAMW(model.parameters()))

    loss_of(model, toy_batches(1)[0]).backward()

    for name, weight in weights_of(model).items():
        if weight.parameter.grad is not None:
            assert not bool(weight.parameter.grad[~masks[name]].any())
    assert any(
        w.parameter.grad is not None and w.parameter.grad.any() for w in weights_of(model).values()
    )


def test_training_is_that_of_a_model_whose_gradients_and_weights_are_masked_by_hand():
    locked, by_hand = losing_toy(), losing_toy()
    masks = masks_for(locked)
    first, second = ADAMW(locked.parameters()), ADAMW(by_hand.parameters())
    SparsityLock(locked, masks, ADAPTER).attach(first)
    masks.apply(by_hand.eval(), ADAPTER)
    weights = weights_of(by_hand)

    train(locked, first, 6, clip=0.01)
    for batch in toy_batches(6, seed=1):
        second.zero_grad()
        loss_of(by_hand, batch).backward()
        for name, weight in weights.items():
            if weight.parameter.grad is not None:
                weight.parameter.grad[~masks[name]] = 0
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.01)
        second.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.parameter[~masks[name]] = 0

    assert all_equal(dict(locked.named_parameters()), dict(by_hand.named_parameters()))


def test_a_weight_without_a_gradient_stays_as_it_is():
    model = losing_toy()
    masks = masks_for(model)
    lock = SparsityLock(model, masks, ADAPTER).attach(SGD(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = None

    lock.mask_gradients()

    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_parameters_that_are_several_objects_are_one_weight():
    model = losing_toy()
    model.decoder_out.weight = nn.Parameter(model.encoder_out.weight.detach())
    masks = masks_for(model)
    optimizer = SGD(model.parameters())

    SparsityLock(model, masks, ADAPTER).attach(optimizer)
    loss_of(model, toy_batches(1)[0]).backward()

    for layer in (model.encoder_out, model.decoder_out):
        assert layer.weight.grad.any()
        assert not layer.weight.grad[~masks["text.out_proj"]].any()
    optimizer.step()
    assert not model.decoder_out.weight[~masks["text.out_proj"]].any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(fused):
    model = losing_toy()
    masks = masks_for(model)
    optimizer = ADAMW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    lock = SparsityLock(model, masks, ADAPTER).attach(optimizer)

    for batch in toy_batches(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        lock.check()

    assert all_equal(zeros_of(model), removed_of(masks))


def test_masks_of_a_pretraining_model_lock_its_captioning_model():
    torch.manual_seed(0)
    masks = prune(Pretraining(), adapter=FAMILY, method="omp", sparsity=0.5)
    model = Captioning()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    SparsityLock(model, masks, FAMILY).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sum(
            parameter.square().sum() + parameter.sum() for parameter in model.parameters()
        ).backward()
        optimizer.step()

    assert torch.equal(model.lm["cross"].weight != 0, masks["text.ffn"])
    assert torch.equal(model.tower["ffn"].weight != 0, masks["vision.ffn"])


def test_rising_masks_and_letting_go():
    model = losing_toy()
    optimizer = ADAMW(model.parameters())
    low, high = masks_for(model, 0.5), masks_for(model, 0.9)

    with SparsityLock(model, low, ADAPTER).attach(optimizer) as lock:
        train(model, optimizer, 2)
        lock.update(high)
        assert lock.violations()  # the next step zeroes them
        train(model, optimizer, 2)
        lock.check()
        assert all_equal(zeros_of(model), removed_of(high))
    train(model, optimizer, 1)

    assert not all_equal(zeros_of(model), removed_of(high))
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_check_names_the_weight_and_counts():
    model = losing_toy()
    masks = masks_for(model)
    lock = SparsityLock(model, masks, ADAPTER)
    lock.apply()
    assert lock.violations() == []
    with torch.no_grad():
        model.feed.weight[~masks["text.feed"]] = 1.0

    found = lock.violations()

    assert [(v.weight, v.revived, v.removed) for v in found] == [
        ("text.feed", int((~masks["text.feed"]).sum()), int((~masks["text.feed"]).sum()))
    ]
    with pytest.raises(MaskError, match="'text.feed'"):
        lock.check()


def test_masks_that_do_not_fit_are_refused_and_change_nothing():
    model = losing_toy()
    masks = masks_for(model)
    lock = SparsityLock(model, masks, ADAPTER)
    with pytest.raises(MaskError, match="adapter"):
        SparsityLock(Pretraining(), masks, ModuleAdapter(Pretraining()))
    for wrong, message in (
        ({name: masks[name] for name in list(masks)[1:]}, "no mask for 'vision.patch'"),
        (
            {**{n: masks[n] for n in masks}, "text.feed": torch.ones(2, 2, dtype=torch.bool)},
            "text.feed",
        ),
        ({**{n: masks[n] for n in masks}, "text.feed": torch.ones(6, 6)}, "float32"),
    ):
        with pytest.raises(MaskError, match=message):
            lock.update(wrong)

    lock.apply()
    assert all_equal(zeros_of(model), removed_of(masks))


def test_an_optimizer_of_another_model_is_refused():
    model = losing_toy()
    lock = SparsityLock(model, masks_for(model), ADAPTER)

    with pytest.raises(UnsupportedError, match="none of the 19 locked weights"):
        lock.attach(SGD(losing_toy().parameters()))


def test_a_weight_that_nobody_trains_is_told_of_and_stays_zero(caplog):
    model = losing_toy()
    masks = masks_for(model)
    head = SGD([p for n, p in model.named_parameters() if not n.startswith("feed")])

    with caplog.at_level(logging.WARNING):
        SparsityLock(model, masks, ADAPTER).attach(head)
    train(model, head, 2)

    assert "1 locked weights require gradients" in caplog.text
    assert "'text.feed'" in caplog.text
    assert all_equal(zeros_of(model), removed_of(masks))


def test_frozen_weights_are_locked_without_a_word(caplog):
    model = losing_toy()
    masks = masks_for(model)
    model.feed.requires_grad_(False)
    trained = SGD([p for p in model.parameters() if p.requires_grad])

    with caplog.at_level(logging.WARNING):
        SparsityLock(model, masks, ADAPTER).attach(trained)
    train(model, trained, 2)

    assert not caplog.text
    assert all_equal(zeros_of(model), removed_of(masks))


def test_only_weights_that_lose_something_take_memory():
    model = losing_toy()
    masks = masks_for(model)
    lock = SparsityLock(model, masks, ADAPTER)
    free = {name: torch.ones_like(masks[name]) for name in masks} | {"text.q": masks["text.q"]}

    lock.update(free)

    assert list(lock._removed) == ["text.q"]
    assert lock._removed["text.q"].dtype == torch.bool


def test_loaded_masks_lock_a_model_in_half_precision(tmp_path):
    masks = masks_for(losing_toy())
    masks.save(tmp_path / "masks.safetensors")
    model = losing_toy().to(torch.bfloat16)
    batch = {
        k: v.to(torch.bfloat16) if v.is_floating_point() else v
        for k, v in toy_batches(1)[0].items()
    }
    optimizer = ADAMW(model.parameters())

    SparsityLock(model, Masks.load(tmp_path / "masks.safetensors"), ADAPTER).attach(optimizer)
    train(model, optimizer, 3, batches=[batch] * 3)

    assert all_equal(zeros_of(model), removed_of(masks))
