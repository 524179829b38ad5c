"""The verbs that a plain training loop calls."""
