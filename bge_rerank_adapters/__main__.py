"""`python -m bge_rerank_adapters`: the same as `bge-rerank`."""

from bge_rerank_adapters.cli import main

if __name__ == "__main__":
    main()
