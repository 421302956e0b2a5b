"""The requests: one for each API of `/rerank` servers."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Discriminator, Field, Tag

from bge_rerank_adapters.serve.refusals import TAGS, Refusal
from bge_rerank_adapters.serve.schemas.kinds import (
    Count,
    Direction,
    Documents,
    Flag,
    Text,
    Texts,
    Threshold,
    Tokens,
)
from bge_rerank_adapters.settings.token_limits import TokenLimits


class _Request(BaseModel):
    """The fields of every request. Unknown fields are kept as `model_extra`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), hide_input_in_errors=True)

    query: Text = Field(description="The question; may be empty.")
    top_n: Count = Field(
        None,
        description="Maximum number of results; by default all. `top_k` is another name for it.",
        validation_alias=AliasChoices("top_n", "top_k"),
    )
    score_threshold: Threshold = Field(
        None,
        description="Lowest score of a result, inclusive, applied before `top_n`; always "
        "compared with the score in [0, 1].",
    )
    raw_scores: Flag = Field(None, description="Whether scores are logits, not in [0, 1].")
    use_activation: Flag = Field(
        None,
        description="If false, scores are logits.",
        validation_alias=AliasChoices("use_activation", "activation"),
    )
    max_tokens_per_doc: Tokens = Field(
        None, description="Maximum tokens that are read of a document; -1 is the model's own limit."
    )
    max_tokens_per_query: Tokens = Field(
        None, description="Maximum tokens that are read of the query; -1 is the model's own limit."
    )
    truncate_prompt_tokens: Tokens = Field(
        None, description="Maximum tokens that are read of a pair; -1 is the model's own limit."
    )
    truncation_direction: Direction = Field(
        "right",
        description="Which end of a document is cut off. Only the right one can be: with Left, a "
        "request is refused if a document has to be cut.",
        validation_alias=AliasChoices("truncation_direction", "truncation_side"),
    )

    @property
    def wants_logits(self) -> bool:
        """Whether scores are to be logits."""
        return bool(self.raw_scores) or self.use_activation is False

    @property
    def token_limits(self) -> TokenLimits:
        """How many tokens of the texts are read."""
        return TokenLimits(
            max_document_tokens=self.max_tokens_per_doc,
            max_query_tokens=self.max_tokens_per_query,
            max_pair_tokens=self.truncate_prompt_tokens,
        )

    @property
    def ignored(self) -> Mapping[str, Any]:
        """Fields that were sent and are ignored."""
        return self.model_extra or {}


class RerankRequest(_Request):
    """A query and the documents to rank by how well they answer it."""

    model: Text | None = Field(None, description="The model's name; must be one that is served.")
    documents: Documents = Field(
        description="Texts, or objects with a `text` or the `rank_fields`; may be empty."
    )
    return_documents: Flag = Field(
        None, description="Whether results hold their documents, as they were sent."
    )
    rank_fields: Texts | None = Field(
        None,
        description="Fields of the objects to rank by, in place of `text`, each on a line.",
        json_schema_extra={"minItems": 1},
    )
    max_chunks_per_doc: Count = Field(
        None,
        description="Maximum windows of a document that are scored; one that is cut has one.",
    )
    return_details: Flag = Field(
        None,
        description="An extension: whether results also hold `logit`, `truncated`, "
        "`query_truncated` and, of a server that reads long documents in windows, `span`.",
    )

    def texts(self) -> list[str]:
        """Return the text of each document that is ranked.

        Raises:
            Refusal: An object has no text.
        """
        # Each once: repeating a field would make texts arbitrarily long.
        fields = ["text"] if self.rank_fields is None else list(dict.fromkeys(self.rank_fields))
        if not fields:
            raise Refusal(422, "rank_fields must name a field; leave it out to rank by text.")
        return [
            each if isinstance(each, str) else _joined(each, fields, index)
            for index, each in enumerate(self.documents)
        ]


class TeiRerankRequest(_Request):
    """A query and the texts to rank by how well they answer it."""

    texts: Texts = Field(description="At least one text.", json_schema_extra={"minItems": 1})
    return_text: Flag = Field(None, description="Whether results hold their texts.")
    truncate: Flag = Field(
        None,
        description="Whether what is too long is cut; if false it is refused. True, if not given.",
    )


def _shape(body: object) -> str:
    return TAGS[isinstance(body, dict) and "texts" in body]


# One path has both: `texts` as in text-embeddings-inference, `documents` as in vLLM.
EitherRequest = Annotated[
    Annotated[RerankRequest, Tag(TAGS[0])] | Annotated[TeiRerankRequest, Tag(TAGS[1])],
    Discriminator(_shape),
]


def _joined(document: dict[str, Any], fields: Sequence[str], index: int) -> str:
    values = [document[name] for name in fields if document.get(name) is not None]
    if not values:
        raise Refusal(
            422,
            f"documents[{index}] has no {' or '.join(map(_shown, fields[:5]))}; each object needs "
            "what it is ranked by: text, or one of rank_fields.",
        )
    if any(isinstance(value, dict | list) for value in values):
        raise Refusal(
            422, f"documents[{index}]: what it is ranked by must be text, not a list or an object."
        )
    if len(fields) == 1 and not isinstance(values[0], str):
        raise Refusal(422, f"documents[{index}]: {_shown(fields[0])} must be a string.")
    return "\n".join(map(str, values))


def _shown(name: str) -> str:
    return repr(name[:50])
