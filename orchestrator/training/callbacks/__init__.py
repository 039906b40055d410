"""Callbacks of the training loop: the built-in ones, and the base class of the user's own."""
