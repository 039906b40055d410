"""Training recipes: values (recipes, presets) and pure functions (schedule, loss, average, metrics)."""
