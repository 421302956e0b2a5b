"""What requests and answers look like; the source of the OpenAPI description."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    WithJsonSchema,
)

from bge_rerank_adapters.serve.refusals import Refusal

Document = str | dict[str, Any]


def _text(value: object) -> str:
    # Not pydantic's own check, which may mind lone surrogates, where the engine does not.
    if type(value) is not str:
        raise ValueError("must be a string")
    return value


def _list(value: object, items: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of {items}")  # noqa: TRY004 - what pydantic expects
    return value


def _texts(value: object) -> list[str]:
    """Check texts one after the other, so that a list of a million numbers gives one error."""
    for index, item in enumerate(_list(value, "strings")):
        if type(item) is not str:
            raise ValueError(f"[{index}] must be a string")
    return cast(list[str], value)


def _documents(value: object) -> list[Document]:
    for index, item in enumerate(_list(value, "strings or objects")):
        if type(item) is str:
            continue
        if not isinstance(item, dict):
            raise ValueError(  # noqa: TRY004 - as above
                f"[{index}] must be a string, or an object with its text"
            )
        if not all(map(_is_plain, item.values())):
            raise ValueError(
                f"[{index}] must have strings, numbers, booleans and null alone as its values"
            )
    return cast(list[Document], value)


def _is_plain(value: object) -> bool:
    """Tell what can be sent back: infinity, which 1e999 is read as, has no JSON."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def _count(value: object) -> int:
    # JSON knows no integers: 3.0 is one as well as 3.
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, int) or whole):
        raise ValueError("must be a whole number")
    if value < 1:  # type: ignore[operator]
        raise ValueError("must be at least 1; leave it out for no limit")
    return int(value)  # type: ignore[call-overload, no-any-return]


def _direction(value: object) -> str:
    if not isinstance(value, str) or value.lower() != "right":
        raise ValueError("must be Right: documents are cut at their end")
    return "Right"


Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
Texts = Annotated[
    list[str],
    PlainValidator(_texts),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
]
Direction = Annotated[
    str, PlainValidator(_direction), WithJsonSchema({"type": "string", "enum": ["Right", "right"]})
]
Documents = Annotated[
    list[Document],
    PlainValidator(_documents),
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "object",
                        "properties": {"text": {"type": "string"}},
                        "required": ["text"],
                        "additionalProperties": {
                            "anyOf": [
                                {"type": kind} for kind in ("string", "number", "boolean", "null")
                            ],
                        },
                    },
                ]
            },
        }
    ),
]
Count = Annotated[int, PlainValidator(_count), WithJsonSchema({"type": "integer", "minimum": 1})]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


class RerankRequest(_Strict):
    """A query and the documents to rank by how well they answer it."""

    model: Text | None = Field(None, description="The model's name; must be one that is served.")
    query: Text = Field(description="The question; may be empty.")
    documents: Documents = Field(
        description="Texts, or objects with a `text` or what `rank_fields` names; may be empty."
    )
    top_n: Count | None = Field(None, description="Most results; all, if not given.")
    return_documents: StrictBool | None = Field(
        None, description="Whether results hold their documents, as they were sent."
    )
    rank_fields: Texts | None = Field(
        None,
        description="Fields of the objects to rank by, in place of `text`, each on a line.",
        json_schema_extra={"minItems": 1},
    )
    max_tokens_per_doc: Count | None = Field(
        None,
        description="Accepted where it is no less than what the model reads of a document anyway.",
    )
    max_chunks_per_doc: Count | None = Field(
        None, description="Accepted where the model reads one part of a document anyway."
    )
    return_details: StrictBool | None = Field(
        None,
        description="An extension: whether results also hold `logit`, `truncated` and, of a "
        "server that reads long documents in windows, `span`.",
    )

    def texts(self) -> list[str]:
        """Return the text of each document that is ranked.

        Raises:
            Refusal: An object has none.
        """
        # Each once: a text that is scored as often as it is named grows beyond all limits.
        fields = ["text"] if self.rank_fields is None else list(dict.fromkeys(self.rank_fields))
        if not fields:
            raise Refusal(422, "rank_fields must name a field; leave it out to rank by text.")
        return [
            each if isinstance(each, str) else _joined(each, fields, index)
            for index, each in enumerate(self.documents)
        ]


def _joined(document: dict[str, Any], fields: Sequence[str], index: int) -> str:
    values = [document[name] for name in fields if document.get(name) is not None]
    if not values:
        raise Refusal(
            422,
            f"documents[{index}] has no {' or '.join(map(_shown, fields[:5]))}; each object needs "
            "what it is ranked by: text, or one of rank_fields.",
        )
    if len(fields) == 1 and not isinstance(values[0], str):
        raise Refusal(422, f"documents[{index}]: {_shown(fields[0])} must be a string.")
    return "\n".join(map(str, values))


def _shown(name: str) -> str:
    return repr(name[:50])


class RankedText(BaseModel):
    """One document of a ranking."""

    index: int = Field(description="The document's position in the request, from 0.", ge=0)
    relevance_score: float = Field(description="How well it answers the query.", ge=0, le=1)
    document: dict[str, Any] | None = Field(None, description="The document, where asked for.")
    logit: float | None = Field(None, description="What results are ordered by; in details.")
    truncated: bool | None = Field(None, description="Whether its end was cut off; in details.")
    span: list[int] | None = Field(
        None, description="Start and end of the window that scored best; in details."
    )


class ApiVersion(BaseModel):
    """Which API an answer is of."""

    version: str


class Meta(BaseModel):
    """About an answer."""

    api_version: ApiVersion


class RerankResponse(BaseModel):
    """Documents, best first."""

    id: str = Field(description="Of this answer alone.")
    model: str
    results: list[RankedText]
    meta: Meta


class TeiRerankRequest(_Strict):
    """A query and the texts to rank by how well they answer it."""

    query: Text = Field(description="The question; may be empty.")
    texts: Texts = Field(description="At least one text.", json_schema_extra={"minItems": 1})
    raw_scores: StrictBool = Field(False, description="Whether scores are logits, not in [0, 1].")
    return_text: StrictBool = Field(False, description="Whether results hold their texts.")
    truncate: StrictBool | None = Field(
        None,
        description="Whether what is too long is cut; if false it is refused. True, if not given.",
    )
    truncation_direction: Direction = Field(
        "Right", description="Which end is cut off; only that on the right can be."
    )


class Rank(BaseModel):
    """One text of a ranking."""

    index: int = Field(description="The text's position in the request, from 0.", ge=0)
    score: float = Field(description="In [0, 1], or the logit where raw scores were asked for.")
    text: str | None = Field(None, description="The text, where asked for.")


class Health(BaseModel):
    """Whether the server scores."""

    status: Literal["ok"]


class ServedModel(BaseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the server was started, in seconds since 1970.")
    owned_by: str


class ServedModels(BaseModel):
    """All models that requests may name."""

    object: Literal["list"]
    data: list[ServedModel]


class Info(BaseModel):
    """What the server is and takes, with the names that text-embeddings-inference gives them."""

    model_config = ConfigDict(protected_namespaces=())

    server: Literal["bge_rerank_adapters"]
    version: str
    model_id: str
    model_dtype: str
    model_type: dict[str, Any]
    max_input_length: int = Field(description="Most tokens of a pair.")
    max_client_batch_size: int = Field(description="Most documents of a request.")
    max_concurrent_requests: int
    max_body_bytes: int
    max_characters: int = Field(description="Most characters of a document.")
    auto_truncate: bool
    long_documents: str = Field(description="What becomes of a document that is too long.")
