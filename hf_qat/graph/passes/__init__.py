"""Passes over captured graphs: rewrite, fuse, place, connect."""
