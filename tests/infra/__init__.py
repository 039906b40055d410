"""Tests of the cluster's infrastructure: the checks of its manifests, and the scripts of its machines."""
