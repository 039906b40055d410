"""Baseline networks that the paper compares with."""
