"""Tests of the ensemble room."""
