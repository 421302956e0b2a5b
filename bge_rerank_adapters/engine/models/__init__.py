"""The models of all families and devices: the only part of the package that imports torch."""
