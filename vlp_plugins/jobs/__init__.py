"""What a command runs: recipes, models, data, results. Rank 9."""
