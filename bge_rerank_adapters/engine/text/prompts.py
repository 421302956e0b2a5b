"""The template of the decoder families: `A: query`, a new line, `B: document`, and a prompt.

It follows FlagEmbedding 1.4.2 (`inference/reranker/decoder_only/`): instructions count toward the
lengths of query and document; the separator and the prompt are added beyond `max_length`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bge_rerank_adapters.engine.json_files import read_json
from bge_rerank_adapters.engine.text.pairs import PairTemplate, TokenIds
from bge_rerank_adapters.errors import CheckpointError

SEPARATOR = "\n"
YES = "Yes"
QUERY_INSTRUCTION, PASSAGE_INSTRUCTION = "A: ", "B: "
YES_OR_NO = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)
CONTAINS_ANSWER = "Predict whether passage B contains an answer to query A."
# The bos and padding tokens of transformers' tokenizer classes, for checkpoints whose files name
# none.
_CLASS_TOKENS = {"GemmaTokenizer": ("<bos>", "<pad>"), "LlamaTokenizer": ("<s>", None)}


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """The template of a decoder family.

    Attributes:
        prompt: The default prompt after the document.
        needs_bos: Whether every pair must begin with the `bos_token`. Otherwise pairs begin with
            it if the tokenizer has one that is not its padding token.
    """

    prompt: str
    needs_bos: bool = False


def decoder_template(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    style: PromptStyle,
    prompt: str | None = None,
    query_instruction: str | None = None,
    passage_instruction: str | None = None,
) -> PairTemplate:
    """Return the template around a pair in a decoder family.

    Args:
        tokenizer: The checkpoint's tokenizer, without truncation.
        folder: Holds the config of the tokenizer.
        style: The family's style.
        prompt: Text after the document; `None` is the family's own.
        query_instruction: Text before the query; `None` is `"A: "`.
        passage_instruction: Text before the document; `None` is `"B: "`.

    Raises:
        CheckpointError: The tokenizer lacks a `bos_token`, and the style needs one.
    """
    separator = _encode(tokenizer, SEPARATOR)
    prompt_ids = _encode(tokenizer, style.prompt if prompt is None else prompt)
    after = np.concatenate((separator, prompt_ids))
    return PairTemplate(
        before=_beginning(tokenizer, folder, needs_bos=style.needs_bos),
        between=separator,
        after=after,
        # Twice: FlagEmbedding cuts the pair to leave room for both, and then adds them on top.
        extra_tokens=2 * len(after),
        query_instruction=QUERY_INSTRUCTION if query_instruction is None else query_instruction,
        passage_instruction=(
            PASSAGE_INSTRUCTION if passage_instruction is None else passage_instruction
        ),
    )


def _encode(tokenizer: Tokenizer, text: str) -> TokenIds:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _beginning(tokenizer: Tokenizer, folder: Path, *, needs_bos: bool) -> TokenIds:
    bos, pad = (_special_id(tokenizer, folder, role) for role in ("bos_token", "pad_token"))
    if not needs_bos:
        return np.asarray([] if bos in (None, pad) else [bos], dtype=np.int64)
    if bos is None:
        raise CheckpointError(
            "the tokenizer has no bos_token, which every pair of this family begins with; "
            "copy tokenizer_config.json into the folder as well."
        )
    return np.asarray([bos], dtype=np.int64)


def _special_id(tokenizer: Tokenizer, folder: Path, role: str) -> int | None:
    token = _special_token(folder, role)
    return None if token is None else tokenizer.token_to_id(token)


def _special_token(folder: Path, role: str) -> str | None:
    """Return the token of a role such as `bos_token`, from the tokenizer's config files."""
    config = read_json(folder / "tokenizer_config.json")
    for found in (config, read_json(folder / "special_tokens_map.json")):
        if role in found:
            token = found[role]
            text = token.get("content") if isinstance(token, dict) else token
            return text if isinstance(text, str) else None
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    bos, pad = _CLASS_TOKENS.get(name, (None, None))
    return bos if role == "bos_token" else pad
