"""Bytes by URL: files, commits, leases' conditional creates, probes. The only room that knows fsspec and s3fs."""
