"""Checkpoints that people own: where they lie, what they are, how they are fetched and opened."""
