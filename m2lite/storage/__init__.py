"""Bytes on disk. Knows no model, no token."""
