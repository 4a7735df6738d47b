"""What a model is to a pruner, and the plug-ins that describe models. Rank 1."""
