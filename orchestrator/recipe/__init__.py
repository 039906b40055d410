"""What the paper prescribes: values (recipes, presets) and pure functions (schedule, loss, average, metrics)."""
