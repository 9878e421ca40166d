"""From prompt to tokens: sampling, sessions, conversations."""
