"""Rerankers made of decoders."""
