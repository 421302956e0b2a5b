"""Each family at a middling size: this engine against FlagEmbedding in an environment of its own.

    python -m venv reference
    reference/bin/pip install FlagEmbedding==1.4.2 transformers==4.44.2 torch==2.13.0
    python -m benchmarks.families --reference reference/bin/python

Weights are random; both sides score the same pairs of the same checkpoints, one side after the
other, in processes of their own. Logits are compared, so that both are known to do the same work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Half the width of Gemma 2B and of MiniCPM 2B, and of a Gemma 2 smaller than the hub's 9B; fewer
# layers, and 1,000 words: with a real vocabulary FlagEmbedding, which computes the logits of all
# words for the decoder family, needs more.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "middling": {
        "decoder": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 4},
        "layerwise": {"hidden_size": 1152, "intermediate_size": 2880, "num_attention_heads": 18},
        "lightweight": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 4},
    },
    "small": {family: {} for family in ("decoder", "layerwise", "lightweight")},
}
LAYERS = {"middling": 12, "small": 6}
MORE = {
    "decoder": {"num_key_value_heads": 1, "head_dim": 256},
    "layerwise": {"num_key_value_heads": 18},
    "lightweight": {"num_key_value_heads": 2, "head_dim": 256, "start_layer": 4},
}
# Settings of this engine's by the case's name; each is measured on its family.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("decoder", {}),
    "layerwise, all layers": ("layerwise", {}),
    "layerwise, half of them": ("layerwise", {"cutoff_layers": 6}),
    "lightweight": ("lightweight", {}),
    "lightweight, fewer tokens": ("lightweight", {"compress_ratio": 4, "compress_layers": [4]}),
}
CLASSES = {
    "decoder": "FlagLLMReranker",
    "layerwise": "LayerWiseFlagLLMReranker",
    "lightweight": "LightWeightFlagLLMReranker",
}


def main() -> None:
    """Measure every case and print a table; write JSON where asked for."""
    options = _arguments()
    if options.side:
        _measure_side(options.side)
        return
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for name, (family, settings) in CASES.items():
            folder = _build(Path(parent) / family, family, options.size)
            task = {
                "folder": str(folder),
                "family": family,
                "settings": settings,
                "pairs": options.pairs,
                "repeats": options.repeats,
                "threads": options.threads,
                "dtype": options.dtype,
            }
            ours = _ask(sys.executable, "ours", task)
            theirs = _ask(options.reference, "theirs", task)
            rows.append(_row(name, ours, theirs))
            print(_line(rows[-1]))  # noqa: T201 - what the program is for
    if options.output:
        written = {"size": options.size, "dtype": options.dtype, "rows": rows}
        options.output.write_text(json.dumps(written, indent=1), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--reference", help="Python of the environment with FlagEmbedding")
    parser.add_argument("--size", choices=SIZES, default="middling")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.side and not options.reference:
        parser.error("--reference is needed: the Python that FlagEmbedding is installed for")
    return options


def _build(folder: Path, family: str, size: str) -> Path:
    from tests.family_checkpoints import build_family

    if folder.exists():
        return folder
    more = MORE[family] if size != "small" else {}
    config = SIZES[size][family] | more | {"num_hidden_layers": LAYERS[size]}
    return build_family(folder, family, config=config)


def _ask(python: str, side: str, task: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds and logits of one side, measured in a process of its own."""
    done = subprocess.run(  # noqa: S603 - the user's own interpreter
        [python, "-m", "benchmarks.families", "--side", side],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed on {task['family']}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _measure_side(side: str) -> None:
    """Score the task on the standard input, and tell seconds and logits on the standard output."""
    import torch

    from tests.family_checkpoints import family_texts

    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    queries, sentences = family_texts()
    pairs = [
        (queries[place % len(queries)], " ".join(sentences[place : place + 1 + place % 6]))
        for place in range(task["pairs"])
    ]
    score = {"ours": _ours, "theirs": _theirs}[side](task)
    score(pairs[:2])
    seconds = []
    logits: list[float] = []
    for _ in range(task["repeats"]):
        begin = time.perf_counter()
        logits = score(pairs)
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds, "logits": logits}))  # noqa: T201 - read by the parent


Score = Callable[[list[tuple[str, str]]], list[float]]


def _ours(task: dict[str, Any]) -> Score:
    from bge_rerank_adapters import Reranker

    reranker = Reranker(task["folder"], device="cpu", dtype=task["dtype"], **task["settings"])

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        ranked = reranker.rerank_many([(query, [document]) for query, document in pairs])
        return [result.logit or 0.0 for [result] in ranked]

    return score


def _theirs(task: dict[str, Any]) -> Score:
    import FlagEmbedding

    settings = dict(task["settings"])
    if "cutoff_layers" in settings:
        settings["cutoff_layers"] = [settings["cutoff_layers"]]
    reranker = getattr(FlagEmbedding, CLASSES[task["family"]])(
        task["folder"],
        use_fp16=False,
        use_bf16=task["dtype"] == "bfloat16",
        devices="cpu",
        **settings,
    )
    return lambda pairs: [float(score) for score in reranker.compute_score(pairs)]


def _row(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    apart = max(abs(a - b) for a, b in zip(ours["logits"], theirs["logits"], strict=True))
    pairs = len(ours["logits"])
    return {
        "case": name,
        "ours_pairs_per_s": pairs / min(ours["seconds"]),
        "theirs_pairs_per_s": pairs / min(theirs["seconds"]),
        "largest_difference": apart,
    }


def _line(row: dict[str, Any]) -> str:
    ratio = row["ours_pairs_per_s"] / row["theirs_pairs_per_s"]
    return (
        f"{row['case']:28} {row['ours_pairs_per_s']:8.1f} pairs/s, FlagEmbedding "
        f"{row['theirs_pairs_per_s']:8.1f}: {ratio:.2f} times; logits differ by "
        f"{row['largest_difference']:.1e} at most"
    )


if __name__ == "__main__":
    main()
