"""Faults against real runs on a real Ray cluster: `python -m tests.drills`, three of them as tests."""
