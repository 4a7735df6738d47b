"""What a model can do: its figures on a task, fine-tuning on one, sensitivity to pruning."""

TASKS = ("retrieval", "captioning", "vqa", "classification", "nlvr2")
"""Every task, for `vlp evaluate` and `vlp finetune`."""

LOSS = "loss"
MEASURED = (*TASKS, LOSS)
"""What `vlp evaluate` and `vlp compare` measure: the tasks, and the model's own loss."""
