"""Tests of the tools that the benchmarks measure with."""
