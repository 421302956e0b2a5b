"""Write `families.json`: what FlagEmbedding makes of small checkpoints of the decoder families.

    pip install FlagEmbedding==1.4.2 transformers==4.44.2
    python tests/reference/make_family_reference.py

FlagEmbedding 1.4.2 cannot build its layerwise and lightweight classes on transformers 5, and on
later 4.x they fail when they are run; on 4.44.2 all work. The checkpoints are those of
`tests/family_checkpoints.py`; the scores have to be made again when those change.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from FlagEmbedding import FlagLLMReranker, LayerWiseFlagLLMReranker, LightWeightFlagLLMReranker

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from family_checkpoints import CASES, Case, build_family, case_pairs  # noqa: E402 - see above

CLASSES = {
    "decoder": FlagLLMReranker,
    "layerwise": LayerWiseFlagLLMReranker,
    "lightweight": LightWeightFlagLLMReranker,
}
NAMES = {
    "query_instruction": "query_instruction_for_rerank",
    "passage_instruction": "passage_instruction_for_rerank",
}


def scores(case: Case, folder: Path, *, batch_size: int) -> list[float]:
    """Return FlagEmbedding's logit of every pair."""
    settings: dict[str, Any] = {
        NAMES.get(name, name): value for name, value in case.settings.items()
    }
    if "cutoff_layers" in settings:
        settings["cutoff_layers"] = [settings["cutoff_layers"]]
    reranker = CLASSES[case.family](
        str(folder), use_fp16=False, devices="cpu", batch_size=batch_size, **settings
    )
    if case.name == "decoder-bos-is-pad":
        reranker.tokenizer.bos_token = "<pad>"  # noqa: S105 - no secret
    return [float(score) for score in reranker.compute_score(case_pairs())]


def main() -> None:
    """Write the file; say how far the scores move with the batch size."""
    if transformers.__version__ != "4.44.2":
        sys.exit(f"These scores come from transformers 4.44.2, this is {transformers.__version__}.")
    cases = {}
    with tempfile.TemporaryDirectory() as parent:
        for name, case in CASES.items():
            folder = build_family(Path(parent) / name, case.family, **case.build)
            alone, together = (scores(case, folder, batch_size=size) for size in (1, 32))
            moved = max(abs(a - b) for a, b in zip(alone, together, strict=True))
            spread = max(alone) - min(alone)
            sys.stderr.write(f"{name}: spread {spread:.3f}, moved by company {moved:.1e}\n")
            cases[name] = [round(score, 6) for score in alone]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in cases.items())
    written = f'{{"transformers": "{transformers.__version__}", "cases": {{\n{lines}\n}}}}\n'
    (HERE / "families.json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
