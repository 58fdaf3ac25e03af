"""Text to ids and back, messages and answers."""
