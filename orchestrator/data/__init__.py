"""Shards, their manifest and indexes, the order of an epoch, reading, decoding, augmentation and test crops."""
