"""The token that every pair of a decoder begins with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bge_rerank_adapters.engine.text.added_tokens import token_of
from bge_rerank_adapters.engine.text.decoder_classes import GENERIC, tokenizer_class
from bge_rerank_adapters.engine.text.pairs import TokenIds
from bge_rerank_adapters.errors import CheckpointError

# The tokens of transformers' tokenizer classes, for checkpoints whose files name none.
_CLASS_TOKENS: dict[str, dict[str, str]] = {
    "GemmaTokenizer": {"bos_token": "<bos>", "pad_token": "<pad>"},
    "LlamaTokenizer": {"bos_token": "<s>"},
    "Qwen2Tokenizer": {"pad_token": "<|endoftext|>"},
}
# For these transformers 4 has the class LlamaTokenizer where none is named, and 5 has none.
_UNCLEAR = ("llama", "mistral")


@dataclass(frozen=True, slots=True)
class Beginning:
    """Finds the `bos_token`.

    Attributes:
        folder: Holds the tokenizer and its config.
        model_config: The model's `config.json`.
    """

    folder: Path
    model_config: Mapping[str, Any]

    def ids(self, tokenizer: Tokenizer, *, needed: bool) -> TokenIds:
        """Return its id; none if the tokenizer has no such token, or if it is its padding token.

        Args:
            tokenizer: The checkpoint's tokenizer.
            needed: Whether every pair must begin with it, even if it is the padding token.

        Raises:
            CheckpointError: It is needed and missing, or not in the vocabulary, or files contradict
                each other about it.
        """
        bos, pad = (self._id(tokenizer, role) for role in ("bos_token", "pad_token"))
        if needed and bos is None:
            raise CheckpointError(
                "the tokenizer has no bos_token, which every pair of this family begins with; "
                "copy tokenizer_config.json into the folder as well."
            )
        left_out = bos is None or (bos == pad and not needed)
        return np.asarray([] if left_out else [bos], dtype=np.int64)

    def _id(self, tokenizer: Tokenizer, role: str) -> int | None:
        text = self._token(tokenizer, role)
        if text is None:
            return None
        found: int | None = tokenizer.token_to_id(text)
        if found is None and role == "bos_token":
            raise CheckpointError(
                f"the bos_token {text!r}, which every pair begins with, is not in the vocabulary; "
                "copy tokenizer_config.json and tokenizer.json of one checkpoint."
            )
        return found

    def _token(self, tokenizer: Tokenizer, role: str) -> str | None:
        try:
            return token_of(self.folder, role)
        except KeyError:
            pass
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {role}: {error}.") from error
        name = tokenizer_class(self.folder, self.model_config)
        kind = self.model_config["model_type"]
        guessed = name in GENERIC and kind in _UNCLEAR and role == "bos_token"
        if guessed and tokenizer.token_to_id("<s>") is not None:
            raise CheckpointError(
                "no file says whether the bos_token '<s>' begins every pair, and releases of "
                "transformers differ; copy tokenizer_config.json into the folder, or write "
                'bos_token there: "<s>" or null.'
            )
        return _CLASS_TOKENS.get(name, {}).get(role)
