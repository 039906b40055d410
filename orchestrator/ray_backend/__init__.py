"""One run, or a pool of tasks, on a Ray cluster: connect, check, lease, train."""
