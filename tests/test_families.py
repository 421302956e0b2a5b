"""The decoder families' numbers against FlagEmbedding's, recorded where it can run them."""

import json
import random
from pathlib import Path

import pytest
import torch
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bge_rerank_adapters import CheckpointError, Reranker, SettingsError, UnsupportedCheckpointError
from bge_rerank_adapters.cli import app, verification
from bge_rerank_adapters.engine.checkpoints.published import PublishedScores
from bge_rerank_adapters.engine.models.causal.config import ARCHITECTURES
from bge_rerank_adapters.engine.models.encoder.config import ENCODER_TYPES
from bge_rerank_adapters.engine.models.families import FAMILIES as MODEL_FAMILIES
from bge_rerank_adapters.engine.models.families import family_of
from bge_rerank_adapters.langchain import BGEDocumentCompressor
from bge_rerank_adapters.llama_index import BGENodePostprocessor
from bge_rerank_adapters.milvus import BGERerankFunction
from bge_rerank_adapters.settings import setting_names
from bge_rerank_adapters.settings.families import FAMILY_SETTINGS
from tests.family_checkpoints import CASES, build_family, case_pairs

REFERENCE = json.loads((Path(__file__).parent / "reference" / "families.json").read_text("utf-8"))
PARITY = 1e-4
COMPANY = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run slower on several threads, and far slower beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each case's checkpoint, built when it is first asked for."""
    built: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in built:
            case = CASES[name]
            built[name] = build_family(tmp_path_factory.mktemp(name), case.family, **case.build)
        return built[name]

    return folder


def open_case(folders, name: str, **settings) -> Reranker:
    case = CASES[name]
    folder = folders(name)
    if name == "decoder-bos-is-pad":
        path = folder / "tokenizer_config.json"
        path.write_text(path.read_text("utf-8").replace('"<bos>"', '"<pad>"'), encoding="utf-8")
    return Reranker(str(folder), device="cpu", dtype="float32", **(case.settings | settings))


def pair_logits(reranker: Reranker, pairs: list[tuple[str, str]]) -> list[float]:
    """Score pairs of many queries in common packs."""
    ranked = reranker.rerank_many([(query, [document]) for query, document in pairs])
    return [result.logit for [result] in ranked]


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_the_cases_scores_differ_enough_to_compare():
    for name in CASES:
        scores = REFERENCE["cases"][name]
        assert max(scores) - min(scores) > 500 * PARITY, name


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_flagembedding_alone_and_in_company(folders, name):
    wanted = REFERENCE["cases"][name]
    pairs = case_pairs()
    with open_case(folders, name) as reranker:
        alone = [reranker.logits(query, [document])[0] for query, document in pairs]
        assert worst(alone, wanted) <= PARITY
        order = list(range(len(pairs)))
        random.Random(0).shuffle(order)
        together = pair_logits(reranker, [pairs[place] for place in order])
    assert worst(together, [alone[place] for place in order]) <= COMPANY


@pytest.mark.parametrize("shift", [0.0, 0.01])
@pytest.mark.parametrize("family", ["decoder", "layerwise", "lightweight"])
def test_verify_compares_every_family(monkeypatch, folders, family, shift):
    name = f"{family}-plain"
    pairs = case_pairs()[:2]
    expected = {0: REFERENCE["cases"][name][0], 1: REFERENCE["cases"][name][1] + shift}
    entry = PublishedScores("a/b", "FlagEmbedding", "logit", PARITY, tuple(pairs), expected)
    monkeypatch.setattr(verification, "published_for", lambda model: [entry])
    options = ["--model", str(folders(name)), "--device", "cpu"]
    done = CliRunner().invoke(app, ["verify", *options], env={"COLUMNS": "200"})
    assert done.exit_code == (1 if shift else 0), done.output
    assert ("FAIL" in done.output) == bool(shift)


# What FlagEmbedding does, and is done here as well


def change_weights(folder: Path, **factors: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **entries) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | entries
    path.write_text(json.dumps(config), encoding="utf-8")


def logits(folder: Path, **settings) -> list[float]:
    settings = {"device": "cpu", "dtype": "float32", **settings}
    with Reranker(str(folder), **settings) as reranker:
        return pair_logits(reranker, case_pairs())


def test_the_lightweight_family_reads_every_layer_through_its_first_head(tmp_path):
    """FlagEmbedding takes a head by its place among the layers asked for; golden scores agree."""
    folder = build_family(tmp_path, "lightweight")
    before = logits(folder, cutoff_layers=4)
    change_weights(folder, **{f"lm_head.{place}.linear_head.weight": 0.0 for place in range(1, 5)})
    assert logits(folder, cutoff_layers=4) == before
    change_weights(folder, **{"lm_head.0.linear_head.weight": 0.0})
    assert set(logits(folder, cutoff_layers=4)) == {0.0}


def test_the_layerwise_family_reads_a_layer_through_its_own_head(tmp_path):
    folder = build_family(tmp_path, "layerwise")
    before = logits(folder, cutoff_layers=4)
    change_weights(folder, **{"lm_head.0.linear_head.weight": 0.0})
    assert logits(folder, cutoff_layers=4) == before
    change_weights(folder, **{"lm_head.2.linear_head.weight": 0.0})
    assert set(logits(folder, cutoff_layers=4)) == {0.0}


def test_the_lightweight_family_caps_logits_and_not_attention(tmp_path):
    folder = build_family(tmp_path, "lightweight")
    before = logits(folder)
    change_config(folder, attn_logit_softcapping=1.0)
    assert logits(folder) == before
    change_config(folder, final_logit_softcapping=1.0)
    assert max(map(abs, logits(folder))) <= 1.0


def test_layers_beyond_the_cutoff_are_not_even_read(tmp_path):
    folder = build_family(tmp_path, "layerwise")
    before = logits(folder, cutoff_layers=[3])
    tensors = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if not name.startswith("model.layers.5")}
    save_file(kept, folder / "model.safetensors")
    assert logits(folder, cutoff_layers=3) == before
    with pytest.raises(CheckpointError, match=r"lack the tensor model\.layers\.5"):
        logits(folder)


def test_no_compression_and_a_ratio_of_one_are_the_same(tmp_path):
    folder = build_family(tmp_path, "lightweight")
    assert logits(folder) == logits(folder, compress_ratio=1, compress_layers=[2])
    assert logits(folder) == logits(folder, compress_ratio=4)  # layer 8 is beyond the sixth
    assert logits(folder) != logits(folder, compress_ratio=4, compress_layers=[2])


# Company, dtypes, documents


@pytest.fixture(scope="module", params=["decoder", "layerwise", "lightweight"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    return build_family(tmp_path_factory.mktemp(family), family)


@pytest.mark.parametrize("pack_tokens", [64, 500, "auto"])
def test_packs_of_any_size_move_no_logit(folder, pack_tokens):
    assert worst(logits(folder, pack_tokens=pack_tokens), logits(folder)) <= COMPANY


def test_bfloat16_stays_near(folder):
    """Measured on nine such checkpoints: 0.26 at most, of logits that spread over ten."""
    assert worst(logits(folder, dtype="bfloat16"), logits(folder)) <= 0.5


def test_cut_documents_say_so_and_only_they(folder):
    query, documents = "Who won?", ["They won. " * 100, "They won.", ""]
    with Reranker(str(folder), device="cpu", max_length=64) as reranker:
        results = sorted(reranker.rerank(query, documents), key=lambda result: result.index)
    assert [result.truncated for result in results] == [True, False, False]


def test_an_exact_fit_is_not_cut(folder):
    """The prompt leaves room for a document of `max_length` tokens beside a short query."""
    with Reranker(str(folder), device="cpu", dtype="float32", max_length=16) as reranker:
        for letters in range(1, 20):
            [result] = reranker.rerank("", ["?" * letters])
            # "B", ":", "▁" or "▁?", then a question mark each.
            tokens = reranker._calls._tokenizer._tokenizer.encode("B: " + "?" * letters).ids
            assert result.truncated is (letters >= 14), (letters, len(tokens))


def test_windows_show_every_part_of_a_long_document(folder):
    query = "Who won?"
    document = " ".join(text for _, text in case_pairs()[:8])
    settings = {"device": "cpu", "dtype": "float32", "max_length": 64}
    with Reranker(str(folder), long_documents="window", **settings) as reranker:
        [result] = reranker.rerank(query, [document])
        [short] = reranker.rerank(query, ["They won."])
    start, end = result.span
    assert (result.truncated, document[start:end].strip()) == (False, document[start:end])
    assert 0 <= start < end <= len(document)
    assert (short.span, short.truncated) == ((0, 9), False)
    with Reranker(str(folder), **settings) as reranker:
        assert reranker.logits(query, ["They won."])[0] == pytest.approx(short.logit, abs=COMPANY)
        # A window is scored as the text that it shows.
        [alone] = reranker.logits(query, [document[start:end]])
    assert alone == pytest.approx(result.logit, abs=1e-3)


def test_every_adapter_runs_the_family(folder):
    query, texts = "Who won?", [text for _, text in case_pairs()[:6]]
    engine = {"device": "cpu", "dtype": "float32"}
    with Reranker(str(folder), **engine) as reranker:
        wanted = [(each.index, each.score) for each in reranker.rerank(query, texts, top_k=2)]
    compressor = BGEDocumentCompressor(model=str(folder), top_k=2, **engine)
    documents = compressor.compress_documents([Document(text) for text in texts], query)
    assert [
        (each.metadata["retrieval_index"], each.metadata["relevance_score"]) for each in documents
    ] == wanted
    postprocessor = BGENodePostprocessor(model=str(folder), top_k=2, **engine)
    nodes = postprocessor.postprocess_nodes(
        [NodeWithScore(node=TextNode(text=text)) for text in texts], query_str=query
    )
    assert [(each.node.metadata["retrieval_index"], each.score) for each in nodes] == wanted
    function = BGERerankFunction(str(folder), use_fp16=False, query_max_length=384, device="cpu")
    assert [(each.index, each.score) for each in function(query, texts, top_k=2)] == wanted


def test_milvus_instructions_replace_the_families_own(folder):
    texts = [text for _, text in case_pairs()[:4]]
    function = BGERerankFunction(
        str(folder),
        use_fp16=False,
        device="cpu",
        query_max_length=384,
        query_instruction_for_rerank="Query",
        query_instruction_format="{}: {}",
        passage_instruction_for_rerank="P: ",
        prompt="Yes?",
        normalize=False,
    )
    with Reranker(
        str(folder),
        device="cpu",
        dtype="float32",
        query_instruction="Query: ",
        passage_instruction="P: ",
        prompt="Yes?",
    ) as reranker:
        wanted = reranker.logits("Who won?", texts)
    found = {each.index: each.score for each in function("Who won?", texts)}
    assert [found[index] for index in range(4)] == pytest.approx(wanted, abs=COMPANY)


def test_flagembeddings_class_names_choose_the_family(tmp_path):
    folder = build_family(tmp_path, "layerwise")
    function = BGERerankFunction(
        str(folder), model_class="decoder-only-layerwise", cutoff_layers=[4], device="cpu"
    )
    assert function.reranker.settings.family == "layerwise"
    assert function.reranker.settings.cutoff_layers == 4


# What is refused


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("decoder", {"cutoff_layers": 2}, "cutoff_layers=2 is a setting of the layerwise"),
        ("decoder", {"compress_ratio": 2}, "compress_ratio=2 is a setting of the lightweight fam"),
        ("layerwise", {"compress_ratio": 1}, "compress_ratio=1 is a setting of the light"),
        ("lightweight", {"compress_layers": [2]}, "had no effect without compress_ratio"),
        (
            "lightweight",
            {"compress_ratio": 2, "compress_layers": [2, 99]},
            "compress_layers must be from 1 to 5, .*got 99",
        ),
        ("layerwise", {"dtype": "int8"}, "dtype 'int8' runs checkpoints of the encoder family"),
        ("layerwise", {"cutoff_layers": 1}, "from 2 to 6, .*got 1"),
        ("layerwise", {"cutoff_layers": [7]}, "from 2 to 6, .*got 7"),
        ("lightweight", {"cutoff_layers": 40}, "from 2 to 6, .*got 40"),
        ("lightweight", {"compress_ratio": 16}, "compress_ratio must be one of 1, 2, 4, 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(family, settings, message, tmp_path):
    folder = build_family(tmp_path, family)
    with pytest.raises(SettingsError, match=message):
        Reranker(str(folder), device="cpu", **settings)


def test_the_bundled_encoder_takes_no_decoders_settings():
    with pytest.raises(SettingsError, match="prompt='Yes' is a setting of the decoder and layer"):
        Reranker("tiny", device="cpu", prompt="Yes")


@pytest.mark.parametrize(
    ("family", "config", "error", "message"),
    [
        (
            "decoder",
            {"head_dim": None},
            CheckpointError,
            "head_dim must be a whole number .*got None",
        ),
        ("decoder", {"head_dim": 15}, CheckpointError, "width of a head must be an even number"),
        ("decoder", {"num_hidden_layers": 4}, CheckpointError, r"lack the tensor model\.layers\.3"),
        ("decoder", {"num_hidden_layers": 2}, CheckpointError, "config and weights are not of one"),
        ("decoder", {"hidden_size": 64}, CheckpointError, "has shape .* but config.json asks for"),
        ("decoder", {"vocab_size": 10}, CheckpointError, "embeddings for 10; tokenizer and weight"),
        ("decoder", {"num_key_value_heads": 3}, CheckpointError, "must be a multiple of num_key_v"),
        (
            "decoder",
            {"hidden_activation": "mish", "hidden_act": "mish"},
            UnsupportedCheckpointError,
            "'mish' is not known",
        ),
        ("decoder", {"tie_word_embeddings": False}, CheckpointError, "lack the tensor lm_head"),
        (
            "decoder",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            UnsupportedCheckpointError,
            "rotary positions of the type 'longrope'",
        ),
        (
            "layerwise",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            UnsupportedCheckpointError,
            "rotary positions of the type 'yarn'",
        ),
        ("layerwise", {"head_type": "raw"}, UnsupportedCheckpointError, "head_type must be 'simp"),
        ("layerwise", {"start_layer": 0}, CheckpointError, "start_layer must be a whole number"),
        ("lightweight", {"layer_wise": False}, UnsupportedCheckpointError, "layer_wise must be tr"),
        ("lightweight", {"layer_sep": "1"}, CheckpointError, "layer_sep must be a whole number"),
        (
            "lightweight",
            {"query_pre_attn_scalar": 0},
            CheckpointError,
            "a finite number above 0, got",
        ),
        (
            "lightweight",
            {"sliding_window": 0},
            CheckpointError,
            "sliding_window must be a whole num",
        ),
        ("lightweight", {"final_logit_softcapping": 0}, CheckpointError, "final_logit_softcapping"),
    ],
)
def test_configs_that_cannot_be_run_are_named(family, config, error, message, tmp_path):
    folder = build_family(tmp_path, family)
    change_config(folder, **config)
    with pytest.raises(error, match=message):
        logits(folder)


@pytest.mark.parametrize("family", ["layerwise", "lightweight"])
def test_a_tokenizer_without_its_beginning_is_named(family, tmp_path):
    folder = build_family(tmp_path, family, bos=False)
    with pytest.raises(CheckpointError, match="no bos_token, which every pair of this family"):
        logits(folder)


def test_the_beginning_may_stand_in_either_file(tmp_path):
    folder = build_family(tmp_path, "layerwise")
    wanted = logits(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizerFast"}')
    assert logits(folder) == wanted
    (folder / "tokenizer_config.json").unlink()
    roles = {"bos_token": {"content": "<bos>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    assert logits(folder) == wanted
    (folder / "special_tokens_map.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json is not valid JSON"):
        logits(folder)


def test_a_family_that_cannot_run_the_model_is_refused(tmp_path):
    folder = build_family(tmp_path, "decoder")
    assert logits(folder, family="decoder") == logits(folder)
    with pytest.raises(UnsupportedCheckpointError, match=r"'gemma' model .*lightweight family"):
        Reranker(str(folder), device="cpu", family="lightweight")


def test_lengths_that_leave_no_room_are_refused(tmp_path):
    folder = build_family(tmp_path, "decoder")
    with pytest.raises(SettingsError, match="no room for a document"):
        Reranker(str(folder), device="cpu", prompt="", max_length=20, query_max_length=19)


def test_settings_and_models_know_the_same_families():
    assert list(MODEL_FAMILIES) == list(FAMILY_SETTINGS)
    kinds = [kind for family in MODEL_FAMILIES.values() for kind in family.model_types]
    assert len(kinds) == len(set(kinds))
    for kind in kinds:
        assert kind in family_of({"model_type": kind}).model_types
    asked = [kind for family in MODEL_FAMILIES.values() for kind in family.asked_types]
    assert set(ARCHITECTURES) | set(ENCODER_TYPES) == set(kinds + asked)
    assert not set(kinds) & set(asked)
    assert family_of({"model_type": "llama"}) is None
    owned = {name for row in FAMILY_SETTINGS.values() for name in row.own}
    assert owned <= set(setting_names())
