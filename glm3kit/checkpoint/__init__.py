"""Checkpoints on disk: who holds what, what is whole, merging."""
