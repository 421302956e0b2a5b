"""Runs real clients against a real server: `python -m tests.clients.run [ENVIRONMENT ...]`.

Each environment is made once, below `.venv-clients/`, from its file of pinned versions; none of
them holds this package. The servers are two processes of `bge-rerank serve` on loopback, with and
without a key. Without names all environments are run.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bge_rerank_adapters import Reranker
from tests.texts import DOCUMENTS, QUERY

HERE = Path(__file__).parent
HOME = HERE.parent.parent / ".venv-clients"
# What is installed together, as far as its pins allow, and what is run there.
ENVIRONMENTS = {
    "cohere-5.2": ("cohere_sdk.py", "langchain_cohere_client.py"),
    "cohere-5": ("cohere_sdk.py", "langchain_cohere_client.py"),
    "cohere-6": ("cohere_sdk.py", "llama_index_clients.py"),
    "cohere-7": ("cohere_sdk.py",),
    "haystack": ("haystack_rankers.py",),
    "infinity": ("infinity_sdk.py",),
    "litellm": ("litellm_providers.py", "llama_index_clients.py", "xinference_sdk.py"),
    "milvus": ("pymilvus_model.py",),
}
KEY = "a-key-of-the-tests"
MODEL = "tiny"
LONG = " ".join(["Goethe spent his later years in Weimar."] * 100)


def main() -> int:
    """Run the environments that are named, and return how many failed."""
    names = sys.argv[1:] or list(ENVIRONMENTS)
    unknown = sorted(set(names) - set(ENVIRONMENTS))
    if unknown:
        sys.stderr.write(f"Unknown: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}.\n")
        return 2
    pythons = {name: environment(name) for name in names}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        told = folder / "servers.json"
        open_url = stack.enter_context(server(folder / "open.log"))
        locked_url = stack.enter_context(server(folder / "locked.log", BGE_RERANK_API_KEY=KEY))
        told.write_text(json.dumps(expected() | {"open_url": open_url, "locked_url": locked_url}))
        failed = [name for name in names if run(name, pythons[name], told)]
    sys.stdout.write(f"{len(names) - len(failed)} environments passed, {len(failed)} failed")
    sys.stdout.write(f": {', '.join(failed)}\n" if failed else "\n")
    return len(failed)


def environment(name: str) -> Path:
    """Return the Python of an environment, which is made if its pins have changed."""
    pins = HERE / f"requirements-{name}.txt"
    folder, state = HOME / name, hashlib.sha256(pins.read_bytes()).hexdigest()
    python, mark = folder / "bin" / "python", folder / "installed"
    if not mark.exists() or mark.read_text() != state:
        sys.stdout.write(f"Making {folder.relative_to(HOME.parent)}\n")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--requirement", pins]
        subprocess.run(pip, check=True)
        mark.write_text(state)
    return python


def expected() -> dict[str, object]:
    """Return a request, and what the engine itself makes of it."""
    documents = [*DOCUMENTS, LONG, "歌德写了《浮士德》。", "A text with\na new line, and a ☃."]
    with Reranker(MODEL, device="cpu") as engine:
        ranking = engine.rerank(QUERY, documents)
    return {
        "key": KEY,
        "model": MODEL,
        "query": QUERY,
        "documents": documents,
        "ranking": [(each.index, each.score) for each in ranking],
        "logits": [each.logit for each in ranking],
        "tokens": ranking.usage.tokens if ranking.usage else 0,
    }


@contextmanager
def server(log: Path, **variables: str) -> Iterator[str]:
    """Run `bge-rerank serve` on a free port of loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bge_rerank_adapters", "serve", "--model", MODEL]
    command += ["--device", "cpu", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **variables}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                raise RuntimeError(f"The server did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    """Return whether something answers 200 there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - loopback
            return bool(answer.status == 200)
    except OSError:
        return False


def run(name: str, python: Path, told: Path) -> bool:
    """Run an environment's tests, and return whether they failed."""
    sys.stdout.write(f"\n{name}\n")
    sys.stdout.flush()
    files = [HERE / each for each in ENVIRONMENTS[name]]
    command = [python, "-m", "pytest", "-q", "-c", HERE / "pytest.ini", "--confcutdir", HERE]
    quiet = {"HAYSTACK_TELEMETRY_ENABLED": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *files], check=False, env={**kept, **quiet, "RERANK_SERVERS": str(told)}
    )
    return done.returncode != 0


if __name__ == "__main__":
    raise SystemExit(main())
