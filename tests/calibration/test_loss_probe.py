"""The loss probe: right gradients, and a model that is left as it was found."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy, spoilt

from vlp_plugins.calibration.loss import LOSS_SCALES, LossProbe
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError

TIED = "text.out_proj"


def probe_of(model: nn.Module, adapter: Any = None, **options: Any) -> LossProbe:
    adapter = adapter or LosingAdapter()
    return LossProbe(model, adapter, WeightMap.of(model, adapter), **options)


def measured(probe: LossProbe, batches: Any, names: Any = None) -> list[dict[str, torch.Tensor]]:
    with probe.attached(names):
        return [
            {name: gradient.clone() for name, gradient in (probe.measure(batch, i) or {}).items()}
            for i, batch in enumerate(batches)
        ]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a, b, strict=True)
    )


def by_autograd(batches: Any) -> list[dict[str, torch.Tensor]]:
    """In float64, with the tie cut: encoder and decoder have gradients of their own."""
    model = losing_toy().double().eval()
    model.decoder_out.weight = nn.Parameter(model.encoder_out.weight.detach().clone())
    adapter = LosingAdapter()
    rows = []
    for batch in batches:
        model.zero_grad()
        batch = batch | {"pixel_values": batch["pixel_values"].double()}
        sum(adapter.losses(model, batch).values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        rows.append({name: g.clone() for name, g in grads.items() if g is not None})
    return rows


@pytest.mark.parametrize("tie", ["one Parameter", "one storage"])
def test_gradients_are_those_of_autograd_and_ties_get_the_sum_over_all_uses(tie):
    model = losing_toy()
    if tie == "one storage":
        model.decoder_out.weight = nn.Parameter(model.encoder_out.weight.data)
    batches = toy_batches(3)
    weights = WeightMap.of(model, LosingAdapter())

    rows = measured(probe_of(model), batches)

    for row, exact in zip(rows, by_autograd(batches), strict=True):
        assert row.keys() == set(weights)
        for name, gradient in row.items():
            paths = {owner.path for owner in weights[name].owners}
            expected = sum(exact[path] for path in paths)
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-7)
        both = [exact["encoder_out.weight"], exact["decoder_out.weight"]]
        assert all(part.abs().max() > 0 for part in both)


def test_only_the_weights_that_are_named_have_gradients():
    model = losing_toy()
    names = ["vision.q", TIED]
    probe = probe_of(model)
    with probe.attached(names):
        wanting = {name for name, p in model.named_parameters() if p.requires_grad}
        assert wanting == {"vision.q.weight", "encoder_out.weight"}
        assert list(probe.measure(toy_batches(1)[0], 0)) == names
    every = measured(probe, toy_batches(2))
    for some, row in zip(measured(probe, toy_batches(2), names), every, strict=True):
        for name, gradient in some.items():  # attention may take another kernel: not the same bits
            torch.testing.assert_close(gradient, row[name])


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_the_model_is_left_as_it_was_found(ends):
    model = losing_toy().train()
    model.vision.eval()
    model.head.requires_grad_(False)
    model.text.q.weight.requires_grad_(False)
    kept = torch.ones_like(model.feed.weight)
    model.feed.weight.grad = kept
    flags = [module.training for module in model.modules()]
    wanting = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    batches = toy_batches(3) if ends == "well" else [*toy_batches(2), spoilt(toy_batches(1)[0])]
    try:
        measured(probe_of(model), batches)
    except NonFiniteError:
        assert ends == "badly"

    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanting
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.feed.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["feed.weight"]
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_works_where_the_caller_wants_no_gradients(mode):
    expected = measured(probe_of(losing_toy()), toy_batches(2))
    model = losing_toy()
    with mode():
        found = measured(probe_of(model), toy_batches(2))  # batches made there, too
    assert same(found, expected)
    assert not model.memory.is_inference()


def test_every_pass_starts_from_the_same_state():
    model, probe = losing_toy(), None
    probe = probe_of(model)
    first = measured(probe, toy_batches(3))
    assert same(measured(probe, toy_batches(3)), first)
    assert not same(measured(probe, toy_batches(3)[::-1])[::-1], first), "the order matters"


def test_batches_of_other_processes_are_passed_over():
    probe, batches = probe_of(losing_toy()), toy_batches(4)
    expected = measured(probe, batches)
    for mine in range(4):
        with probe.attached():
            for index, batch in enumerate(batches[:mine]):
                probe.advance(batch, index)
            assert same([probe.measure(batches[mine], mine)], [expected[mine]])


def test_a_set_of_gradients_is_given_up_before_the_next():
    probe = probe_of(losing_toy())
    with probe.attached():
        first = probe.measure(toy_batches(1)[0], 0)
        assert first
        probe.measure(toy_batches(2)[1], 1)
        assert first is probe.measure(toy_batches(1)[0], 2)
    assert first == {}


def test_a_loss_that_draws_numbers_draws_the_same_in_every_pass():
    def noisy(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) * torch.rand(4, 3)).sum()

    model = nn.Sequential(nn.Linear(5, 3))
    batches = [torch.ones(4, 5)] * 2
    adapter = ModuleAdapter(model, loss=noisy)
    torch.manual_seed(1)
    first = measured(probe_of(model, adapter), batches)
    torch.manual_seed(2)
    second = measured(probe_of(model, adapter), batches)
    assert same(first, second)
    assert not torch.equal(first[0]["0"], first[1]["0"]), "every batch has numbers of its own"


def test_a_loss_that_is_not_finite_names_the_batch_and_the_term():
    batches = toy_batches(4)
    batches[2] = spoilt(batches[2])
    with pytest.raises(NonFiniteError, match=r"the loss 'contrast' of batch 2 is nan"):
        measured(probe_of(losing_toy()), batches)


def root_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Finite, but its derivative at 0 is not."""
    return model(batch).sum().sub(model(batch).sum()).abs().sqrt() + model[0](batch).sum()


def test_a_gradient_that_is_not_finite_names_the_batch_and_the_weight():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    probe = probe_of(model, ModuleAdapter(model, loss=root_of))
    with pytest.raises(NonFiniteError, match=r"weight '0' \(0.weight\) has \d+ NaN .* in batch 0"):
        measured(probe, [torch.ones(1, 5)])


def test_batches_that_are_not_finite_can_be_skipped(caplog):
    batches = toy_batches(4)
    expected = measured(probe_of(losing_toy()), [batches[0], batches[2], batches[3]])
    batches[1] = spoilt(batches[1])
    probe = probe_of(losing_toy(), skip_nonfinite=True)
    with caplog.at_level(logging.WARNING, "vlp_plugins.calibration"), probe.attached():
        found = [probe.measure(batch, i) and dict(probe._found) for i, batch in enumerate(batches)]
    assert found[1] is None
    assert same([row for row in found if row is not None], expected)
    assert "skipped batch 1: the loss 'contrast' of batch 1 is nan" in caplog.text


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_gives_float32_gradients_that_are_nearly_the_same(dtype, tolerance):
    batches = toy_batches(2)
    exact = measured(probe_of(losing_toy()), batches)
    found = measured(probe_of(losing_toy(), autocast=dtype), batches)
    for row, wanted in zip(found, exact, strict=True):
        for name, gradient in row.items():
            assert gradient.dtype == torch.float32
            error = (gradient - wanted[name]).norm() / wanted[name].norm()
            assert 0 < error < tolerance, (name, error)


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**14])
def test_float16_gradients_neither_vanish_nor_overflow(factor):
    """Unscaled, the small ones would be 0; scaled by 65536, the large ones would be infinite."""
    adapter = LosingAdapter()
    adapter.factor = factor
    usual = measured(probe_of(losing_toy(), autocast=torch.float16), toy_batches(1))[0]
    found = measured(probe_of(losing_toy(), adapter, autocast=torch.float16), toy_batches(1))[0]
    for name, gradient in found.items():
        error = (gradient / factor - usual[name]).norm() / usual[name].norm()
        assert error < 0.01, (name, error)


def test_the_loss_scale_goes_down_in_powers_of_two_and_ends():
    assert list(LOSS_SCALES) == sorted(LOSS_SCALES, reverse=True)
    assert all(value.hex().startswith("0x1.0000000000000p") for value in LOSS_SCALES)
    assert 2 < len(LOSS_SCALES) < 20


def test_bfloat16_models_give_float32_gradients():
    model = losing_toy().bfloat16()
    batches = [b | {"pixel_values": b["pixel_values"].bfloat16()} for b in toy_batches(1)]
    (row,) = measured(probe_of(model), batches)
    assert {gradient.dtype for gradient in row.values()} == {torch.float32}


def test_weights_that_the_loss_does_not_reach_are_absent():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    adapter = ModuleAdapter(model, loss=lambda m, batch: m["used"](batch).sum())
    (row,) = measured(probe_of(model, adapter), [torch.ones(2, 3)])
    assert list(row) == ["used"]
    assert measured(probe_of(model, adapter), [torch.ones(2, 3)], ["idle"]) == [{}]


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = losing_toy()
    with pytest.raises(UnsupportedError, match="outside torch.inference_mode"):
        measured(probe_of(model), toy_batches(1))


def test_a_family_without_a_loss_says_so():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match="knows no loss"):
        measured(probe_of(model, ModuleAdapter(model)), [torch.ones(1, 3)])
