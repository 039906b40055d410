"""Scores of many models on many crops: stored per image, combined into the paper's table."""
