"""Turns rows of a table into items, and rankings into rows."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bge_rerank_adapters.calls.items import Bad, Item, parse_item
from bge_rerank_adapters.calls.ranking import Ranking
from bge_rerank_adapters.errors import InputTypeError, SettingsError
from bge_rerank_adapters.ray.corpus import IDS

DOCUMENTS = "documents"
RESULTS = "results"
ERROR = "error"
Prepare = Callable[[Any], Any]

RESULT = pa.struct(
    [
        ("rank", pa.int64()),
        ("index", pa.int64()),
        ("id", pa.string()),
        ("score", pa.float64()),
        ("logit", pa.float64()),
        ("truncated", pa.bool_()),
        ("query_truncated", pa.bool_()),
        ("span", pa.list_(pa.int64())),
        ("text", pa.string()),
    ]
)
"""The fields of one result; `explode` makes them columns of the dataset."""


def items_of(
    table: pa.Table, *, first: int = 0, prepare: Prepare | None = None
) -> list[Item | Bad]:
    """Return the item of each row, or what is wrong with it.

    Args:
        table: n rows with `query` and `documents`; other columns are not read.
        first: Number of the first row.
        prepare: Adds `documents` to rows without; may raise `InputTypeError`.
    """
    wanted = [name for name in ("query", DOCUMENTS, IDS) if name in table.column_names]
    columns = {name: table[name].to_pylist() for name in wanted}
    return [
        _item(first + place, {name: _plain(columns[name][place]) for name in wanted}, prepare)
        for place in range(table.num_rows)
    ]


def ranked_table(
    table: pa.Table,
    items: list[Item | Bad],
    rankings: list[Ranking | Bad],
    *,
    with_text: bool,
) -> pa.Table:
    """Return the table with `results` and `error` in place of the documents.

    Args:
        table: n rows.
        items: The item of each row.
        rankings: The ranking of each, or why there is none.
        with_text: Whether results have the text.
    """
    results = [
        _results(item, ranking, with_text=with_text)
        if isinstance(item, Item) and isinstance(ranking, Ranking)
        else []
        for item, ranking in zip(items, rankings, strict=True)
    ]
    errors = [each.reason if isinstance(each, Bad) else None for each in rankings]
    kept = {
        name: table[name]
        for name in table.column_names
        if name not in {DOCUMENTS, IDS, RESULTS, ERROR}
    }
    return pa.table(
        {
            **kept,
            RESULTS: pa.array(results, pa.list_(RESULT)),
            ERROR: pa.array(errors, pa.string()),
        }
    )


def exploded_table(table: pa.Table) -> pa.Table:
    """Return a table with a row for each result of each row.

    Raises:
        SettingsError: A column has the same name as a field of a result.
    """
    clash = sorted({field.name for field in RESULT} & set(table.column_names))
    if clash:
        raise SettingsError(
            f"The ranked dataset has a column {clash[0]} of its own; rename it first: "
            f'ranked.rename_columns({{"{clash[0]}": "..."}}).'
        )
    results = table[RESULTS].combine_chunks()
    flat = results.flatten()
    parents = pc.list_parent_indices(results)
    kept = [name for name in table.column_names if name not in {RESULTS, ERROR}]
    columns = {name: table[name].take(parents) for name in kept}
    for place, field in enumerate(RESULT):
        columns[field.name] = flat.field(place)
    return pa.table(columns)


def valid_text(value: Any) -> str | None:
    """Return a value as a text that Arrow can store; `None` stays.

    Lone surrogates, which Arrow cannot store, become question marks.
    """
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _results(item: Item, ranking: Ranking, *, with_text: bool) -> list[dict[str, Any]]:
    return [
        record
        | {
            "id": valid_text(_name(item.documents[record["index"]])),
            "text": valid_text(record["text"]) if with_text else None,
        }
        for record in ranking.to_records()
    ]


def _item(number: int, row: dict[str, Any], prepare: Prepare | None) -> Item | Bad:
    try:
        return parse_item(number, row if prepare is None else prepare(row))
    except InputTypeError as error:
        return Bad(number, str(error), "")


def _name(known: dict[str, Any]) -> Any:
    return next((known[name] for name in ("id", "_id", "doc_id") if name in known), None)


def _plain(value: Any) -> Any:
    """Return an array as a list: Ray keeps some columns of lists as arrays."""
    return value.tolist() if hasattr(value, "tolist") else value
