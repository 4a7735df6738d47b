"""The callbacks under a real `Trainer` of transformers: zeros, checkpoints, and going on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vlp_plugins.hosts.transformers import (
    MASKS_FILE,
    STATE_FILE,
    GradualPruningCallback,
    LockCallback,
)
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import MaskError, UnsupportedError

STEPS = 12


def tiny_model():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


def adapter_for(model):
    return ModuleAdapter(model)


def data(count=96):
    rng = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 30, (6,), generator=rng),
            "labels": torch.randint(0, 2, (), generator=rng),
        }
        for _ in range(count)
    ]


def trainer_for(model, folder, callback, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "save_steps": 5,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **options,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=data(), callbacks=[callback])


def gradual(model, **options):
    return GradualPruningCallback(
        **{"sparsity": 0.75, "every": 2, "warmup": (1, 4), "adapter": adapter_for(model), **options}
    )


def is_zero_outside(model, masks):
    weights = WeightMap.of(model, adapter_for(model))
    return all(torch.equal(weights[n].parameter != 0, masks[n]) for n in masks)


def test_the_lock_keeps_zeros_and_leaves_the_masks_beside_checkpoints(tmp_path):
    model = tiny_model()
    masks = prune(model, adapter=adapter_for(model), method="omp", sparsity=0.8)
    callback = LockCallback(masks, adapter_for(model))

    trainer_for(model, tmp_path, callback).train()

    assert is_zero_outside(model, masks)
    assert Masks.load(tmp_path / "checkpoint-5" / MASKS_FILE) == masks
    assert Masks.load(tmp_path / f"checkpoint-{STEPS}" / MASKS_FILE) == masks
    again = tiny_model()
    trainer_for(again, tmp_path, LockCallback(masks, adapter_for(again))).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    assert is_zero_outside(again, masks)
    state, expected = again.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_other_masks_than_those_of_the_checkpoint_are_refused(tmp_path):
    model = tiny_model()
    low, high = (
        prune(model, adapter=adapter_for(model), method="omp", sparsity=s) for s in (0.5, 0.8)
    )
    trainer_for(model, tmp_path, LockCallback(low, adapter_for(model)), max_steps=5).train()

    again = tiny_model()
    with pytest.raises(MaskError, match="others than those"):
        trainer_for(again, tmp_path, LockCallback(high, adapter_for(again))).train(
            resume_from_checkpoint=True
        )


@pytest.mark.parametrize("score", ["platon", "magnitude"])
def test_gradual_pruning_meets_the_target_and_goes_on_from_a_checkpoint(score, tmp_path):
    model = tiny_model()
    callback = gradual(model, score=score)
    trainer_for(model, tmp_path / "whole", callback).train()
    masks = callback.pruning.masks()

    assert masks.removed == int(0.75 * masks.total)
    assert is_zero_outside(model, masks)
    assert masks.manifest.parameters["steps"] == STEPS
    assert (tmp_path / "whole" / "checkpoint-5" / STATE_FILE).is_file()
    assert not (tmp_path / "whole" / "checkpoint-5" / MASKS_FILE).exists()
    assert Masks.load(tmp_path / "whole" / "checkpoint-10" / MASKS_FILE) == masks

    for stop, elsewhere in ((5, False), (10, True)):
        again = tiny_model()
        folder = tmp_path / "whole" / f"checkpoint-{stop}"
        options = {"resume_from": folder} if elsewhere else {}
        second = gradual(again, score=score, **options)
        out = tmp_path / "elsewhere" if elsewhere else tmp_path / "whole"
        trainer_for(again, out, second, save_strategy="no").train(
            resume_from_checkpoint=str(folder)
        )

        assert second.pruning.masks() == masks
        state, expected = again.state_dict(), model.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    model = tiny_model()
    trainer_for(model, tmp_path, gradual(model), max_steps=6).train()
    (tmp_path / "checkpoint-6" / STATE_FILE).unlink()

    again = tiny_model()
    with pytest.raises(MaskError, match=f"no {STATE_FILE}"):
        trainer_for(again, tmp_path, gradual(again)).train(resume_from_checkpoint=True)


def test_zeros_that_are_none_are_found_at_the_next_checkpoint(tmp_path):
    model = tiny_model()
    callback = gradual(model)

    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 9:
                with torch.no_grad():
                    model.bert.encoder.layer[0].intermediate.dense.weight.fill_(1.0)

    trainer = trainer_for(model, tmp_path, callback, save_steps=9)
    trainer.add_callback(Vandal())

    with pytest.raises(MaskError, match="not zero where they should be"):
        trainer.train()


def test_steps_are_those_of_the_training():
    with pytest.raises(UnsupportedError, match="leave them out"):
        GradualPruningCallback(sparsity=0.5, steps=10)
