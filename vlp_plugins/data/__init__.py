"""Images with captions, questions or classes, and the batches made of them. Rank 2."""
