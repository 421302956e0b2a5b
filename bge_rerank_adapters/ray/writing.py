"""Serialises the ranked rows of a part as Parquet or JSONL."""

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bge_rerank_adapters.calls.items import Bad, Item
from bge_rerank_adapters.calls.ranking import Ranking
from bge_rerank_adapters.ray.corpus import IDS
from bge_rerank_adapters.ray.parts import Part, PartContent
from bge_rerank_adapters.ray.rows import DOCUMENTS, ERROR, RESULTS, ranked_table, valid_text

Rankings = list[Ranking | Bad]


def aside_jsonl(part: Part, content: PartContent, rankings: Rankings) -> bytes:
    """Return a line for each row without results: its place, the reason, and the row itself."""
    lines = [
        json.dumps(
            {
                **part.place(content.items[place].line),
                "error": ranking.reason,
                "input": content.source(place),
            },
            default=str,
        )
        for place, ranking in enumerate(rankings)
        if isinstance(ranking, Bad)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def ranked_jsonl(content: PartContent, rankings: Rankings, *, with_text: bool) -> bytes:
    """Return the lines of the rows with results, in the format of `bge-rerank rerank`."""
    lines: list[bytes] = []
    for place, (item, ranking) in enumerate(zip(content.items, rankings, strict=True)):
        if isinstance(item, Item) and isinstance(ranking, Ranking):
            whole = (
                item
                if content.table is None
                else replace(item, extra=_other_fields(content.source(place)))
            )
            lines.append(whole.to_json(ranking, with_text=with_text))
    return b"".join(lines)


def ranked_parquet(content: PartContent, rankings: Rankings, *, with_text: bool) -> bytes:
    """Return a Parquet file of the rows with results."""
    rows = _table_of_lines(content.items) if content.table is None else content.table
    table = ranked_table(rows, content.items, rankings, with_text=with_text)
    good = table.filter(table[ERROR].is_null()).drop_columns([ERROR])
    sink = pa.BufferOutputStream()
    pq.write_table(good, sink)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _table_of_lines(items: list[Item | Bad]) -> pa.Table:
    """Return the fields of JSON lines besides documents, in columns that are equal in all parts."""
    known = [each if isinstance(each, Item) else None for each in items]
    columns = {
        "query_id": [each and valid_text(each.extra.get("query_id")) for each in known],
        "query": [each and valid_text(each.query) for each in known],
        "rest": [each and valid_text(_other_fields_as_json(each)) for each in known],
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _other_fields_as_json(item: Item) -> str | None:
    rest = {name: value for name, value in item.extra.items() if name != "query_id"}
    return json.dumps(rest) if rest else None


def _other_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the other fields of a Parquet row as JSON values; dates, for example, become texts."""
    others = {
        name: value
        for name, value in row.items()
        if name not in {"query", DOCUMENTS, IDS, RESULTS, ERROR}
    }
    plain: dict[str, Any] = json.loads(json.dumps(others, default=str))
    return plain
