"""python -m benchmarks.papers.id_gain: does the intrinsic dimension of layers make pruning better?

Every registered method on both demo models, without fine-tuning: as it is, with the dimension of
each layer for a factor of its importance (`id*NAME`), and with budgets per modality made of the
dimensions (`allocation="id"`). The dimensions are measured from the calibration pairs of each seed.

`ways` is what is run, `cells` runs it and keeps every result in a file, so that a run goes on where
it was stopped, `findings` says what came out.
"""
