"""Layer-wise reconstruction: the weights that stay make up for those that go."""
