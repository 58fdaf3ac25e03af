"""Is this machine ready, and what belongs to it."""
