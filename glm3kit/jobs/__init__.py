"""A run as a folder; starting and watching its ranks."""
