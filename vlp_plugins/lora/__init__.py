"""Fine-tunes a pruned model with PEFT's LoRA, and merges what it learned without losing the zeros.

    masks.apply(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=[...]))
    mask_updates(tuned, masks)      # before training, and after loading saved adapters
    ...                             # the usual loop, and save_pretrained as usual
    model = merge(tuned, masks)

The product of the low-rank factors is dense. If it is masked after the training alone, another
update is merged than the one that was trained; `mask_updates` masks it in every forward pass, so
that what is merged is what was trained. Modules that share a weight share their factors, because
one weight can take one update only.
"""

from vlp_plugins.lora.merging import mask_updates, merge, removed_share

__all__ = ["mask_updates", "merge", "removed_share"]
