"""Calls that wait for the model, the packs made of them, and the threads that score these."""
