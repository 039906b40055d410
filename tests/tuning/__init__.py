"""Tests of orchestrator/tuning."""
