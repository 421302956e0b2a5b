"""Write `<checkpoint>.json`: what FlagEmbedding on transformers 4 makes of difficult pairs.

    pip install FlagEmbedding==1.4.2 transformers==4.44.2
    python tests/reference/make_reference.py

The pairs are cut to fit, or hold characters that the tokenizer does not know. FlagEmbedding 1.4
joins token ids by itself on transformers 4; on transformers 5, which lacks the function for that,
it turns them back into text and tokenises again, and gives other ids for such pairs. So the
numbers have to come from transformers 4. They are of the checkpoints that `tests/checkpoints.py`
builds, and have to be made again when those change.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from FlagEmbedding import FlagReranker

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from checkpoints import CHECKPOINTS, difficult_pairs  # noqa: E402 - found by the line above


def token_ids(reranker: FlagReranker, query: str, document: str, *, max_length: int) -> list[int]:
    """Return the ids that FlagEmbedding feeds its model, by the same calls as its own."""
    tokenizer = reranker.tokenizer
    query_ids, document_ids = (
        tokenizer(text, add_special_tokens=False, max_length=most, truncation=True)["input_ids"]
        for text, most in ((query, max_length * 3 // 4), (document, max_length))
    )
    return tokenizer.prepare_for_model(
        query_ids, document_ids, truncation="only_second", max_length=max_length
    )["input_ids"]


def reference(folder: Path, *, max_tokens: int) -> dict[str, object]:
    """Return the versions and, for each difficult pair, its token ids and its logit."""
    reranker = FlagReranker(str(folder), use_fp16=False, devices="cpu", batch_size=1)
    cases = []
    for query, document, max_length in difficult_pairs(max_tokens=max_tokens):
        [logit] = reranker.compute_score([(query, document)], max_length=max_length)
        ids = token_ids(reranker, query, document, max_length=max_length)
        cases.append({"max_length": max_length, "logit": logit, "ids": ids})
    return {"transformers": transformers.__version__, "torch": torch.__version__, "cases": cases}


def main() -> None:
    """Write a file for each checkpoint."""
    if not transformers.__version__.startswith("4."):
        sys.exit(f"These numbers come from transformers 4, this is {transformers.__version__}.")
    with tempfile.TemporaryDirectory() as folder:
        for name, (build, max_tokens) in CHECKPOINTS.items():
            result = reference(build(Path(folder) / name), max_tokens=max_tokens)
            text = json.dumps(result).replace('{"max_length"', '\n{"max_length"')
            (HERE / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
