"""The BGE rerankers that users know by name, and the one that comes with the package."""

from dataclasses import dataclass

from bge_rerank_adapters.errors import SettingsError

DEFAULT_MODEL = "BAAI/bge-reranker-v2-m3"
TINY = "tiny"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint, as far as it is known before it is loaded.

    Attributes:
        name: Its name on the hub.
        family: How it is run: encoder, decoder, layerwise or lightweight.
        parameters: Number of parameters, in millions.
        embeddings: How many of these are in embeddings, in millions.
        max_tokens: Maximum tokens of a pair, by its number of positions.
        languages: As its model card names them.
    """

    name: str
    family: str
    parameters: int
    embeddings: int
    max_tokens: int
    languages: str

    @property
    def gigabytes(self) -> dict[str, float]:
        """Memory that the weights take, in GB of 10**9 bytes, by dtype; packs come on top."""
        parameters, embeddings = self.parameters / 1000, self.embeddings / 1000
        sizes = {"float32": 4 * parameters, "bfloat16": 2 * parameters, "float16": 2 * parameters}
        if self.family == "encoder":
            # Embeddings are looked up, not multiplied, and stay as they are.
            sizes["int8"] = (parameters - embeddings) + 4 * embeddings
        return sizes


# Sizes, positions and languages as the model cards and config files on the hub give them.
CHECKPOINTS = {
    checkpoint.name: checkpoint
    for checkpoint in (
        Checkpoint("BAAI/bge-reranker-base", "encoder", 278, 193, 512, "Chinese and English"),
        Checkpoint("BAAI/bge-reranker-large", "encoder", 560, 257, 512, "Chinese and English"),
        Checkpoint("BAAI/bge-reranker-v2-m3", "encoder", 568, 265, 8192, "multilingual"),
        Checkpoint("BAAI/bge-reranker-v2-gemma", "decoder", 2506, 524, 8192, "multilingual"),
        Checkpoint(
            "BAAI/bge-reranker-v2-minicpm-layerwise", "layerwise", 2725, 283, 4096, "multilingual"
        ),
        Checkpoint(
            "BAAI/bge-reranker-v2.5-gemma2-lightweight",
            "lightweight",
            9242,
            918,
            8192,
            "multilingual",
        ),
    )
}


def known_family(model: str) -> str | None:
    """Return the family of a checkpoint that is known by name; `None` for any other."""
    if model == TINY:
        return "encoder"
    known = CHECKPOINTS.get(model)
    return known.family if known else None


def family_setting(model: object, family: str, *, instead: str) -> str | None:
    """Return the `family` setting for a class that runs models of one family alone.

    It is `None` for a known model: such an engine is shared with callers that set no family.

    Args:
        model: A folder or a name.
        family: The family that the class runs.
        instead: What to use for other families, for the message.

    Raises:
        SettingsError: The model is known to be of another family.
    """
    known = known_family(str(model))
    if known not in (None, family):
        raise SettingsError(
            f"{model} is of the {known} family, not of the {family} family, which this runs; "
            f"{instead}."
        )
    return None if known else family
