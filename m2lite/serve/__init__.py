"""HTTP for clients of OpenAI's and Anthropic's interfaces. Knows requests and events; no tensors, no pages."""
