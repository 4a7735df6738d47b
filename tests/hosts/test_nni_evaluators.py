"""NNI's evaluators under the transformers and Lightning of today, with real trainers."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("nni", reason="the host is an extra")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

import nni
import nni_examples as examples
from nni.compression.pruning import AGPPruner, LinearPruner, MovementPruner, TaylorPruner
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vlp_plugins.hosts import nni as host
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune

FEED = [{"op_names_re": [r"bert\.encoder.*dense"], "op_types": ["Linear"], "sparse_ratio": 0.75}]
STEPS = 8


def bert():
    """Two layers whose feed-forward weight is one."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = BertForSequenceClassification(config)
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight
    return model


def data(count=96):
    rng = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 30, (6,), generator=rng),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": torch.randint(0, 2, (), generator=rng),
        }
        for _ in range(count)
    ]


def batches():
    rows = data(16)
    return [
        {key: torch.stack([row[key] for row in rows[i : i + 8]]) for key in rows[0]} for i in (0, 8)
    ]


class Watching(TrainerCallback):
    """Stops after a step, and counts what trainers do."""

    def __init__(self, stop_at=None):
        self.stop_at, self.steps, self.micro_steps = stop_at, 0, 0

    def on_step_end(self, args, state, control, **_):
        self.steps += 1
        if state.global_step == self.stop_at:
            control.should_training_stop = True

    def on_substep_end(self, args, state, control, **_):
        self.micro_steps += 1


def evaluator_for(model, folder, *callbacks, resume=None, optimizer=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 1,  # what the pruner says counts
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **options,
        },
    )
    trainer = nni.trace(Trainer)(
        model=model,
        args=arguments,
        train_dataset=data(),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
    return host.TransformersEvaluator(trainer, resume_from_checkpoint=resume)


def pruned(model, evaluator, method="magnitude", config=FEED, **options):
    # By their layers, also where an adapter claims the model: the loss is the trainer's.
    pruner = host.pruner_class(method)(model, config, evaluator, adapter="module", **options)
    return AGPPruner(pruner, interval_steps=2, total_times=4)


def is_zero_outside(model, masks):
    weights = WeightMap.of(model, ModuleAdapter(model))
    return all(
        torch.equal(weights[n].parameter != 0, masks[n]) for n in masks if not masks[n].all()
    )


@pytest.mark.parametrize("own_optimizer", [False, True])
@pytest.mark.parametrize("method", ["magnitude", "multiflow", "snip"])
def test_a_schedule_counts_optimizer_steps_not_batches(tmp_path, method, own_optimizer):
    model, watching, calls = bert(), Watching(), []
    optimizer = nni.trace(torch.optim.AdamW)(model.parameters(), lr=0.01) if own_optimizer else None
    evaluator = evaluator_for(model, tmp_path, watching, optimizer=optimizer)
    pruner = pruned(model, evaluator, method, batches=batches())
    inner = pruner.bound_pruner
    generate = inner.generate_masks
    inner.generate_masks = lambda: (calls.append(watching.steps), generate())[1]

    pruner.compress(max_steps=STEPS, max_epochs=None)
    masks = host.masks_of(pruner)
    final = host.finalize(pruner)

    assert watching.steps == watching.micro_steps == STEPS
    assert calls == [1, 3, 5, 7]  # in the second step, after that of the optimizer, and so on
    counts = [masks[n].numel() for n in inner.scopes[0].weights]
    assert masks.removed == int(0.75 * sum(counts))
    assert is_zero_outside(final, masks)
    first, second = (layer.intermediate.dense for layer in final.bert.encoder.layer)
    assert first.weight is second.weight
    dense = WeightMap.of(bert(), ModuleAdapter(model))
    for name, weight in WeightMap.of(final, ModuleAdapter(final)).items():
        assert (weight.parameter != dense[name].parameter)[masks[name]].any()


def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    model = bert()
    whole = pruned(model, evaluator_for(model, tmp_path / "whole"))
    whole.compress(max_steps=STEPS, max_epochs=None)

    model = bert()
    evaluator = evaluator_for(model, tmp_path / "half", Watching(stop_at=5), **saving)
    pruned(model, evaluator).compress(max_steps=STEPS, max_epochs=None)
    model, watching = bert(), Watching()
    checkpoint = str(tmp_path / "half" / "checkpoint-5")
    evaluator = evaluator_for(model, tmp_path / "again", watching, resume=checkpoint)
    again = pruned(model, evaluator)
    made = []
    generate = again.bound_pruner.generate_masks
    again.bound_pruner.generate_masks = lambda: (made.append(1), generate())[1]
    again.compress(max_steps=STEPS, max_epochs=None)

    assert watching.steps == STEPS - 5
    assert len(made) == 2  # of four; two were behind
    assert host.masks_of(again) == host.masks_of(whole)
    states = host.finalize(again).state_dict(), host.finalize(whole).state_dict()
    for name, value in states[1].items():
        assert torch.equal(value, states[0][name]), name


def test_masks_of_a_checkpoint_hold_until_the_next_update(tmp_path):
    model = bert()
    evaluator = evaluator_for(
        model, tmp_path, Watching(stop_at=3), save_strategy="steps", save_steps=3
    )
    half = pruned(model, evaluator)
    half.compress(max_steps=STEPS, max_epochs=None)
    expected = host.masks_of(half)

    model = bert()
    resumed = evaluator_for(model, tmp_path / "b", resume=str(tmp_path / "checkpoint-3"))
    again = pruned(model, resumed)
    seen = []
    resumed.traced_trainer.trace_kwargs["callbacks"].append(Looking(again.bound_pruner, seen))
    again.compress(max_steps=STEPS, max_epochs=None)

    assert seen[0] == expected.removed > 0


def test_a_checkpoint_after_the_last_update_has_the_last_masks(tmp_path):
    model = bert()
    evaluator = evaluator_for(
        model, tmp_path, Watching(stop_at=8), save_strategy="steps", save_steps=8
    )
    whole = pruned(model, evaluator)
    whole.compress(max_steps=10, max_epochs=None)

    model = bert()
    evaluator = evaluator_for(model, tmp_path / "b", resume=str(tmp_path / "checkpoint-8"))
    again = pruned(model, evaluator)
    again.compress(max_steps=10, max_epochs=None)

    masks = host.masks_of(again)
    assert masks == host.masks_of(whole)
    assert masks.manifest.method == "magnitude"
    assert is_zero_outside(host.finalize(again), masks)


class Looking(TrainerCallback):
    """What is masked at the beginning of every step."""

    def __init__(self, pruner, seen):
        self.pruner, self.seen = pruner, seen

    def on_step_begin(self, args, state, control, **_):
        counts = {}
        for place in self.pruner._places:
            space = self.pruner._target_spaces[place.module][place.parameter]
            counts[place.weight] = int((space.mask == 0).sum())
        self.seen.append(sum(counts.values()))


def test_checkpoints_of_a_run_hold_the_pruned_weights_under_plain_names(tmp_path):
    model = bert()
    evaluator = evaluator_for(model, tmp_path, save_strategy="steps", save_steps=STEPS)
    pruner = pruned(model, evaluator)
    pruner.compress(max_steps=STEPS, max_epochs=None)

    loaded = BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{STEPS}")

    final = host.finalize(pruner)
    for name, value in final.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_pruners_of_nni_work_with_the_evaluator(tmp_path):
    config = [{"op_names_re": [r"bert\.encoder.*intermediate.*"], "op_types": ["Linear"],
               "sparse_ratio": 0.5, "target_names": ["weight"]}]  # fmt: skip
    model = untied()
    taylor = TaylorPruner(model, config, evaluator_for(model, tmp_path), training_steps=2)
    scheduled = LinearPruner(taylor, interval_steps=2, total_times=2)
    _, masks = scheduled.compress(max_steps=4, max_epochs=None)
    assert {float(m["weight"].mean()) for m in masks.values()} == {0.5}

    model = untied()
    movement = MovementPruner(
        model, config, evaluator_for(model, tmp_path), warmup_step=2, cooldown_begin_step=4
    )
    _, masks = movement.compress(max_steps=6, max_epochs=None)
    assert {float(m["weight"].mean()) for m in masks.values()} == {0.5}


def untied():
    model = bert()
    second = model.bert.encoder.layer[1].intermediate.dense
    second.weight = torch.nn.Parameter(second.weight.detach().clone())
    return model


def test_epochs_are_a_limit_too(tmp_path):
    model, watching = bert(), Watching()
    pruner = pruned(model, evaluator_for(model, tmp_path, watching))
    pruner.compress(max_steps=None, max_epochs=1)
    assert watching.steps == 96 // 8


def test_the_trainers_loss_serves_gradient_methods(tmp_path):
    model = bert()
    adapter = ModuleAdapter(model, loss=lambda model, batch: model(**batch).loss)
    alone = prune(bert(), batches(), method="snip", sparsity=0.5, adapter=adapter)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    evaluator = evaluator_for(model, tmp_path)
    pruner = host.SnipPruner(model, config, evaluator, batches=batches(), adapter="module")
    pruner.compress()
    assert host.masks_of(pruner) == alone


def lightning_model_and_evaluator():
    """A Lightning module, and an evaluator that trains it on `examples.net_batches`."""
    lightning = pytest.importorskip("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = examples.net()
            self.done = 0

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            self.done += 1
            return examples.training_step(batch, self.net)

        def configure_optimizers(self):
            return nni.trace(torch.optim.AdamW)(self.parameters(), lr=0.05)

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(examples.net_batches(4), batch_size=None)

    trainer = nni.trace(lightning.Trainer)(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return Module(), host.LightningEvaluator(trainer, nni.trace(Data)())


def test_the_training_step_of_lightning_is_the_loss_of_gradient_methods():
    model, evaluator = lightning_model_and_evaluator()
    net = examples.net()
    adapter = ModuleAdapter(net, loss=lambda model, batch: examples.training_step(batch, model))
    batches = examples.net_batches(4)
    alone = prune(net, batches, method="snip", sparsity=0.5, adapter=adapter)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    pruner = host.SnipPruner(model, config, evaluator, batches=batches)
    pruner.compress()
    found = host.masks_of(pruner)
    assert {name.removeprefix("net."): mask.tolist() for name, mask in found.items()} == {
        name: mask.tolist() for name, mask in alone.items()
    }


@pytest.mark.parametrize(("limits", "steps"), [((8, None), 8), ((None, 2), 8)])
def test_lightning_trains_as_long_as_the_pruner_says(limits, steps):
    model, evaluator = lightning_model_and_evaluator()
    pruner = host.MagnitudePruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], evaluator)
    scheduled = LinearPruner(pruner, interval_steps=2, total_times=4)

    scheduled.compress(*limits)
    final = host.finalize(scheduled)

    assert model.done == steps
    assert host.masks_of(scheduled).removed == 100
    assert final.net.again.weight is final.net.second.weight
    assert (final.net.last.weight != examples.net().last.weight).all()
