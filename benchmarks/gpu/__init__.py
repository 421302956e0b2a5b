"""Checks and figures of a GPU within eight minutes from nothing: `python -m benchmarks.gpu`.

Needs torch, transformers, tokenizers, safetensors, numpy and this package; sentence-transformers is
compared with where it is installed, and a plain loop over transformers' model where it is not.
Checkpoints have random weights in the exact shapes and are made on the spot, so nothing is
downloaded. Each stage is a process of its own with a time of its own, and results are written as
they come: a run that is cut off leaves what it has, and a stage that takes the device down with it
leaves the others.

`python -m benchmarks.gpu --device cpu --shape small` runs the very same code anywhere.
"""
