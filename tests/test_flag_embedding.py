"""The drop-in for FlagEmbedding, against FlagEmbedding itself on the same weights."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import transformers

from bge_rerank_adapters import Reranker, SettingsError, flag_embedding
from bge_rerank_adapters.flag_embedding import (
    FlagAutoReranker,
    FlagLLMReranker,
    FlagReranker,
    LayerWiseFlagLLMReranker,
    LightWeightFlagLLMReranker,
)
from tests.checkpoints import build_xlm_roberta
from tests.family_checkpoints import build_family, case_pairs

PARITY = 1e-4
SECRET = "hf_secret"  # noqa: S105
OLD = transformers.__version__ == "4.44.2"
PAIRS = [list(pair) for pair in case_pairs()]
# transformers 5 reads truncated pairs and unknown characters otherwise, see `PairTokenizer`.
PLAIN = PAIRS[:12]
NAMES = [
    "FlagReranker",
    "FlagLLMReranker",
    "LayerWiseFlagLLMReranker",
    "LightWeightFlagLLMReranker",
]
FAMILIES = dict(zip(NAMES, ["encoder", "decoder", "layerwise", "lightweight"], strict=True))
needs_old = pytest.mark.skipif(not OLD, reason="FlagEmbedding runs it with transformers 4.44.2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    built: dict[str, Path] = {}

    def folder(name: str) -> str:
        if name not in built:
            path = tmp_path_factory.mktemp(name)
            family = FAMILIES[name]
            built[name] = (
                build_xlm_roberta(path) if family == "encoder" else build_family(path, family)
            )
        return str(built[name])

    return folder


def theirs(name: str, folder: str, *arguments, **options):
    module = pytest.importorskip("FlagEmbedding")
    return getattr(module, name)(folder, *arguments, devices="cpu", **options)


def ours(name: str, folder: str, *arguments, **options):
    return getattr(flag_embedding, name)(folder, *arguments, devices="cpu", **options)


def near(wanted):
    if wanted and isinstance(wanted[0], list):
        return [pytest.approx(each, abs=PARITY) for each in wanted]
    return pytest.approx(wanted, abs=PARITY)


RUN = [
    "FlagReranker",
    "FlagLLMReranker",
    *(pytest.param(name, marks=needs_old) for name in NAMES[2:]),
]


@pytest.mark.parametrize("name", RUN)
def test_scores_are_those_of_flagembedding(name, folders):
    pairs = PAIRS if OLD else PLAIN
    both = [make(name, folders(name)) for make in (theirs, ours)]
    wanted, scores = (each.compute_score(pairs) for each in both)
    assert scores == near(wanted)
    assert [type(each) for each in scores] == [float] * len(pairs)
    for options in ({"normalize": True}, {"max_length": 48}, {"query_max_length": 6}):
        if OLD or "normalize" in options:
            wanted, scores = (each.compute_score(pairs, **options) for each in both)
            assert scores == near(wanted), options
    wanted, scores = (each.compute_score(pairs[0]) for each in both)
    assert scores == near(wanted)
    assert len(scores) == 1


@pytest.mark.parametrize("name", RUN)
def test_instructions_are_those_of_flagembedding(name, folders):
    options = {
        "query_instruction_for_rerank": "The question",
        "query_instruction_format": "{}, {}",
        "passage_instruction_for_rerank": "Text",
        "passage_instruction_format": "{}\\n{}",
    }
    wanted, scores = (
        make(name, folders(name), **options).compute_score(PLAIN) for make in (theirs, ours)
    )
    assert scores == near(wanted)
    assert scores != near(ours(name, folders(name)).compute_score(PLAIN))


@needs_old
@pytest.mark.parametrize("name", NAMES[2:])
def test_several_layers_are_those_of_flagembedding(name, folders):
    both = [make(name, folders(name), cutoff_layers=[2, 4, 6]) for make in (theirs, ours)]
    wanted, scores = (each.compute_score(PAIRS) for each in both)
    assert [len(each) for each in scores] == [len(PAIRS)] * 3
    assert scores == near(wanted)
    for layers in ([3, 5], [4], [3, 4, 5, 6]):
        options = {"cutoff_layers": layers, "normalize": True, "prompt": "Yes?"}
        wanted, scores = (each.compute_score(PAIRS, **options) for each in both)
        assert scores == near(wanted), layers


@needs_old
def test_compression_is_that_of_flagembedding(folders):
    name = "LightWeightFlagLLMReranker"
    both = [make(name, folders(name)) for make in (theirs, ours)]
    for options in (
        {"compress_ratio": 2, "compress_layers": [2]},
        {"compress_ratio": 4, "compress_layers": [1, 4], "cutoff_layers": [3, 6]},
        {"compress_ratio": 8, "compress_layer": [3], "cutoff_layers": [3]},
    ):
        wanted, scores = (each.compute_score(PAIRS, **options) for each in both)
        assert scores == near(wanted), options


@pytest.mark.parametrize("name", NAMES)
def test_constructors_take_flagembeddings_arguments_in_its_order(name):
    module = pytest.importorskip("FlagEmbedding")
    wanted = list(inspect.signature(getattr(module, name).__init__).parameters.values())
    wanted = [each for each in wanted if each.kind is not each.VAR_KEYWORD]
    found = list(inspect.signature(getattr(flag_embedding, name).__init__).parameters.values())
    found = found[: len(wanted)]
    assert [each.name for each in found] == [each.name for each in wanted]

    def plain(value):
        return tuple(value) if isinstance(value, list) else value

    assert [plain(each.default) for each in found] == [plain(each.default) for each in wanted]
    assert {each.kind for each in found[1:]} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", NAMES)
def test_calls_take_flagembeddings_arguments(name):
    module = pytest.importorskip("FlagEmbedding")
    single = getattr(module, name).compute_score_single_gpu
    wanted = inspect.signature(single).parameters.keys() - {"device", "kwargs"}
    found = inspect.signature(getattr(flag_embedding, name).compute_score).parameters
    assert wanted == set(found)
    assert all(each.kind is each.KEYWORD_ONLY for each in list(found.values())[2:])


def test_the_bundled_checkpoint_and_the_engine_that_all_share():
    flag = FlagReranker("tiny", False, devices="cpu")
    with Reranker("tiny", device="cpu", dtype="float32") as engine:
        assert flag.compute_score(("q", "d")) == near(engine.logits("q", ["d"]))
    assert FlagReranker("tiny", devices=["cpu"]).reranker is flag.reranker
    assert flag.compute_score([]) == []
    assert flag.target_devices == ["cpu"]


def test_attributes_hold_for_the_calls_that_follow(folders):
    flag = ours("FlagLLMReranker", folders("FlagLLMReranker"))
    wanted = flag.compute_score(PAIRS, max_length=48, prompt="Yes?", normalize=True)
    flag.max_length, flag.prompt, flag.normalize = 48, "Yes?", True
    assert flag.compute_score(PAIRS) == wanted
    assert flag.compute_score([]) == []


@pytest.mark.parametrize("name", NAMES[2:])
def test_layers_of_a_call(name, folders):
    flag = ours(name, folders(name), trust_remote_code=True)
    assert flag.compute_score(PLAIN) == near(flag.compute_score(PLAIN, cutoff_layers=6))
    one, several = (flag.compute_score(PLAIN, cutoff_layers=layers) for layers in ([2], [2, 6]))
    assert several[0] == near(one)
    assert flag.compute_score([], cutoff_layers=[2, 6]) == []
    for layers, message in (([6, 2], "ascending"), ([1], "from 2 to 6"), ([], "at least one")):
        with pytest.raises(SettingsError, match=message):
            flag.compute_score(PLAIN, cutoff_layers=layers)


@pytest.mark.parametrize("name", NAMES)
def test_auto_finds_the_class(name, folders):
    flag_name = {
        "encoder": "encoder-only-base",
        "decoder": "decoder-only-base",
        "layerwise": "decoder-only-layerwise",
        "lightweight": "decoder-only-lightweight",
    }[FAMILIES[name]]
    for options in ({}, {"model_class": flag_name, "normalize": True}):
        flag = FlagAutoReranker.from_finetuned(folders(name), devices="cpu", **options)
        assert type(flag).__name__ == name
    assert 0.0 <= flag.compute_score(PLAIN[0])[0] <= 1.0


def test_copies_carry_settings_and_no_weights(folders):
    flag = ours("FlagLLMReranker", folders("FlagLLMReranker"), max_length=64, token=SECRET)
    wanted = flag.compute_score(PLAIN)
    dumped = pickle.dumps(flag)
    assert SECRET.encode() not in dumped
    assert len(dumped) < 10_000
    assert pickle.loads(dumped).compute_score(PLAIN) == near(wanted)  # noqa: S301
    assert copy.deepcopy(flag).reranker is flag.reranker
    flag.stop_self_pool()
    assert flag.compute_score(PLAIN) == near(wanted)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: FlagReranker("tiny", use_bf16=True),
            TypeError,
            r"FlagReranker\(\) .*'use_bf16'.* takes model_name",
        ),
        (lambda: FlagReranker("tiny", device="cpu"), TypeError, "did you mean 'devices'"),
        (lambda: FlagReranker("tiny", batch_size=0), SettingsError, "batch_size"),
        (lambda: FlagReranker("tiny", devices="gpu"), SettingsError, "device"),
        (lambda: FlagLLMReranker("tiny"), SettingsError, "FlagAutoReranker.from_finetuned"),
        (lambda: FlagLLMReranker("a", peft_path="b"), SettingsError, "peft_path='b'.*model_name"),
        (lambda: LayerWiseFlagLLMReranker("BAAI/bge-reranker-base"), SettingsError, "encoder"),
        (lambda: LightWeightFlagLLMReranker("tiny"), SettingsError, "encoder family"),
        (lambda: FlagReranker("tiny", query_instruction_format="{}"), SettingsError, "two fields"),
        (FlagAutoReranker, TypeError, "from_finetuned"),
        (
            lambda: FlagAutoReranker.from_finetuned("tiny", model_class="encoder"),
            SettingsError,
            "encoder-only-base",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"],), "tuple"),
        (([["a", 1]],), "str"),
        ((["a", "b", "c"],), "tuple"),
        (("ab",), "tuples"),
    ],
)
def test_bad_pairs_are_named(arguments, message):
    flag = FlagReranker("tiny", devices="cpu")
    with pytest.raises(TypeError, match=message):
        flag.compute_score(*arguments)


def test_lengths_without_room_are_refused():
    flag = FlagReranker("tiny", devices="cpu")
    with pytest.raises(SettingsError, match="no room"):
        flag.compute_score(PLAIN, max_length=16, query_max_length=16)
