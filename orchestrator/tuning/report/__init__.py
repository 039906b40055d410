"""Report of a sweep: HTML page and plots."""
