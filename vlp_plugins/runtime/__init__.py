"""What everything stands on: errors, processes, memory, files. Rank 0."""
