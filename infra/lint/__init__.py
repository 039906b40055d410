"""Checks of what is no Python: manifests, launcher files, scripts, images; and that no credential is committed."""
