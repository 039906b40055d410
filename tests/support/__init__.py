"""Fakes and tiny data for tests."""
