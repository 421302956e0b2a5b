"""This package's own kernels in C: their sources, how they are built, and which run here."""
