"""Frozen configurations: strict parsing, dotted overrides, fingerprints, command lines."""
