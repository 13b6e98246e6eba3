"""The search for a circuit, and the scores that it learns from."""
