"""The page on troubleshooting against the errors that the code raises."""

import ast
import re
from pathlib import Path

import pytest

from bge_rerank_adapters import errors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
TABLES = re.findall(r"^\| (message|what you see) \|.*\n\|.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)


def messages() -> list[str]:
    """The quoted parts of messages in the first column of each table of messages."""
    rows = [row for head, table in TABLES if head == "message" for row in table.splitlines()]
    cells = [re.split(r"(?<!\\)\|", row)[1] for row in rows]
    return [quoted for cell in cells for quoted in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every string in the package's code; of an f-string what stands between its places."""
    trees = [
        ast.parse(path.read_text("utf-8"))
        for path in (ROOT / errors.__name__.split(".")[0]).rglob("*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [
        node.value.casefold()
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_every_error_has_a_row():
    classes = [name for name, kind in vars(errors).items() if isinstance(kind, type)]
    told = re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)
    assert set(classes) - {"RerankError", "Self"} <= set(told)


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_of_the_codes(message, texts):
    for part in message.strip("…").casefold().split("…"):
        known = hasattr(errors, message) or any(part in text for text in texts)
        assert known, f"docs/troubleshooting.md quotes {part!r}, which no message has"


def test_there_are_messages_to_check():
    assert len(messages()) > 50
