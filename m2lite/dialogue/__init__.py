"""Messages to token ids and back, and a conversation that grows. No loop of its own."""
