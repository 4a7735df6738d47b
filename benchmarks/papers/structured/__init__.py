"""python -m benchmarks.papers.structured: which importance keeps most when heads and units are cut?

Both demo models, a quarter and half of all heads and feed-forward units, before and after the same
short fine-tuning: MULTIFLOW's node saliency, its elementwise score, CHITA and magnitudes aggregated
to rows and columns, Torch-Pruning's own group magnitude and group Taylor, and random.

`ways` is what is compared, `tuning` is the fine-tuning, `cells` runs each and keeps every result in
a file, so that a run goes on where it was stopped, `findings` says what came out.
"""
