"""Saved models: how they lie in their files, and how they become models again."""
