"""Layers whose products are oneDNN's."""
