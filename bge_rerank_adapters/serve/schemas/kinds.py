"""Types of values in requests, parsed leniently, with their JSON schemas.

Clients of other servers send booleans as words, numbers as text, and nested values in documents.
A value with one clear meaning is accepted; any other is refused.
"""

import math
import re
from typing import Annotated, Any, cast

from pydantic import PlainValidator, WithJsonSchema

Document = str | dict[str, Any]

# Deeper than any client's metadata, and shallow enough to be serialised again.
MAX_NESTED = 32
_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
# Longer numbers are no counts, and are slow to parse.
_WHOLE = re.compile(r"[+-]?[0-9]{1,30}(\.0{1,30})?")
_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")


def _text(value: object) -> str:
    # Not pydantic's own check, which may refuse lone surrogates; the engine accepts them.
    if type(value) is not str:
        raise ValueError("must be a string")
    return value


def _list(value: object, items: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of {items}")  # noqa: TRY004 - what pydantic expects
    return value


def _texts(value: object) -> list[str]:
    """Check texts up to the first error, so that a list of a million numbers gives only one."""
    for index, item in enumerate(_list(value, "strings")):
        if type(item) is not str:
            raise ValueError(f"[{index}] must be a string")
    return cast(list[str], value)


def _documents(value: object) -> list[Document]:
    for index, item in enumerate(_list(value, "strings or objects")):
        if type(item) is str:
            continue
        if not isinstance(item, dict):
            raise ValueError(  # noqa: TRY004 - as above
                f"[{index}] must be a string, or an object with its text"
            )
        if not _is_sendable(item, MAX_NESTED):
            raise ValueError(
                f"[{index}] must have finite numbers, and values nested at most {MAX_NESTED} deep"
            )
    return cast(list[Document], value)


def _is_sendable(value: object, levels: int) -> bool:
    """Return whether a value can be sent back: 1e999 is parsed as infinity, which JSON lacks."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_is_sendable(each, levels - 1) for each in items)
    return True


def _flag(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else str(value)
    if word not in _WORDS:
        raise ValueError("must be true or false")
    return _WORDS[word]


def _whole(value: object) -> int:
    # JSON has no integers: 3.0 is the same as 3.
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, int) or whole):
        raise ValueError("must be a whole number")
    return int(value)  # type: ignore[call-overload, no-any-return]


def _count(value: object) -> int | None:
    if value is None:
        return None
    count = _whole(value)
    if count < 1:
        raise ValueError("must be at least 1; leave it out for no limit")
    return count


def _tokens(value: object) -> int | None:
    if value is None:
        return None
    tokens = _whole(value)
    if tokens < -1:
        raise ValueError("must be a number of tokens; leave it out, or send -1, for no limit")
    # 0 is vLLM's default for some of these, and means no limit as well.
    return tokens if tokens > 0 else None


def _threshold(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(
            "must be a number from 0 to 1: it is compared with the score, which is in [0, 1] even "
            "where logits are asked for"
        )
    return float(value)


def _direction(value: object) -> str:
    word = "right" if value is None else value
    if not isinstance(word, str) or word.strip().lower() not in ("left", "right"):
        raise ValueError("must be Left or Right")
    return word.strip().lower()


def _schema(**schema: Any) -> WithJsonSchema:
    return WithJsonSchema(schema)


_NULL = {"type": "null"}
_DOCUMENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"text": {"type": "string"}},
            "required": ["text"],
        },
    ]
}

Text = Annotated[str, PlainValidator(_text), _schema(type="string")]
Texts = Annotated[
    list[str], PlainValidator(_texts), _schema(type="array", items={"type": "string"})
]
Documents = Annotated[
    list[Document], PlainValidator(_documents), _schema(type="array", items=_DOCUMENT)
]
Flag = Annotated[
    bool | None,
    PlainValidator(_flag),
    _schema(enum=[True, False, None, 1, 0, *_WORDS]),
]
Count = Annotated[
    int | None,
    PlainValidator(_count),
    _schema(
        anyOf=[
            {"type": "integer", "minimum": 1},
            _NULL,
            {"type": "string", "pattern": "^[1-9][0-9]{0,29}$"},
        ]
    ),
]
Tokens = Annotated[
    int | None,
    PlainValidator(_tokens),
    _schema(
        anyOf=[
            {"type": "integer", "minimum": -1},
            _NULL,
            {"type": "string", "pattern": "^(-1|[0-9]{1,30})$"},
        ]
    ),
]
Threshold = Annotated[
    float | None,
    PlainValidator(_threshold),
    _schema(
        anyOf=[
            {"type": "number", "minimum": 0, "maximum": 1},
            _NULL,
            {"type": "string", "pattern": "^(0|1|0\\.[0-9]{1,30})$"},
        ]
    ),
]
Direction = Annotated[
    str, PlainValidator(_direction), _schema(enum=["Right", "right", "Left", "left", None])
]
