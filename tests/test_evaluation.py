"""Experiments: trec_eval's numbers, the same ones after a kill, and pictures that are drawn."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from bge_rerank_adapters import Reranker, evaluation
from bge_rerank_adapters.calls.ranked_document import RankedDocument
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.evaluation import (
    Collection,
    Report,
    Scored,
    best_threshold,
    bm25,
    compare,
    evaluate,
    measure,
    plots,
    read_collection,
    read_run,
    timing,
    write_run,
)
from bge_rerank_adapters.settings import EngineSettings
from tests.checkpoints import XQUAD, build_xlm_roberta
from tests.test_imports import run_python

pytrec_eval = pytest.importorskip("pytrec_eval")

NAMES = {"nDCG@10": "ndcg_cut_10", "MAP": "map", "R@10": "recall_10", "R@5": "recall_5"}
TINY = {"tiny": EngineSettings(model="tiny", device="cpu", dtype="float32")}


@pytest.fixture(scope="module")
def collection():
    return read_collection(XQUAD).sample(24)


@pytest.fixture(scope="module")
def first_stage(collection):
    return bm25(collection, depth=12)


@pytest.fixture(scope="module")
def report(collection, first_stage, reranker) -> Report:
    return evaluate(collection, first_stage, {"tiny": reranker})


def trec_order(found):
    return sorted(found, key=lambda name: (np.float32(found[name]), name), reverse=True)


ids = st.sampled_from([f"d{i}" for i in range(30)])
grades = st.dictionaries(ids, st.integers(0, 3), min_size=1, max_size=8)
# Few distinct scores, so that ties are common; some that only 64 bits tell apart.
scores = st.sampled_from([0.0, 1.0, 1.0 + 1e-12, -2.5, 7.25, 1e-9])


@settings(max_examples=150, deadline=None)
@given(
    judgements=st.dictionaries(st.sampled_from("abc"), grades, min_size=1),
    run=st.dictionaries(
        st.sampled_from("abcx"),
        st.dictionaries(ids, scores, min_size=1) | st.dictionaries(ids, scores, min_size=14),
    ),
)
def test_metrics_are_those_of_trec_eval(judgements, run):
    got = measure(judgements, run, recall_at=[5, 10])
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut", "map", "recall"})
    wanted = evaluator.evaluate({query: run[query] for query in run if query in judgements})
    top = {q: {d: found[d] for d in trec_order(found)[:10]} for q, found in run.items()}
    first = pytrec_eval.RelevanceEvaluator(judgements, {"recip_rank"}).evaluate(
        {query: top[query] for query in top if query in judgements}
    )
    for query in judgements:
        for name, theirs in NAMES.items():
            expected = wanted.get(query, {}).get(theirs, 0.0)
            assert got.per_query[name][query] == pytest.approx(expected, abs=1e-12)
        expected = first.get(query, {}).get("recip_rank", 0.0)
        assert got.per_query["MRR@10"][query] == pytest.approx(expected, abs=1e-12)
    assert got.mean["MAP"] == pytest.approx(sum(got.per_query["MAP"].values()) / len(judgements))


@pytest.mark.parametrize(("rank", "wanted"), [(1, 1.0), (3, 1 / 3), (10, 0.1), (11, 0.0)])
def test_mrr_looks_at_ten_documents(rank, wanted):
    run = {"q": {f"d{place}": -float(place) for place in range(1, 31)}}
    got = measure({"q": {f"d{rank}": 1}}, run)
    assert got.mean["MRR@10"] == pytest.approx(wanted)


def test_a_beir_folder_is_read_whole(collection):
    whole = read_collection(XQUAD)
    assert (len(whole.documents), len(whole.queries)) == (600, 260)
    assert (len(collection.documents), len(collection.queries)) == (600, 24)
    assert [*collection.queries][:1] == [*whole.queries][:1]
    assert [*collection.queries][-1:] == [*whole.queries][-1:]
    assert whole.sample(1000) is whole
    assert whole.fingerprint() != collection.fingerprint()


def write_folder(folder, *, corpus="", queries="", qrels="", under="qrels.tsv"):
    (folder / under).parent.mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    (folder / under).write_text(qrels)
    return folder


def test_the_sample_comes_with_the_package_and_is_that_of_the_tests():
    sample, whole = evaluation.sample_collection(), read_collection(XQUAD)
    assert sample == whole
    assert (len(sample.documents), len(sample.queries)) == (600, 260)


def test_titles_go_before_texts_and_qrels_may_stand_in_a_folder(tmp_path):
    folder = write_folder(
        tmp_path,
        corpus='{"_id": "1", "title": "Faust", "text": "A play."}\n\n{"_id": "2", "text": "Rain."}',
        queries='{"_id": "a", "text": "Faust?"}\n{"_id": "b", "text": "not judged"}\n',
        qrels="query-id\tcorpus-id\tscore\na\t1\t2\na\t2\t0\n",
        under="qrels/test.tsv",
    )
    read = read_collection(folder)
    assert read.documents == {"1": "Faust A play.", "2": "Rain."}
    assert (read.queries, read.judgements) == ({"a": "Faust?"}, {"a": {"1": 2, "2": 0}})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"corpus": '{"_id": "1", "text": "x"}\nnonsense'}, r"corpus\.jsonl, line 2: must be a"),
        ({"corpus": '{"_id": "1"}'}, r"corpus\.jsonl, line 1: .*KeyError"),
        ({"queries": '{"_id": "a", "text": 5}'}, r"queries\.jsonl, line 1: .*TypeError"),
        ({"qrels": "a\t1\t1.0\n"}, r"qrels\.tsv, line 1: must be query, document and a whole"),
        ({"qrels": "a\t1\t1\na 1 1"}, r"qrels\.tsv, line 2: must be query"),
        (
            {"qrels": "a 1 1\n"},
            r"qrels\.tsv, line 1: must be query.* separated by tabs, got 'a 1 1'",
        ),
        ({"corpus": '{"_id": 1, "text": ""}\n{"_id": "1", "text": ""}'}, "line 2: _id '1' came"),
        ({"queries": '{"_id": null, "text": ""}'}, r"queries\.jsonl, line 1: .*TypeError"),
        ({"corpus": '{"_id": "1\\ud800", "text": ""}'}, "line 1: _id .* half a surrogate pair"),
        ({"queries": '{"_id": "a\\u0000", "text": ""}'}, "line 1: _id .* has a NUL"),
        ({"qrels": "other\t1\t1"}, "no query of queries.jsonl has a judgement"),
    ],
)
def test_damaged_folders_are_told_by_file_and_line(tmp_path, broken, message):
    good = {
        "corpus": '{"_id": "1", "text": "x"}',
        "queries": '{"_id": "a", "text": "x"}',
        "qrels": "a\t1\t1",
    }
    with pytest.raises(SettingsError, match=message):
        read_collection(write_folder(tmp_path, **good | broken))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"corpus\.jsonl cannot be read .* BEIR folder holds"):
        read_collection(tmp_path)


def test_bm25_finds_most_answers_the_same_way_twice(collection, first_stage):
    assert bm25(collection, depth=12) == first_stage
    assert measure(collection.judgements, first_stage).mean["R@10"] > 0.8
    for found in first_stage.values():
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert 0 < len(found) <= 12
    with pytest.raises(SettingsError, match="language 'klingon' has no stemmer"):
        bm25(collection, language="klingon")
    assert bm25(collection, depth=3, language=None).keys() == first_stage.keys()


def test_runs_survive_writing_and_reading(tmp_path, report, first_stage):
    run = report["tiny"].run(first_stage)
    write_run(tmp_path / "a.trec", run, tag="tiny")
    assert read_run(tmp_path / "a.trec") == run
    (tmp_path / "b.trec").write_text("q Q0 d 1 0.5 t\n\nq Q0 d 1\n")
    with pytest.raises(SettingsError, match=r"b\.trec, line 3: must be query, Q0"):
        read_run(tmp_path / "b.trec")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_run(tmp_path / "none.trec")


def test_reranking_helps_and_the_report_says_by_how_much(report, first_stage, collection):
    before, after = report.before.mean, report.after["tiny"].mean
    assert before.keys() == {"nDCG@10", "MRR@10", "MAP", "R@10", "R@12"} == after.keys()
    assert before["R@12"] == after["R@12"], "reranking finds nothing new"
    first, tiny = report.to_records()
    assert (first["engine"], tiny["engine"]) == ("first stage", "tiny")
    assert tiny["gain"] == pytest.approx(after["nDCG@10"] - before["nDCG@10"])
    assert tiny["better"] + tiny["worse"] <= 24
    assert tiny["passages_per_s"] > 0 < tiny["latency_ms"] <= tiny["latency_p95_ms"]
    queries = report.per_query()
    assert [each["query"] for each in queries] == list(collection.queries)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "24 queries, 600 documents, 12 candidates" in text
    for words in ("first stage", "recall@12", "95 % of the queries within, ms", "interval from"):
        assert words in text
    assert f"{after['nDCG@10']:.4f}" in text
    assert f"{after['nDCG@10']:.4f}" in report._repr_html_()


def test_fewer_candidates_are_cut_from_one_scoring(report, reranker, collection, first_stage):
    curve = report.by_depth("tiny")
    assert list(curve) == [1, 2, 3, 5, 10, 12]
    assert curve[1] == pytest.approx(report.before.mean["nDCG@10"])
    assert curve[12] == pytest.approx(report.after["tiny"].mean["nDCG@10"])
    alone = evaluate(collection, first_stage, {"five": reranker}, depth=5)
    assert alone.depth == 5
    found = {
        query: list(names)[:5] for query, names in report["tiny"].run(first_stage, depth=5).items()
    }
    assert found == {
        query: list(names) for query, names in alone["five"].run(alone.first_stage).items()
    }


def test_significance_is_a_paired_t_test():
    judgements = {str(i): {"a": 1} for i in range(20)}
    worse = {query: {"b": 2.0, "a": 1.0} for query in judgements}
    better = {query: {"a": 2.0, "b": 1.0} for query in judgements}
    mixed = better | {str(i): worse[str(i)] for i in range(4)}
    before = measure(judgements, worse)
    test = compare(before, measure(judgements, mixed))
    # By hand: 16 gains of g and 4 of 0; t = mean / (sd / sqrt(20)) = 0.8g / (0.4104g / 4.472).
    assert test.p_value == pytest.approx(2 * student.sf(0.8 / (0.41039 / 20**0.5), 19), rel=1e-3)
    assert test.low < test.difference < test.high
    assert (test.better, test.worse) == (16, 0)
    same = compare(before, before)
    assert (same.difference, same.p_value, same.better) == (0.0, 1.0, 0)
    assert compare(before, measure(judgements, better)).p_value == 0.0


def test_a_killed_experiment_continues_without_scoring_twice(
    tmp_path, collection, first_stage, report
):
    class Failing:
        def __repr__(self):
            return f"Failing({self.engine!r})"

        def __init__(self, engine, calls):
            self.engine, self.left, self.calls = engine, calls, 0

        def rerank(self, query, documents, **limits):
            if not self.left:
                raise KeyboardInterrupt
            self.left, self.calls = self.left - 1, self.calls + 1
            return self.engine.rerank(query, documents, **limits)

        async def arerank(self, query, documents, **limits):
            raise NotImplementedError

    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        with pytest.raises(KeyboardInterrupt):
            evaluate(collection, first_stage, {"tiny": Failing(engine, 10)}, folder=tmp_path)
        path = tmp_path / "tiny.scores.jsonl"
        os.truncate(path, path.stat().st_size - 7)  # killed within a line
        rest = Failing(engine, 100)
        again = evaluate(collection, first_stage, {"tiny": rest}, folder=tmp_path)
        assert rest.calls == 24 - 9
        idle = Failing(engine, 0)
        once_more = evaluate(collection, first_stage, {"tiny": idle}, folder=tmp_path)
    assert again.after == report.after == once_more.after
    assert again["tiny"].seconds == once_more["tiny"].seconds


def test_another_experiment_in_the_folder_is_refused(tmp_path, collection, first_stage):
    few = collection.sample(2)
    evaluate(few, first_stage, TINY, folder=tmp_path, depth=2)
    with pytest.raises(SettingsError, match="differs in first_stage; choose another folder"):
        evaluate(few, first_stage, TINY, folder=tmp_path, depth=3)
    shorter = {"tiny": EngineSettings(model="tiny", device="cpu", dtype="float32", max_length=64)}
    with pytest.raises(SettingsError, match="differs in settings"):
        evaluate(few, first_stage, shorter, folder=tmp_path, depth=2)
    with pytest.raises(SettingsError, match="differs in collection, first_stage"):
        evaluate(collection.sample(3), first_stage, TINY, folder=tmp_path, depth=2)


class ByWords:
    """A scorer that tells scores alone, as a remote one may, and nothing of itself."""

    def rerank(self, query, documents, **limits):
        scores = [0.9 if index % 2 else 0.2 for index in range(len(documents))]
        order = sorted(range(len(documents)), key=lambda index: -scores[index])
        return [RankedDocument(index, scores[index], documents[index], None) for index in order]

    async def arerank(self, query, documents, **limits):
        raise NotImplementedError


def test_scores_without_logits_are_told_as_they_are(collection, first_stage):
    report = evaluate(collection.sample(3), first_stage, {"words": ByWords()})
    relevant, other = report.scores("words")
    assert {*relevant, *other} == {0.9, 0.2}
    assert {x for found in report["words"].logits.values() for x in found.values()} == {0.9, 0.2}


def test_scores_of_a_scorer_that_tells_nothing_of_itself_are_not_kept(
    tmp_path, collection, first_stage
):
    few = collection.sample(2)
    with pytest.raises(
        SettingsError, match="a ByWords, has no __repr__ that says what its scores depend on"
    ):
        evaluate(few, first_stage, {"words": ByWords()}, folder=tmp_path)

    class Told(ByWords):
        def __init__(self, version):
            self.version = version

        def __repr__(self):
            return f"Told({self.version})"

    evaluate(few, first_stage, {"words": Told(1)}, folder=tmp_path)
    evaluate(few, first_stage, {"words": Told(1)}, folder=tmp_path)
    with pytest.raises(SettingsError, match="differs in settings"):
        evaluate(few, first_stage, {"words": Told(2)}, folder=tmp_path)


@pytest.mark.parametrize("names", [("tiny", "./tiny"), ("a", "A"), ("first-stage",)])
def test_engines_whose_files_would_be_one_are_refused(collection, first_stage, names):
    with pytest.raises(SettingsError, match="would both be in files named"):
        evaluate(collection, first_stage, dict.fromkeys(names, ByWords()))


def test_what_is_no_engine_is_told(collection, first_stage):
    with pytest.raises(SettingsError, match=r"got 'tiny'; write EngineSettings\(model=...\)"):
        evaluate(collection, first_stage, {"s": "tiny"})


def test_what_has_no_words_finds_nothing(collection):
    mute = Collection("mute", {"1": "Rain.", "2": ""}, {"a": "?!", "b": "rain"}, {})
    assert bm25(mute) == {"a": {}, "b": {"1": pytest.approx(0.3, abs=0.3)}}
    assert bm25(Collection("mute", {"1": "?", "2": ""}, {"a": "rain", "b": ""}, {})) == {
        "a": {},
        "b": {},
    }
    assert bm25(Collection("none", {}, {"a": "rain"}, {})) == {"a": {}}


@pytest.mark.parametrize("grade", [0, 1])
def test_scores_are_drawn_where_all_or_nothing_is_relevant(collection, first_stage, grade):
    few = collection.sample(2)
    judgements = {query: dict.fromkeys(few.documents, grade) for query in few.queries}
    alike = replace(few, judgements=judgements)
    report = evaluate(alike, first_stage, {"words": ByWords()})
    found = sum(map(len, report.first_stage.values()))
    legend = plots.plot_scores(report, "words").get_legend()
    label = f"relevant ({found})" if grade else f"other ({found})"
    assert legend.get_texts()[0].get_text() == label


def test_a_folder_that_is_a_file_is_told(tmp_path, collection, first_stage, report):
    path = tmp_path / "file"
    path.write_text("")
    for act in (
        lambda: evaluate(collection, first_stage, TINY, folder=path),
        lambda: report.save(path),
        lambda: plots.save_plots(report, path),
    ):
        with pytest.raises(SettingsError, match="file cannot be made"):
            act()
    (tmp_path / "tiny.scores.jsonl").mkdir()
    with pytest.raises(SettingsError, match=r"tiny\.scores\.jsonl cannot be used"):
        evaluate(collection, first_stage, TINY, folder=tmp_path)


@pytest.mark.parametrize("text", ["{\n", "[]\n", "5\n", "\udcff\n"])
def test_damaged_scores_are_told_by_line(tmp_path, collection, first_stage, text):
    kept = tmp_path / "tiny.scores.jsonl"
    kept.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match=r"tiny\.scores\.jsonl, line 1: damaged"):
        evaluate(collection, first_stage, TINY, folder=tmp_path)


def test_weights_in_the_home_folder_are_told_apart(tmp_path, monkeypatch, collection, first_stage):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = build_xlm_roberta(tmp_path / "model")
    settings = {"home": EngineSettings(model="~/model", device="cpu", dtype="float32")}
    few = collection.sample(2)
    evaluate(few, first_stage, settings, folder=tmp_path / "out", depth=2)
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(SettingsError, match="differs in weights"):
        evaluate(few, first_stage, settings, folder=tmp_path / "out", depth=2)


def test_the_slow_part_of_the_queries_is_left_out_exactly():
    seconds = {str(number): float(number) for number in range(1, 21)}
    scored = Scored("x", "", {}, {}, seconds, 0)
    assert scored.latency_s(0.95) == 19.0
    assert scored.latency_s(1.0) == 20.0
    assert scored.latency_s() == 10.5


def test_names_are_no_html(collection, first_stage):
    report = evaluate(collection.sample(2), first_stage, {"<b>&": ByWords()})
    html = report._repr_html_()
    assert "&lt;b&gt;&amp;</th>" in html
    assert "<b>&" not in html


def test_runs_that_are_no_text_or_no_numbers_are_refused(tmp_path):
    path = tmp_path / "a.trec"
    path.write_bytes(b"q Q0 \xff 1 0.5 t\n")
    with pytest.raises(SettingsError, match=r"a\.trec is not UTF-8"):
        read_run(path)
    path.write_text("q Q0 d 1 1 0.5 t\n")
    with pytest.raises(SettingsError, match=r"a\.trec, line 1: must be query, Q0, document"):
        read_run(path)
    path.write_text("q Q0 d 1 nan t\n")
    with pytest.raises(SettingsError, match=r"a\.trec, line 1: the score must be a number"):
        read_run(path)


def test_blank_lines_of_judgements_are_nothing(tmp_path):
    folder = write_folder(
        tmp_path,
        corpus='{"_id": "1", "text": "x"}',
        queries='{"_id": "a", "text": "x"}',
        qrels="\nquery\tdocument\tgrade\n\na\t1\t1\n\n",
    )
    assert read_collection(folder).judgements == {"a": {"1": 1}}


def test_bad_arguments_are_refused(collection, first_stage, reranker):
    with pytest.raises(SettingsError, match="engines is empty"):
        evaluate(collection, first_stage, {})
    with pytest.raises(SettingsError, match="depth must be at least 1"):
        evaluate(collection, first_stage, {"tiny": reranker}, depth=0)
    query = next(iter(collection.queries))
    with pytest.raises(SettingsError, match="found document 'nowhere' for query"):
        evaluate(collection, {query: {"nowhere": 1.0}}, {"tiny": reranker})
    with pytest.raises(SettingsError, match="queries must be at least 1"):
        collection.sample(0)


def test_what_was_cut_of_queries_and_documents_is_counted(collection, first_stage):
    long = next(iter(collection.queries))
    queries = {**collection.queries, long: "who and when " * 200}
    chat = Collection(collection.name, collection.documents, queries, collection.judgements)
    report = evaluate(chat, first_stage, TINY)
    assert report["tiny"].queries_truncated == 1
    assert report.to_records()[1]["queries_truncated"] == 1
    assert "queries cut" in str(report)


def test_a_query_without_candidates_counts_as_zero(collection, reranker):
    few = collection.sample(2)
    without, judged = few.queries
    [right] = few.judgements[judged]
    report = evaluate(few, {judged: {right: 1.0}}, {"tiny": reranker})
    after = report.after["tiny"]
    assert {values[without] for values in after.per_query.values()} == {0.0}
    assert set(after.mean.values()) == {0.5}
    assert str(report)


@pytest.mark.parametrize("run", [{}, {"of another collection": {"d": 1.0}}])
def test_a_run_of_other_queries_is_refused(collection, reranker, run):
    with pytest.raises(SettingsError, match=r"has none of the .* queries"):
        evaluate(collection, run, {"tiny": reranker})


def test_a_byte_order_mark_is_no_part_of_a_query(tmp_path):
    path = tmp_path / "a.trec"
    path.write_text("q Q0 d 1 1.0 t\n", encoding="utf-8-sig")
    assert read_run(path) == {"q": {"d": 1.0}}


def test_saved_runs_measure_as_reported(tmp_path, report, collection):
    paths = report.save(tmp_path / "out")
    assert {path.name for path in paths} == {
        *("report.json", "per-query.jsonl", "first-stage.trec", "tiny.trec")
    }
    again = measure(
        collection.judgements, read_run(tmp_path / "out" / "tiny.trec"), recall_at=[10, 12]
    )
    assert again == report.after["tiny"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_records()


@pytest.mark.parametrize(
    ("relevant", "other", "wanted"),
    [
        ([0.9, 0.8], [0.1, 0.2], (0.8, 1.0)),
        ([0.9, 0.3], [0.5, 0.1], (0.3, 0.8)),
        ([0.5], [0.5], (0.5, 2 / 3)),
        ([], [0.5], (1.0, 0.0)),
        ([], [], (1.0, 0.0)),
    ],
)
def test_the_best_threshold_maximises_f1(relevant, other, wanted):
    assert best_threshold(relevant, other) == pytest.approx(wanted)


def test_every_picture_is_drawn_and_saved(tmp_path, report):
    paths = plots.save_plots(report, tmp_path)
    assert {path.stem for path in paths} == {
        *("gain-per-query", "depth", "quality-and-time", "scores-tiny")
    }
    assert all(path.stat().st_size > 10_000 for path in paths)
    axes = plots.plot_depth(report)
    assert [text.get_text() for text in axes.get_xticklabels()][:3] == ["0", "1", "2"]
    assert "24 queries" in axes.get_title()
    [curve] = [line for line in axes.lines if line.get_label() == "tiny"]
    assert curve.get_ydata()[0] == report.before.mean["nDCG@10"], "no candidate: the first stage"
    assert axes.collections, "an interval"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["tiny", "first stage"]
    relevant, other = report.scores("tiny")
    labels = [
        text.get_text() for text in plots.plot_scores(report, "tiny").get_legend().get_texts()
    ]
    assert {f"relevant ({len(relevant)})", f"other ({len(other)})"} < set(labels)


def judged(wins: int, losses: int, same: int) -> Report:
    """A report of queries that reranking mends, spoils, and leaves."""
    queries = {str(number): "q" for number in range(wins + losses + same)}
    judgements = {query: {"a" if int(query) < wins + same else "b": 1} for query in queries}
    first = {query: {"b": 2.0, "a": 1.0} for query in queries}
    logits = {
        query: {"a": 2.0, "b": 1.0} if int(query) < wins else {"b": 2.0, "a": 1.0}
        for query in queries
    }
    for query in list(queries)[wins + same :]:
        logits[query] = {"a": 2.0, "b": 1.0}
    scored = Scored("x", "", logits, logits, dict.fromkeys(queries, 0.1), 0)
    made = Collection("c", {"a": "A", "b": "B"}, queries, judgements)
    return Report(made, first, [scored], first_stage_name="BM25")


@pytest.mark.parametrize(
    ("counts", "start", "within"),
    [
        ((30, 2, 8), "Yes, x helps: nDCG@10 rises by ", "of 40 queries 30 get better and 2 worse."),
        ((2, 30, 8), "No, x harms: nDCG@10 falls by ", "of 40 queries 2 get better and 30 worse."),
        ((3, 2, 9), "Whether x helps cannot be told from 14 queries: ", "changes by +0."),
        ((0, 0, 9), "Whether x helps cannot be told from 9 queries: ", "changes by +0.000"),
        ((1, 0, 0), "Whether x helps cannot be told from 1 queries: ", "has no interval"),
    ],
)
def test_the_report_answers_in_a_sentence_with_its_interval(counts, start, within):
    report = judged(*counts)
    text = report.answer("x")
    assert text.startswith(start)
    assert within in text
    test = report.comparison("x")
    if len(report.collection.queries) > 1:
        assert f"95 % interval {test.low:+.3f} to {test.high:+.3f}" in text
    assert text in " ".join(str(report).split())
    assert text in report._repr_html_()
    assert "BM25" in str(report)


def test_times_of_fewer_candidates_are_measured_and_kept(
    tmp_path, collection, first_stage, monkeypatch
):
    now = 0.0

    class Timed(ByWords):
        """Takes a millisecond for each document, by the clock that it is timed with."""

        calls = 0

        def __repr__(self):
            return "Timed()"

        def rerank(self, query, documents, **limits):
            nonlocal now
            type(self).calls += 1
            now += 0.001 * len(documents)
            return super().rerank(query, documents, **limits)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    run = {query: found for query, found in first_stage.items() if len(found) == 12}
    part = replace(
        collection,
        queries={query: collection.queries[query] for query in run},
        judgements={query: collection.judgements[query] for query in run},
    )
    report = evaluate(part, run, {"s": Timed()}, folder=tmp_path, time_depths=True)
    times = report["s"].depth_seconds
    assert times == {depth: pytest.approx(0.001 * depth) for depth in (2, 5, 10, 12)}
    asked = Timed.calls
    again = evaluate(part, run, {"s": Timed()}, folder=tmp_path, time_depths=True)
    assert (Timed.calls, again["s"].depth_seconds) == (asked, times)
    [curve] = [line for line in plots.plot_quality_and_time(again).lines if line.get_label() == "s"]
    assert list(curve.get_xdata()) == pytest.approx([1000 * seconds for seconds in times.values()])


def test_only_measured_times_are_drawn(report):
    axes = plots.plot_quality_and_time(report)
    [curve] = [line for line in axes.lines if line.get_label() == "tiny"]
    assert list(curve.get_xdata()) == [pytest.approx(1000 * report["tiny"].latency_s())]
    assert axes.get_xlim()[0] == 0


def test_lines_that_coincide_are_told_apart(collection, first_stage, report):
    twice = Report(collection, first_stage, [report["tiny"], replace(report["tiny"], name="other")])
    one, two = plots.plot_depth(twice).lines[:2]
    assert list(one.get_ydata()) == list(two.get_ydata())
    assert one.get_linewidth() > two.get_linewidth()
    assert (one.get_linestyle(), one.get_marker()) != (two.get_linestyle(), two.get_marker())


def test_missing_packages_are_told_with_the_command_that_mends_it():
    done = run_python(
        "from bge_rerank_adapters.evaluation import measure; measure({}, {})",
        blocked=("ir_measures",),
    )
    assert 'needs ir_measures; run: pip install "bge-rerank-adapters[eval]"' in done.stderr


def test_all_names_are_exported():
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
