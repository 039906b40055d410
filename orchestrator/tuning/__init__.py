"""Sweeps: which recipe is best, found by many trials on a cluster."""
