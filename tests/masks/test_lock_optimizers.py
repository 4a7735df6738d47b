"""The lock under every way to step an optimizer, and what is saved under it."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from toy import toy_batches
from toy_loops import ADAPTER, loss_of, removed_of, train, zeros_of
from toy_loss import losing_toy
from transformers import AutoModel, BlipTextConfig, BlipVisionConfig

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_plugins.masks.lock import SparsityLock
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import MaskError

MOMENTUM = partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
ADAMW = partial(AdamW, lr=0.01, weight_decay=0.1)


class MasterAdamW(AdamW):
    """Steps float32 copies of what it trains, and rounds them into the parameters."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.trained = [p for group in self.param_groups for p in group["params"]]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.trained]
        self.inner = AdamW(self.masters, **options)

    @torch.no_grad()
    def step(self, closure=None):
        for parameter, master in zip(self.trained, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.step()
        for parameter, master in zip(self.trained, self.masters, strict=True):
            parameter.copy_(master)


OPTIMIZERS = {
    "sgd": MOMENTUM,
    "sgd-foreach": partial(MOMENTUM, foreach=True),
    "sgd-fused": partial(MOMENTUM, fused=True),
    "adamw-foreach": partial(ADAMW, foreach=True),
    "adamw-fused": partial(ADAMW, fused=True),
    "masters": partial(MasterAdamW, lr=0.01, weight_decay=0.1),
}


def masks_for(model):
    return prune(model, adapter=ADAPTER, method="omp", sparsity=0.75)


def all_equal(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("late", [False, True], ids=["first", "late"])
def test_zeros_hold_from_the_first_step_and_against_momentum(optimizer, late):
    model = losing_toy()
    optimizer = optimizer(model.parameters())
    if late:
        train(model, optimizer, 4)
    masks = masks_for(model)
    lock = SparsityLock(model, masks, ADAPTER).attach(optimizer)

    def look(_):
        assert all_equal(zeros_of(model), removed_of(masks))
        lock.check()

    train(model, optimizer, 5, accumulate=2, clip=0.1, after=look)


def test_under_a_closure_removed_weights_count_in_no_average_however_late_they_train():
    """Weights that wanted no gradients when the lock was attached have no hooks of their own."""
    model = losing_toy()
    optimizer = ADAMW(model.parameters())
    masks = masks_for(model)
    model.feed.requires_grad_(False)
    lock = SparsityLock(model, masks, ADAPTER).attach(optimizer)
    model.feed.requires_grad_(True)

    train(model, optimizer, 3, closure=True, after=lambda _: lock.check())

    averages = optimizer.state[model.feed.weight]["exp_avg"]
    assert torch.equal(averages == 0, ~masks["text.feed"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_that_a_scaler_leaves_out_leave_the_zeros(dtype):
    model = losing_toy()
    masks = masks_for(model)
    optimizer = ADAMW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    SparsityLock(model, masks, ADAPTER).attach(optimizer)
    for number, batch in enumerate(toy_batches(4)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, batch)
        scaler.scale(loss * float("inf") if number == 1 else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        assert all_equal(zeros_of(model), removed_of(masks))
    assert scaler.get_scale() == 2.0**9


def test_a_compiled_or_parallel_wrapper_is_looked_into():
    model = losing_toy()
    masks = masks_for(model)
    optimizer = ADAMW(model.parameters())
    wrapper = nn.DataParallel(torch.compile(model))

    with SparsityLock(wrapper, masks, ADAPTER).attach(optimizer):
        train(model, optimizer, 2)

    assert all_equal(zeros_of(model), removed_of(masks))


def test_only_what_is_sparse_is_saved(tmp_path):
    model = losing_toy()
    masks = masks_for(model)
    lock = SparsityLock(model, masks, ADAPTER).attach(ADAMW(model.parameters()))
    file = tmp_path / "model.pt"

    lock.save_checked(torch.save, model.state_dict(), file)
    file.unlink()
    with torch.no_grad():
        model.feed.weight.fill_(1.0)

    with pytest.raises(MaskError, match="'text.feed'"):
        lock.save_checked(torch.save, model.state_dict(), file)
    assert not file.exists()


def tiny_blip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    return BlipForPretraining(
        BlipPretrainConfig(
            vision_config=BlipVisionConfig(**sizes, image_size=16, patch_size=8),
            text_config=BlipTextConfig(
                **sizes, vocab_size=20, max_position_embeddings=8, pad_token_id=0, sep_token_id=3
            ),
            embed_dim=8,
            queue_size=8,
            dec_token_id=5,
            enc_token_id=6,
        )
    )


def test_what_a_locked_model_saves_is_a_plain_checkpoint_with_zeros_and_ties(tmp_path):
    model = tiny_blip()
    plain_keys = set(model.state_dict())
    masks = prune(model, method="omp", sparsity=0.75)
    optimizer = ADAMW(model.parameters())
    lock = SparsityLock(model, masks).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.sin().sum() for p in model.parameters() if p.requires_grad).backward()
        optimizer.step()

    lock.save_checked(model.save_pretrained, tmp_path)

    again = AutoModel.from_pretrained(tmp_path)
    state = again.state_dict()
    assert set(state) == plain_keys
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert masks.verify(again) == []
    assert again.num_parameters() == model.num_parameters()


accelerate = pytest.importorskip("accelerate")


def prepared():
    from vlp_plugins.hosts.accelerate import locked

    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    adapter = ModuleAdapter(model)
    masks = prune(model, adapter=adapter, method="omp", sparsity=0.6)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, ADAMW(model.parameters()))
    return locked, accelerator, model, SparsityLock(model, masks, adapter).attach(optimizer)


def test_accelerate_saves_nothing_that_is_not_sparse(tmp_path):
    locked, accelerator, model, lock = prepared()
    with locked(accelerator, lock):
        accelerator.save_state(str(tmp_path / "good"))
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        for save in (accelerator.save_state, partial(accelerator.save_model, model)):
            with pytest.raises(MaskError, match="not zero"):
                save(str(tmp_path / "bad"))
        lock.apply()
    accelerator.save_state(str(tmp_path / "after"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "good"]


def test_two_models_of_one_accelerator_are_both_watched(tmp_path):
    locked, accelerator, student, first = prepared()
    _, _, other, second = prepared()
    with locked(accelerator, first):
        with locked(accelerator, second):
            for model, lock in ((student, first), (other, second)):
                nn.init.ones_(model[0].weight)
                with pytest.raises(MaskError, match="not zero"):
                    accelerator.save_state(str(tmp_path / "bad"))
                lock.apply()
        nn.init.ones_(student[0].weight)
        with pytest.raises(MaskError, match="not zero"):
            accelerator.save_state(str(tmp_path / "bad"))
        first.apply()
    accelerator.save_state(str(tmp_path / "after"))
    assert [path.name for path in tmp_path.iterdir()] == ["after"]


def test_zeros_are_checked_at_the_end_of_an_accelerate_block():
    locked, accelerator, model, lock = prepared()
    with pytest.raises(MaskError, match="not zero"), locked(accelerator, lock):
        nn.init.ones_(model[0].weight)


def test_the_state_of_a_dense_run_is_zeroed_with_a_word(tmp_path, caplog):
    locked, accelerator, model, lock = prepared()
    nn.init.ones_(model[0].weight)
    accelerator.save_state(str(tmp_path / "dense"))
    lock.apply()
    with caplog.at_level(logging.WARNING), locked(accelerator, lock):
        accelerator.load_state(str(tmp_path / "dense"))
        lock.check()
    assert "not as sparse as the masks" in caplog.text


def test_a_parameter_that_was_replaced_is_no_silent_success():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    masks = prune(model, adapter=ModuleAdapter(model), method="omp", sparsity=0.5)
    lock = SparsityLock(model, masks)
    lock.apply()
    lock.check()

    model[0].weight = nn.Parameter(torch.ones(4, 6))

    with pytest.raises(MaskError, match="another Parameter"):
        lock.check()
