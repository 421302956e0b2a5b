"""From texts to token ids: tokenizers, prompts and windows."""
