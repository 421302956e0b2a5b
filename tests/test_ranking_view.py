"""How a ranking shows itself."""

import json
import pickle

import pytest

from bge_rerank_adapters import RankedDocument, Ranking, Reranker
from tests.texts import DOCUMENTS, QUERY

LONG = "word " * 200 + "the <answer> & more" + " word" * 200
START = LONG.index("the <")
RANKING = Ranking(
    [
        RankedDocument(2, 0.9, LONG, 2.2, span=(START, START + 19)),
        RankedDocument(1, 0.5, "short\n text", 0.0, truncated=True),
        RankedDocument(0, 0.001, "<b>bold</b>", -6.9, span=(0, 11)),
    ]
)


def test_rankings_are_lists_that_an_engine_returns(reranker: Reranker):
    ranking = reranker.rerank(QUERY, DOCUMENTS)
    assert isinstance(ranking, Ranking)
    assert isinstance(ranking, list)
    assert reranker.rerank(QUERY, []) == []
    assert isinstance(reranker.rerank_many([(QUERY, DOCUMENTS)])[0], Ranking)
    again = pickle.loads(pickle.dumps(ranking))  # noqa: S301
    assert again == ranking
    assert again.to_records() == ranking.to_records()


def test_records_are_plain_and_complete():
    records = json.loads(json.dumps(RANKING.to_records()))
    assert [(each["rank"], each["index"]) for each in records] == [(1, 2), (2, 1), (3, 0)]
    assert records[0]["span"] == [START, START + 19]
    assert (records[1]["span"], records[1]["truncated"], records[1]["logit"]) == (None, True, 0.0)
    assert Ranking().to_records() == []


def test_columns_show_movement_score_and_the_best_window(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert str(RANKING).splitlines() == [
        "rank  moved  score  text",
        "   1     +2  0.900  the <answer> & more",
        "   2      =  0.500  short text",
        "   3     -2  0.001  <b>bold</b>",
    ]
    assert str(Ranking()) == "rank  moved  score  text"
    wide = str(Ranking([RankedDocument(0, 0.5, LONG, 0.0)])).splitlines()[1]
    assert len(wide) <= 60
    assert wide.endswith(" ...")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_console_can_show_what_is_not_the_texts(encoding):
    lone = Ranking([*RANKING, RankedDocument(9, 0.1, "a\ud800b", -2.0, span=(0, 3))])
    assert "a?b" in str(lone).encode(encoding).decode(encoding)


def test_a_notebook_gets_what_can_be_encoded():
    text = "\ud83d\ude00 a\ud800b c"
    html = Ranking([RankedDocument(0, 0.5, text, 0.0, span=(3, 6))])._repr_html_()
    assert "<mark>a?b</mark>" in html
    assert html.encode()
    assert "↓" in Ranking([RankedDocument(1, 0.5, "", 0.0)] * 4)._repr_html_()


def test_a_notebook_gets_a_table_with_the_best_window_marked():
    html = RANKING._repr_html_()
    assert html.count("<tr>") == 4
    assert "<mark>the &lt;answer&gt; &amp; more</mark>" in html
    assert html.count("<mark>") == 1, "a whole text is not marked"
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "width:90%" in html
    assert len(html) < 4000, "long texts are shown around what matters"


def test_a_terminals_ipython_gets_columns():
    class Printer:
        def text(self, text):
            self.shown = text

    printer = Printer()
    RANKING._repr_pretty_(printer, cycle=False)
    assert printer.shown == str(RANKING)
