"""The template of the decoder families: `A: query`, a new line, `B: document`, and a prompt.

It follows FlagEmbedding 1.4.2 (`inference/reranker/decoder_only/`): instructions count toward the
lengths of query and document; the separator and the prompt are added beyond `max_length`.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from bge_rerank_adapters.engine.text.beginning import Beginning
from bge_rerank_adapters.engine.text.pairs import PairTemplate, TokenIds

SEPARATOR = "\n"
YES = "Yes"
QUERY_INSTRUCTION, PASSAGE_INSTRUCTION = "A: ", "B: "
YES_OR_NO = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)
CONTAINS_ANSWER = "Predict whether passage B contains an answer to query A."


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
    beginning: Beginning,
    *,
    style: PromptStyle,
    prompt: str | None = None,
    query_instruction: str | None = None,
    passage_instruction: str | None = None,
) -> PairTemplate:
    """Return the template around a pair in a decoder family.

    Args:
        tokenizer: The checkpoint's tokenizer, without truncation.
        beginning: Finds the token that every pair begins with.
        style: The family's style.
        prompt: Text after the document; `None` is the family's own.
        query_instruction: Text before the query; `None` is `"A: "`.
        passage_instruction: Text before the document; `None` is `"B: "`.

    Raises:
        CheckpointError: The tokenizer lacks a `bos_token`, and the style needs one, or its files
            contradict each other.
    """
    separator = _encode(tokenizer, SEPARATOR)
    prompt_ids = _encode(tokenizer, style.prompt if prompt is None else prompt)
    after = np.concatenate((separator, prompt_ids))
    return PairTemplate(
        before=beginning.ids(tokenizer, needed=style.needs_bos),
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
