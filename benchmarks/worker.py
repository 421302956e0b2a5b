"""One contender in a process of its own, told what to do by lines of JSON."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Load a contender, then score each request from standard input until it ends.

    Arguments: a contender's name, or "rate", and a checkpoint's folder. Every answer is a line of
    JSON on the standard output that the process was given; whatever the peers print goes to
    standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    try:
        serve = _rates() if name == "rate" else _scores(name, folder)
    except BaseException as error:  # noqa: BLE001 - the reason goes into the table
        _tell(answers, {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        return
    _tell(answers, {"ready": True})
    for line in sys.stdin:
        try:
            _tell(answers, serve(json.loads(line)))
        except BaseException as error:  # noqa: BLE001
            _tell(answers, {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})


def _scores(name: str, folder: Path) -> Any:
    from benchmarks.contenders import CONTENDERS

    score = CONTENDERS[name](folder)

    def serve(request: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        scores = score(request["query"], request["documents"])
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "scores": scores, **_memory()}

    return serve


def _rates() -> Any:
    import torch
    from torch.nn import functional

    def serve(request: dict[str, Any]) -> dict[str, Any]:
        """Return the product rate of each dtype at the sizes of a feed-forward block."""
        tokens, hidden, wide = request["tokens"], request["hidden"], request["intermediate"]
        rates: dict[str, float] = {}
        for dtype in (torch.float32, torch.bfloat16):
            states = torch.randn(tokens, hidden).to(dtype)
            weight = torch.randn(wide, hidden).to(dtype)
            with torch.inference_mode():
                seconds = _best(lambda s=states, w=weight: functional.linear(s, w))
            rates[str(dtype).removeprefix("torch.")] = 2e-9 * tokens * hidden * wide / seconds
        states = torch.randint(0, 127, (tokens, hidden), dtype=torch.uint8)
        weight = torch.randint(-127, 127, (wide, hidden), dtype=torch.int8)
        rates["int8"] = 2e-9 * tokens * hidden * wide / _best(_int8_product(states, weight))
        return {"rates": rates}

    return serve


def _int8_product(states: Any, weight: Any) -> Any:
    import torch

    packed = torch.ops.onednn.qlinear_prepack(weight, list(states.shape))
    rows = weight.shape[0]
    scales, zeros = torch.ones(rows), torch.zeros(rows, dtype=torch.int32)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        states, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _best(run: Any) -> float:
    timings = []
    for _ in range(8):
        begin = time.perf_counter()
        run()
        timings.append(time.perf_counter() - begin)
    return min(timings)


def _memory() -> dict[str, float]:
    """Return the process' memory in bytes: the most ever resident, and what is anonymous now."""
    found = {"peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.is_file():
        rows = dict(line.split(":", 1) for line in rollup.read_text().splitlines()[1:])
        found["anonymous_bytes"] = 1024.0 * int(rows["Anonymous"].split()[0])
    return found


def _tell(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
