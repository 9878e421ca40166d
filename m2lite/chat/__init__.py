"""The terminal conversation."""
