"""Layers of this package's own kernels for CPUs with AMX."""
