"""Measurements on a running model: perplexity, KL divergence, importance. Print nothing."""
