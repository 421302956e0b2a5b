"""Write `decoder-tokenizer.json`, the small tokenizer of the tests' decoder checkpoints.

    pip install tokenizers==0.19.1
    python tests/reference/make_decoder_tokenizer.py

It is built like Gemma's: byte-pair encoding over whole texts with spaces as "▁", bytes for what it
does not know, special tokens in Gemma's order. The file is kept, since training gives other merges
with other releases, and since releases before 0.20 cannot read what later ones write.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
XQUAD = HERE.parent / "data" / "xquad-r-en"
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# What a decoder's template is made of.
WORDS = ("\n", "A", "B", ":")
SIZE = 1000


def texts() -> Iterator[str]:
    """Yield every question and sentence of the test data."""
    for name in ("queries.jsonl", "corpus.jsonl"):
        for line in (XQUAD / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"]


def build() -> Tokenizer:
    """Return the trained tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[3], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # While it is trained alone: merges across words would fill the vocabulary with phrases.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=[*SPECIALS, *BYTES, *WORDS], show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def main() -> None:
    """Write the file, without the pre-tokenizer and with only the special tokens as such."""
    written = json.loads(build().to_str())
    written["pre_tokenizer"] = None
    written["added_tokens"] = [each for each in written["added_tokens"] if each["id"] < 4]
    text = json.dumps(written, ensure_ascii=False, indent=0).replace("\n", "")
    (HERE / "decoder-tokenizer.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
