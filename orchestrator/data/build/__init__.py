"""Making datasets: pack, index and verify shards."""
