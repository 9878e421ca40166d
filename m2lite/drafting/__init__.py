"""Which tokens may come next, for the model to verify: prompt lookup, prediction modules, and what they cost."""
