"""The answers, with the field names that clients of other servers read."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class RankedText(BaseModel):
    """One document of a ranking."""

    index: int = Field(description="The document's position in the request, from 0.", ge=0)
    relevance_score: float = Field(
        description="How well it answers the query, in [0, 1]; the logit if requested."
    )
    document: dict[str, Any] | str | None = Field(
        None, description="The document, if requested; in infinity's format its text."
    )
    logit: float | None = Field(None, description="What results are ordered by; in details.")
    truncated: bool | None = Field(None, description="Whether its end was cut off; in details.")
    query_truncated: bool | None = Field(None, description="Whether the query was cut; in details.")
    span: list[int] | None = Field(
        None, description="Start and end of the window that scored best; in details."
    )


class ApiVersion(BaseModel):
    """The API version of an answer."""

    version: str


class BilledUnits(BaseModel):
    """Units as Cohere counts them; nothing is billed here."""

    search_units: int = Field(description="One for each hundred documents begun.", ge=1)


class MetaTokens(BaseModel):
    """Tokens that went through the model."""

    input_tokens: int = Field(ge=0)


class Meta(BaseModel):
    """Cohere's metadata of an answer."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: MetaTokens


class Usage(BaseModel):
    """Tokens that went through the model, in the format of Jina and vLLM."""

    prompt_tokens: int = Field(description="Special tokens included.", ge=0)
    total_tokens: int = Field(ge=0)


class RerankResponse(BaseModel):
    """Documents, best first."""

    id: str = Field(description="Unique for each answer.")
    object: Literal["rerank"] = Field(description="infinity's word; its client accepts no other.")
    model: str
    results: list[RankedText]
    usage: Usage
    meta: Meta


class Rank(BaseModel):
    """One text of a ranking."""

    index: int = Field(description="The text's position in the request, from 0.", ge=0)
    score: float = Field(description="In [0, 1], or the logit if raw scores were requested.")
    text: str | None = Field(None, description="The text, if requested.")


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
    """The server and its limits, with text-embeddings-inference's field names."""

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
    max_input_length: int = Field(description="Maximum tokens of a pair.")
    max_client_batch_size: int = Field(description="Maximum documents of a request.")
    max_batch_tokens: int = Field(description="Maximum tokens of a forward pass.")
    max_batch_requests: None = None
    max_concurrent_requests: int
    max_body_bytes: int
    max_characters: int = Field(description="Maximum characters of a document.")
    auto_truncate: bool
    tokenization_workers: int
    long_documents: str = Field(description="How documents that are too long are handled.")
