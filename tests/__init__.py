"""Tests of the project, room by room; tests/support has the fakes."""
