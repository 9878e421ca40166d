"""Strings and token ids: tokenizer, chat template, reply. Knows no weights."""
