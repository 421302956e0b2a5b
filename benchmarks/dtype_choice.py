"""Whether `dtype="auto"` is the same in every start, beside processes that keep the machine busy.

`python -m benchmarks.dtype_choice --starts 200 --busy 2` starts processes that only choose.
"""

import argparse
import subprocess
import sys
from collections import Counter

_CHOOSE = (
    "import sys; from bge_rerank_adapters.engine.models.devices import resolve_device, choose_dtype"
    "; print(*choose_dtype(resolve_device(sys.argv[1])))"
)
_KEEP_BUSY = "import torch\na = torch.ones(1024, 1024)\nwhile True: a @ a"


def choices(starts: int, *, busy: int, device: str = "auto") -> Counter[str]:
    """Return how often each choice, with its reason, came out.

    Args:
        starts: How many processes choose, one after another.
        busy: How many compute meanwhile.
        device: Where the model would run.
    """
    # The command is this module's own.
    keep_busy = [sys.executable, "-c", _KEEP_BUSY]
    others = [subprocess.Popen(keep_busy) for _ in range(busy)]  # noqa: S603
    try:
        return Counter(_chosen(device) for _ in range(starts))
    finally:
        for other in others:
            other.kill()
            other.wait()


def _chosen(device: str) -> str:
    command = [sys.executable, "-c", _CHOOSE, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout.strip()


def main() -> None:
    """Print each choice and how often it came out; fails unless all are the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    found = choices(options.starts, busy=options.busy, device=options.device)
    for choice, count in found.most_common():
        sys.stdout.write(f"{count} x {choice}\n")
    sys.exit(len({choice.split()[0] for choice in found}) != 1)


if __name__ == "__main__":
    main()
