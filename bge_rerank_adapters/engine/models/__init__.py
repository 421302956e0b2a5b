"""The models: the only part of the package that imports torch."""
