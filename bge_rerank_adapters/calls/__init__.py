"""What every reranker speaks, local or remote: checked inputs, limits, rankings, runners."""
