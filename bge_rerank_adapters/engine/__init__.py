"""The scoring engine: from texts to logits on this machine's devices."""
