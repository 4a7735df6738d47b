"""Fine-tuning of a pruned model with its zeros kept."""
