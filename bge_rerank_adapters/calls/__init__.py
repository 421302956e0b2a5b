"""What local and remote rerankers share: checked inputs, limits, rankings and call runners."""
