"""The papers' tables on real tasks: prune once, fine-tune on a task with the zeros kept, measure.

    python -m benchmarks.papers --list            how many cells of each table are there
    python -m benchmarks.papers main --list       each cell of a table: done, missing or stale
    python -m benchmarks.papers main              runs the cells of a table that are missing
    python -m benchmarks.papers main --render     writes the table and its plot

A cell is one model, pruned one way, fine-tuned on one task: one process, one file in
`benchmarks/results/tables/cells`. Tables share cells: none is computed twice.
"""
