"""A checkpoint's tokenizer, read from its folder."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, normalizers

from bge_rerank_adapters.engine.text.pairs import PairTemplate
from bge_rerank_adapters.engine.text.tokenizer import PairTokenizer, read_template
from bge_rerank_adapters.errors import CheckpointError

_SLOW_VOCABULARIES = ("sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json")


def load_tokenizer(
    folder: Path,
    *,
    max_length: int,
    query_max_length: int | None = None,
    lowercase: bool = False,
    apply: Callable[[Tokenizer, Path], None] | None = None,
    make: Callable[..., PairTokenizer] = PairTokenizer,
    template: Callable[[Tokenizer], PairTemplate] = read_template,
) -> PairTokenizer:
    """Return the tokenizer of a checkpoint's folder.

    Args:
        folder: Holds `tokenizer.json`, or the files of a slow tokenizer that transformers converts.
        max_length: Maximum tokens of a pair, special tokens included.
        query_max_length: Maximum tokens of a query; `None` is three quarters of `max_length`.
        lowercase: Whether texts are lower-cased first, as sentence-transformers does.
        apply: Sets the tokenizer as the other files in the folder say; `None` leaves it as it is.
        make: Makes the result from a tokenizer, the two lengths and a template.
        template: Makes the template around a pair from the tokenizer.

    Raises:
        CheckpointError: There is no tokenizer in the folder, or it cannot be read.
        UnsupportedCheckpointError: Its config needs something that is not supported.
        SettingsError: The lengths leave no room for a document.
    """
    tokenizer = _read_tokenizer(folder)
    if apply is not None:
        apply(tokenizer, folder)
    if lowercase:
        _put_lowercase_first(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    try:
        return make(
            tokenizer,
            max_length=max_length,
            query_max_length=query_max_length,
            template=template(tokenizer),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: {error}") from error


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _convert_slow_tokenizer(folder)
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a plain Exception for an unreadable file, or a Rust panic
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}.") from error


def _put_lowercase_first(tokenizer: Tokenizer) -> None:
    found = tokenizer.normalizer
    first = normalizers.Lowercase()
    tokenizer.normalizer = first if found is None else normalizers.Sequence([first, found])


def _convert_slow_tokenizer(folder: Path) -> Tokenizer:
    slow = [name for name in _SLOW_VOCABULARIES if (folder / name).is_file()]
    if not slow:
        raise CheckpointError(
            f"{folder} has no tokenizer: neither tokenizer.json nor a vocabulary "
            f"({', '.join(_SLOW_VOCABULARIES)}). Copy the checkpoint's tokenizer "
            "files into the folder."
        )
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(
            str(folder),
            local_files_only=True,
            use_fast=True,
            # Explicitly False: otherwise transformers asks on the terminal whether to run the code.
            trust_remote_code=False,
        )
        # A copy, since transformers keeps changing its own.
        return Tokenizer.from_str(converted.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises many kinds for damaged files
        raise CheckpointError(
            f"The tokenizer in {folder} ({', '.join(slow)}) cannot be converted to a fast one: "
            f"{error}"
        ) from error
