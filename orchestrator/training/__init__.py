"""One process of a training run: world, progress, step, loop, validation, entry. Knows no Ray."""
