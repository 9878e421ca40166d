"""Token ids in, token ids out: requests, the sequences that answer them, and the one loop that computes them."""
