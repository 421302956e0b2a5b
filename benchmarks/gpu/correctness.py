"""Whether the device gives what a processor gives: every family, every dtype, by the right path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import checkpoint
from benchmarks.gpu.results import Row, Rows, checked
from benchmarks.gpu.setting import Setting
from bge_rerank_adapters import Reranker
from bge_rerank_adapters.engine.models.devices import resolve_device

# Logits of these checkpoints are spread over several units. In float32 a product's sum in another
# order moves them by some 1e-5; a wrong kernel moves them by whole units.
_WITHIN_FLOAT32 = 1e-3
# In a half type a device may be off from float32 by so many times what a processor is off in the
# same dtype, which rounds in other places; and by this much where that is next to nothing.
_TIMES_PROCESSOR, _WITHIN_HALF = 3.0, 0.02
_DTYPES = ("float32", "float16", "bfloat16")

# Small, but with heads as wide as the published models': 64, 256, 64 and 256.
_NARROW = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
_DECODER = _NARROW | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
_LAYERWISE = _NARROW | {"num_attention_heads": 4, "num_key_value_heads": 4}
_LIGHTWEIGHT = _NARROW | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "sliding_window": 48,
}
_MISTRAL = _NARROW | {
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "sliding_window": 48,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint and the settings that it is scored with.

    Attributes:
        build: Writes it into a folder.
        settings: Of `Reranker`.
        wide_range: Whether float16 is left out, in which such models overflow.
    """

    build: Callable[[Path], Path]
    settings: dict[str, Any] = field(default_factory=dict)
    wide_range: bool = True


def _decoder(family: str, config: dict[str, Any]) -> Callable[[Path], Path]:
    from tests.family_checkpoints import build_family

    return lambda folder: build_family(folder, family, config=config)


def cases(setting: Setting) -> dict[str, Case]:
    """Return every family, the layouts of its attention among them."""
    from tests.checkpoints import build_bert

    return {
        "encoder, XLM-RoBERTa": Case(lambda _: checkpoint(setting, "small"), wide_range=False),
        "encoder, BERT": Case(build_bert, wide_range=False),
        "decoder, Gemma": Case(_decoder("decoder", _DECODER)),
        "decoder, Mistral, window": Case(_decoder("decoder", _MISTRAL), {"family": "decoder"}),
        "layerwise": Case(_decoder("layerwise", _LAYERWISE), {"cutoff_layers": 3}),
        "lightweight": Case(
            _decoder("lightweight", _LIGHTWEIGHT), {"compress_ratio": 2, "compress_layers": [2]}
        ),
    }


def documents() -> tuple[str, list[str]]:
    """Return a query and documents of many lengths, some of them equal."""
    from tests.checkpoints import read_queries, read_sentences

    sentences = list(read_sentences().values())
    texts = [" ".join(sentences[place : place + 1 + place % 5]) for place in range(0, 60, 2)]
    return next(iter(read_queries().values())), texts


def correctness(setting: Setting) -> Rows:
    """Compare every family with a processor in float32, in every dtype."""
    device = resolve_device(setting.device)
    for name, case in cases(setting).items():
        folder = setting.folder / name.replace(" ", "-").replace(",", "")
        try:
            path = case.build(folder)
            exact = logits(path, case, device="cpu", dtype="float32")[0]
        except Exception as error:  # noqa: BLE001 - the other families are to be compared as well
            yield Row(name, passed=False, note=f"{type(error).__name__}: {error}"[:400])
            continue
        for dtype in _DTYPES:
            if dtype == "float16" and case.wide_range:
                continue
            yield checked(f"{name}, {dtype}", partial(_compared, path, case, device, dtype, exact))


def logits(folder: Path, case: Case, *, device: str, dtype: str) -> tuple[list[float], str]:
    """Return the logits of the documents, and by which path they came."""
    query, texts = documents()
    # So small that there are several packs.
    with Reranker(
        str(folder), device=device, dtype=dtype, pack_tokens=512, **case.settings
    ) as reranker:
        found = reranker.logits(query, texts)
        return found, path_of(reranker)


def path_of(reranker: Reranker) -> str:
    """Return which attention an engine runs with, and whether it runs ahead."""
    model: Any = reranker._core.workers[0].model  # noqa: SLF001 - no setting tells
    model = getattr(model, "_model", model)
    attend: Any = getattr(model, "_attend", None)
    kernel = getattr(attend, "keywords", {}).get("kernel", attend)
    name = getattr(kernel, "__name__", type(kernel).__name__)
    return f"{name}, {'ahead' if model.runs_ahead else 'waiting'}"


def expected_path(device: torch.device, dtype: str) -> str | None:
    """Return the path that is the fastest on a device, where one is known."""
    if device.type != "cuda":
        return None
    flash = dtype != "float32" and torch.cuda.get_device_capability(device) >= (8, 0)
    return f"{'flash' if flash else 'efficient'}, ahead"


def _compared(
    folder: Path, case: Case, device: torch.device, dtype: str, exact: Sequence[float]
) -> str:
    found, path = logits(folder, case, device=str(device), dtype=dtype)
    error = largest_error(found, exact)
    within = _WITHIN_FLOAT32
    if dtype != "float32":
        processor, _ = logits(folder, case, device="cpu", dtype=dtype)
        within = max(_WITHIN_HALF, _TIMES_PROCESSOR * largest_error(processor, exact))
    spread = max(exact) - min(exact)
    note = f"off by {error:.1e}, allowed {within:.1e}, logits spread over {spread:.1f}; {path}"
    wanted = expected_path(device, dtype)
    # Written so that NaN passes no comparison.
    if not error <= within or (wanted is not None and path != wanted):
        raise AssertionError(note + (f", expected {wanted}" if wanted else ""))
    return note


def largest_error(found: Sequence[float], exact: Sequence[float]) -> float:
    """Return the largest difference; NaN where there is one."""
    differences = torch.tensor(found, dtype=torch.float64) - torch.tensor(
        exact, dtype=torch.float64
    )
    return float(differences.abs().max())
