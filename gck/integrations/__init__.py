"""Training frameworks, one module each."""
