"""MiniMax-M2: its dimensions, its weights, its KV cache and its forward pass."""
