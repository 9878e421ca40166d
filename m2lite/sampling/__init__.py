"""How a token is drawn from logits, and the rules that change them before. Knows no model."""
