"""Offline batches: lines of requests in, lines of results out."""
