"""Captured graphs and what is done to them; no numerics."""
