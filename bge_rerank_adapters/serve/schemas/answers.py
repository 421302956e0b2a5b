"""What is answered, with the names that clients of the other servers read."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class RankedText(BaseModel):
    """One document of a ranking."""

    index: int = Field(description="The document's position in the request, from 0.", ge=0)
    relevance_score: float = Field(
        description="How well it answers the query, in [0, 1]; the logit where that was asked for."
    )
    document: dict[str, Any] | str | None = Field(
        None, description="The document, where asked for; in infinity's form its text."
    )
    logit: float | None = Field(None, description="What results are ordered by; in details.")
    truncated: bool | None = Field(None, description="Whether its end was cut off; in details.")
    query_truncated: bool | None = Field(None, description="Whether the query was cut; in details.")
    span: list[int] | None = Field(
        None, description="Start and end of the window that scored best; in details."
    )


class ApiVersion(BaseModel):
    """Which API an answer is of."""

    version: str


class BilledUnits(BaseModel):
    """What Cohere would count; nothing is billed here."""

    search_units: int = Field(description="One for each hundred documents begun.", ge=1)


class MetaTokens(BaseModel):
    """Tokens that went through the model."""

    input_tokens: int = Field(ge=0)


class Meta(BaseModel):
    """About an answer, as Cohere tells it."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: MetaTokens


class Usage(BaseModel):
    """Tokens that went through the model, as Jina and vLLM tell them."""

    prompt_tokens: int = Field(description="Special tokens included.", ge=0)
    total_tokens: int = Field(ge=0)


class RerankResponse(BaseModel):
    """Documents, best first."""

    id: str = Field(description="Of this answer alone.")
    object: Literal["rerank"] = Field(description="infinity's word, whose client takes no other.")
    model: str
    results: list[RankedText]
    usage: Usage
    meta: Meta


class Rank(BaseModel):
    """One text of a ranking."""

    index: int = Field(description="The text's position in the request, from 0.", ge=0)
    score: float = Field(description="In [0, 1], or the logit where raw scores were asked for.")
    text: str | None = Field(None, description="The text, where asked for.")


class Health(BaseModel):
    """Whether the server scores."""

    status: Literal["ok"]


class KeyNeeded(BaseModel):
    """Whether requests need the server's API key."""

    auth: bool


class ServedModel(BaseModel):
    """A model that requests may name."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"]
    created: int = Field(description="When the server was started, in seconds since 1970.")
    owned_by: str
    model_name: str = Field(description="As Xinference's clients read it.")
    model_type: Literal["rerank"]


class ServedModels(BaseModel):
    """All models that requests may name."""

    object: Literal["list"]
    data: list[ServedModel]


class Info(BaseModel):
    """What the server is and takes, with the names that text-embeddings-inference gives them."""

    model_config = ConfigDict(protected_namespaces=())

    server: Literal["bge_rerank_adapters"]
    version: str
    sha: None = None
    docker_label: None = None
    model_id: str
    model_sha: str | None = Field(None, description="The revision, where one is set.")
    model_dtype: str
    model_type: dict[str, Any]
    served_model_name: str
    max_input_length: int = Field(description="Most tokens of a pair.")
    max_client_batch_size: int = Field(description="Most documents of a request.")
    max_batch_tokens: int = Field(description="Most tokens of a forward pass.")
    max_batch_requests: None = None
    max_concurrent_requests: int
    max_body_bytes: int
    max_characters: int = Field(description="Most characters of a document.")
    auto_truncate: bool
    tokenization_workers: int
    long_documents: str = Field(description="What becomes of a document that is too long.")
