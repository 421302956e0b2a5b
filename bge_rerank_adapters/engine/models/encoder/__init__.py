"""Cross-encoders of the BERT kind."""
