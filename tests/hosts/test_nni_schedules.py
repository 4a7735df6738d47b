"""Our pruners inside of NNI's schedules and beside its other compressors."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("nni", reason="the host is an extra")

import nni
import nni_examples as examples
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, LevelPruner, LinearPruner
from nni.compression.utils import TorchEvaluator

from vlp_plugins.hosts import nni as host
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import DataError, UnsupportedError

LINEARS = [{"op_types": ["Linear"], "sparse_ratio": 0.6}]
FIRST = [{"op_names": ["first"], "sparse_ratio": 0.5}]
AGAIN = [{"op_names": ["again"], "sparse_ratio": 0.3}]
TOTAL = 200


def watched(pruner):
    """Counts what every update of the masks removes."""
    counts, update = [], pruner.update_masks

    def counting(masks):
        update(masks)
        counts.append(host.masks_of(pruner).removed)

    pruner.update_masks = counting
    return counts


@pytest.mark.parametrize(
    ("schedule", "ratios"),
    [
        (LinearPruner, [0.25, 0.5, 0.75, 1.0]),
        (AGPPruner, [1 - (1 - t / 4) ** 3 for t in (1, 2, 3, 4)]),
    ],
)
@pytest.mark.parametrize("inner", [True, False])
def test_every_update_is_exact_and_from_the_dense_weights_of_the_moment(schedule, ratios, inner):
    model = examples.net()
    evaluator = examples.torch_evaluator(model)
    pruner = host.MagnitudePruner(model, LINEARS, evaluator if inner else None)
    counts = watched(pruner)
    before = dict(examples.net().named_parameters())
    scheduled = schedule(
        pruner, interval_steps=2, total_times=4, evaluator=None if inner else evaluator
    )

    _, theirs = scheduled.compress(max_steps=8, max_epochs=None)
    dense = {n: p.detach().clone() for n, p in model.named_parameters() if "_nni_wrapper" in n}
    masks = host.masks_of(scheduled)
    final = host.finalize(scheduled)

    assert counts == [int(0.6 * ratio * TOTAL) for ratio in ratios]
    assert theirs["first"]["weight"].dtype == torch.float32
    assert torch.equal(theirs["first"]["weight"] != 0, masks["first"])
    assert final is model
    copy = examples.net()
    copy.load_state_dict(final.state_dict())
    for name, value in dense.items():
        copy.get_parameter(name.replace("_nni_wrapper.", "")).data.copy_(value)
    assert masks == prune(copy, method="magnitude", sparsity=0.6, adapter=ModuleAdapter(copy))
    assert all((p != before[name]).any() for name, p in copy.named_parameters())


def test_ties_hold_in_training_and_afterwards():
    model = examples.net()
    pruner = host.MagnitudePruner(model, LINEARS, examples.torch_evaluator(model))
    scheduled = LinearPruner(pruner, interval_steps=1, total_times=4)
    seen = []
    model.register_forward_pre_hook(
        lambda *_: seen.append(
            model.second._nni_wrapper.weight is model.again._nni_wrapper.weight
            and torch.equal(
                model.second._nni_wrapper.weight_mask, model.again._nni_wrapper.weight_mask
            )
        )
    )

    scheduled.compress(max_steps=6, max_epochs=None)
    final = host.finalize(scheduled)

    assert len(seen) == 6
    assert all(seen)
    assert final.again.weight is final.second.weight
    assert (final.second.weight != examples.net().second.weight).any()
    assert examples.sparsity(final.second.weight) > 0


def test_training_under_a_schedule_is_plain_training_until_the_first_masks():
    """Wrapped and tied, the model learns exactly what it learns without NNI."""
    model, plain = examples.net(), examples.net()
    pruner = host.MagnitudePruner(model, LINEARS, examples.torch_evaluator(model))
    scheduled = LinearPruner(pruner, interval_steps=4, total_times=1)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    examples.training(plain, optimizer, examples.training_step, max_steps=4)

    scheduled.compress(max_steps=4, max_epochs=None)

    for name, value in plain.named_parameters():
        module, _, parameter = name.rpartition(".")
        wrapped = model.get_submodule(module)
        holder = getattr(wrapped, "_nni_wrapper", wrapped) if parameter == "weight" else wrapped
        assert torch.equal(holder.get_parameter(parameter), value), name


@pytest.mark.parametrize("method", ["multiflow", "snip", "chita"])
def test_methods_with_data_read_it_anew_at_every_update(method):
    model = examples.net()
    loss = lambda model, batch: examples.training_step(batch, model)  # noqa: E731
    adapter = ModuleAdapter(model, loss=loss)
    reads = []

    class Counting(list):
        def __iter__(self):
            reads.append(len(self))
            return super().__iter__()

    options = examples.QUICK.get(method, {})
    pruner = host.pruner_class(method)(
        model,
        LINEARS,
        examples.torch_evaluator(model),
        batches=Counting(examples.net_batches()),
        adapter=adapter,
        **options,
    )
    counts = watched(pruner)
    once = len(reads)
    scheduled = LinearPruner(pruner, interval_steps=1, total_times=3)
    scheduled.compress(max_steps=3, max_epochs=None)
    final = host.finalize(scheduled)

    assert len(reads) - once >= 3
    assert counts == [40, 80, 120]
    zeros = sum(int((w.parameter == 0).sum()) for w in WeightMap.of(final, adapter).values())
    assert zeros == 120


def test_a_generator_of_batches_does_not_serve_a_schedule():
    model = examples.net()
    pruner = host.MultiflowPruner(
        model, LINEARS, examples.torch_evaluator(model), batches=iter(examples.net_batches())
    )
    scheduled = LinearPruner(pruner, interval_steps=1, total_times=3)
    with pytest.raises(DataError, match="read once"):
        scheduled.compress(max_steps=3, max_epochs=None)


def test_weights_that_the_optimizer_lacks_are_an_error():
    model = examples.net()
    evaluator = examples.torch_evaluator(model, model.last.parameters())
    pruner = host.MagnitudePruner(model, LINEARS, evaluator)
    scheduled = LinearPruner(pruner, interval_steps=1, total_times=2)
    with pytest.raises(UnsupportedError, match="2 of 3 pruned weights.*evaluator to the inner"):
        scheduled.compress(max_steps=2, max_epochs=None)


def test_weights_that_are_frozen_need_no_optimizer():
    model = examples.net()
    model.first.requires_grad_(False)
    model.second.requires_grad_(False)
    model.again.requires_grad_(False)
    evaluator = examples.torch_evaluator(model, model.last.parameters())
    scheduled = LinearPruner(
        host.MagnitudePruner(model, LINEARS, evaluator), interval_steps=1, total_times=2
    )
    scheduled.compress(max_steps=2, max_epochs=None)
    assert host.masks_of(scheduled).removed == 120


def test_an_optimizer_of_another_model_is_an_error():
    model = examples.net()
    evaluator = examples.torch_evaluator(examples.net())
    scheduled = LinearPruner(
        host.MagnitudePruner(model, LINEARS, evaluator), interval_steps=1, total_times=2
    )
    with pytest.raises(UnsupportedError, match="3 of 3 pruned weights are in no optimizer"):
        scheduled.compress(max_steps=2, max_epochs=None)


def test_an_end_before_the_last_update_is_told(caplog):
    model = examples.net()

    def short(model, optimizer, step, scheduler=None, max_steps=None, max_epochs=None):
        examples.training(model, optimizer, step, max_steps=3)

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    evaluator = TorchEvaluator(short, optimizer, examples.training_step)
    pruner = host.MagnitudePruner(model, LINEARS, evaluator)
    scheduled = LinearPruner(pruner, interval_steps=1, total_times=4)
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        scheduled.compress(max_steps=4, max_epochs=None)

    assert "ended 1 of 4 updates of the masks early" in caplog.text
    assert host.masks_of(scheduled).removed == int(0.6 * 0.75 * TOTAL)


def test_a_pruner_alone_does_not_train():
    pruner = host.OmpPruner(examples.net(), LINEARS)
    with pytest.raises(UnsupportedError, match="AGPPruner or LinearPruner"):
        pruner.compress(max_steps=3)


def test_after_a_pruner_of_nni_on_other_layers():
    model = examples.net()
    evaluator = examples.torch_evaluator(model)
    level = LevelPruner(model, [{"op_names": ["last"], "sparse_ratio": 0.5}], evaluator)
    pruner = host.MagnitudePruner.from_compressor(
        level, [{"op_names": ["first", "second"], "sparse_ratio": 0.6}]
    )
    level.interval_steps = 2
    pruner.interval_steps = 2

    pruner.compress(max_steps=2, max_epochs=None)
    final = host.finalize(pruner)

    assert examples.sparsity(final.last.weight) == 0.5
    assert examples.sparsity(final.first.weight) + examples.sparsity(final.second.weight) > 0
    assert final.again.weight is final.second.weight
    assert not any("_nni" in name for name in final.state_dict())
    masks = host.masks_of(pruner)
    assert isinstance(masks.manifest, Manifest)
    assert masks.removed == 96 + 20


def test_before_a_pruner_of_nni_on_other_layers():
    model = examples.net()
    pruner = host.MagnitudePruner(
        model, [{"op_names": ["second"], "sparse_ratio": 0.6}], examples.torch_evaluator(model)
    )
    level = LevelPruner.from_compressor(pruner, [{"op_names": ["last"], "sparse_ratio": 0.5}])
    level.interval_steps = pruner.interval_steps = 2

    level.compress(max_steps=2, max_epochs=None)
    with pytest.raises(UnsupportedError, match="'last' is wrapped by a compressor"):
        host.finalize(pruner)
    final = host.finalize(level)

    assert final.again.weight is final.second.weight
    assert host.masks_of(level).removed == 60 + 20
    assert not any("_nni" in name for name in final.state_dict())


def test_masks_that_would_never_be_made_are_an_error(caplog):
    def pair(evaluator):
        model = examples.net()
        trained = examples.torch_evaluator(model) if evaluator else None
        first = host.MagnitudePruner(model, FIRST, trained)
        return first, lambda: host.LampPruner.from_compressor(first, AGAIN)

    for steps, evaluator, words in ((None, True, "max_steps"), (2, False, "an evaluator")):
        with pytest.raises(UnsupportedError, match=words):
            pair(evaluator)[1]().compress(max_steps=steps)
    with pytest.raises(UnsupportedError, match="would make no masks in this training"):
        pair(True)[1]().compress(max_steps=2)

    first, second = pair(True)
    first.compress()
    both = second()
    both.interval_steps = 2
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        both.compress(max_steps=2)
    assert "early" not in caplog.text
    assert int((host.finalize(both).first.weight == 0).sum()) == 30


def test_two_methods_on_one_model():
    model = examples.net()
    first = host.MagnitudePruner(model, FIRST, examples.torch_evaluator(model))
    second = host.LampPruner.from_compressor(first, AGAIN)
    first.interval_steps, second.interval_steps = 1, 2

    second.compress(max_steps=2)
    final = host.finalize(second)

    assert int((final.first.weight == 0).sum()) == 30
    assert int((final.second.weight == 0).sum()) == 30
    assert final.again.weight is final.second.weight


def test_together_with_distillation_which_reads_outputs():
    model, teacher = examples.net(), examples.net()
    evaluator = examples.torch_evaluator(model)
    pruner = host.MagnitudePruner(model, LINEARS, evaluator)
    scheduled = LinearPruner(pruner, interval_steps=1, total_times=2)
    distiller = DynamicLayerwiseDistiller.from_compressor(
        scheduled,
        [{"op_names": ["first"], "lambda": 0.1, "apply_method": "mse", "link": "auto"}],
        teacher_model=teacher,
        teacher_predict=lambda batch, model: model(batch[0]),
    )

    distiller.compress(max_steps=3, max_epochs=None)
    final = host.finalize(scheduled)

    assert host.masks_of(scheduled).removed == 120
    assert final.again.weight is final.second.weight


def test_a_layer_belongs_to_one_compressor():
    level = LevelPruner(examples.net(), [{"op_names": ["last"], "sparse_ratio": 0.5}])
    with pytest.raises(UnsupportedError, match="last is pruned or fused by another compressor"):
        host.MagnitudePruner.from_compressor(level, LINEARS)
