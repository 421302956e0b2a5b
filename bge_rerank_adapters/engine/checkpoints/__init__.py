"""Checkpoints: where their folders come from, and the one that comes with the package."""
