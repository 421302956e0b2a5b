"""Write `nfkc.charsmap`, the normalisation rules of the tests' XLM-RoBERTa tokenizer.

    python tests/reference/make_charsmap.py

SentencePiece compiles the rules (XLM-RoBERTa's own tokenizer has such a table, 100 times larger).
They are Unicode's NFKC for single characters of the blocks that European text uses. The file is
kept, so that building a checkpoint needs no sentencepiece.
"""

import io
import tempfile
import unicodedata
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

# Latin-1 and Latin Extended-A, punctuation and superscripts, letter-like symbols and fractions,
# ligatures, full-width forms.
BLOCKS = ((0xA0, 0x180), (0x2000, 0x2100), (0x2100, 0x2190), (0xFB00, 0xFB07), (0xFF01, 0xFF5F))


def rules() -> str:
    """Return one line per rule: code points in hexadecimal, a tab, and what they become."""
    lines = []
    for start, end in BLOCKS:
        for code in range(start, end):
            normal = unicodedata.normalize("NFKC", chr(code))
            if normal != chr(code):
                lines.append(f"{code:X}\t{' '.join(f'{ord(each):X}' for each in normal)}\n")
    return "".join(lines)


def compile_rules(path: Path) -> bytes:
    """Return SentencePiece's table for a file of rules, by way of a model that is thrown away."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 10),
        model_writer=model,
        model_type="char",
        vocab_size=12,
        normalization_rule_tsv=str(path),
        minloglevel=2,
    )
    parsed = sentencepiece_model_pb2.ModelProto()
    parsed.ParseFromString(model.getvalue())
    return parsed.normalizer_spec.precompiled_charsmap


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rules.tsv"
        table.write_text(rules(), encoding="utf-8")
        (Path(__file__).parent / "nfkc.charsmap").write_bytes(compile_rules(table))
