"""Checkpoints and final weights: save, verify, load, remove old ones."""
