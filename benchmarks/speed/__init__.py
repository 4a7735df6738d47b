"""Times of pruning beside the work that nobody can avoid, both measured in one process.

    python -m benchmarks.speed                       names what can be timed
    python -m benchmarks.speed multiflow             times it and prints the figures
    python -m benchmarks.speed multiflow --record    keeps them in benchmarks/results

Other work on the machine only ever adds time: both sides run in turns, and the best round counts.
"""
