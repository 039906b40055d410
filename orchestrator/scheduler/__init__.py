"""Scheduling of many runs on one cluster: plan, capacity, progress, dry run."""
