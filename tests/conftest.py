"""Tests run on one thread: their problems are tiny, and waking threads costs more than the work."""

import torch

torch.set_num_threads(1)
