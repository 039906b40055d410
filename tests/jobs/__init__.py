"""Tests of the entry points, as people run them."""
