"""Commands: one file each, with their exit statuses."""
