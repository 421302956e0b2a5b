"""What this package logs, whatever else is logged meanwhile."""

import logging

import pytest


def own_records(
    caplog: pytest.LogCaptureFixture, *, level: int = logging.WARNING
) -> list[logging.LogRecord]:
    """Return the records of this package of at least a level, in order.

    Others may come at any moment, such as asyncio's when what another test left behind is freed.
    """
    found = (each for each in caplog.records if each.name.startswith("bge_rerank_adapters."))
    return [each for each in found if each.levelno >= level]
