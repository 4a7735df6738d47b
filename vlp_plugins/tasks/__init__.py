"""What a model can do: retrieval, captions, answers, classes; fine-tuning; sensitivity. Rank 8."""
