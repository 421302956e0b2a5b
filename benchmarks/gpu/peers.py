"""What this package is compared with on a GPU: padded batches, as others run them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import MAX_LENGTH

Pairs = Sequence[tuple[str, str]]
# From pairs and the number of them in a batch to their logits, in the order of the pairs.
Score = Callable[[Pairs, int], list[float]]

STAND_IN = "plain transformers loop (stand-in of this benchmark's own)"


def load_peer(folder: Path, device: str, dtype: torch.dtype) -> tuple[str, Score]:
    """Return the peer's name and what scores with it.

    sentence-transformers' CrossEncoder with torch's scaled_dot_product_attention, where it is
    installed; otherwise transformers' own model with batches padded in the order of length, as
    CrossEncoder has them.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        return STAND_IN, _stand_in(folder, device, dtype)
    model = CrossEncoder(
        str(folder),
        max_length=MAX_LENGTH,
        device=device,
        activation_fn=torch.nn.Identity(),
        model_kwargs={"attn_implementation": "sdpa", **_dtype_option(dtype)},
    )

    def score(pairs: Pairs, batch: int) -> list[float]:
        found = model.predict(list(pairs), batch_size=batch, show_progress_bar=False)
        return [float(each) for each in found]

    return "sentence-transformers CrossEncoder, sdpa", score


def _stand_in(folder: Path, device: str, dtype: torch.dtype) -> Score:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        str(folder), attn_implementation="sdpa", **_dtype_option(dtype)
    )
    model.to(device).eval()

    @torch.inference_mode()
    def score(pairs: Pairs, batch: int) -> list[float]:
        # By characters, as CrossEncoder does, so that texts are tokenised once.
        order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
        found = []
        for start in range(0, len(order), batch):
            chosen = [pairs[place] for place in order[start : start + batch]]
            inputs = tokenizer(
                [query for query, _ in chosen],
                [document for _, document in chosen],
                padding=True,
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            ).to(device)
            found.append(model(**inputs).logits[:, 0].float())
        logits = dict(zip(order, torch.cat(found).tolist(), strict=True))
        return [logits[place] for place in range(len(pairs))]

    return score


def _dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype by the name that this release of transformers has for it."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}
