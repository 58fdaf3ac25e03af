"""A conversation, without a page."""
