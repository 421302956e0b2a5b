"""The engine that most tests share."""

import os
import signal
from collections.abc import Iterator

import pytest

from bge_rerank_adapters import Reranker

# Before Haystack is imported, which would send usage data from a thread.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
# A shell that runs the tests in the background has Ctrl-C ignored, in all that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def reranker() -> Iterator[Reranker]:
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        yield engine
