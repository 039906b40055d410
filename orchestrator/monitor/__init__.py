"""State of runs, read from storage alone."""
