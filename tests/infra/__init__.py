"""Tests of what runs the cluster: the checks of its manifests, and the scripts of its machines."""
