"""Layers that run on any device."""
