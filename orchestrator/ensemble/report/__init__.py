"""Report of an ensemble: HTML page, plots, tables."""
