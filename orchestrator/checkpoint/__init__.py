"""Checkpoints: save, verify, find the newest complete one, keep few. Read by training and evaluation alike."""
