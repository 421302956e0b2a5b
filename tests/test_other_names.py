"""Names that people know from other libraries lead to those here."""

import copy
import pickle

import pytest
from pydantic import ValidationError

from bge_rerank_adapters import RemoteReranker, Reranker
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.langchain import BGEDocumentCompressor
from bge_rerank_adapters.llama_index import BGENodePostprocessor
from bge_rerank_adapters.milvus import BGERerankFunction


@pytest.fixture(scope="module", params=["here", "remote"])
def reranker(request):
    made = (
        Reranker("tiny", device="cpu") if request.param == "here" else RemoteReranker("http://x:1")
    )
    with made:
        yield made


@pytest.mark.parametrize(
    ("method", "here"),
    [
        ("predict", r"score_pairs\(pairs\)"),
        ("compute_score", r"score_pairs\(pairs\), or logits"),
        ("rank", r"rerank\(query, documents\)"),
        ("arank", r"arerank\(query, documents\)"),
    ],
)
def test_methods_of_others_are_not_there_and_say_what_is(reranker, method, here):
    assert not hasattr(reranker, method)
    assert getattr(reranker, method, None) is None
    with pytest.raises(AttributeError, match=f"no attribute '{method}'; here it is {here}") as info:
        getattr(reranker, method)
    assert (info.value.name, info.value.obj) == (method, reranker)


def test_other_missing_attributes_are_told_as_ever(reranker):
    kind = type(reranker).__name__
    with pytest.raises(AttributeError, match=f"^'{kind}' object has no attribute 'nothing'$"):
        reranker.nothing  # noqa: B018 - it is what is tested
    assert copy.copy(reranker) is reranker
    assert pickle.dumps(reranker)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("top_n", "; here it is called top_k. It takes query, documents, top_k"),
        ("batch_size", "; it is not needed: packs are built by tokens"),
        ("return_documents", "; it is not needed: each result has its document"),
        ("normalize", r"; it is not needed: score\(\) gives"),
        ("use_fp16", "; here it is called dtype, and is no option of this call"),
        ("top_q", "; did you mean 'top_k'?"),
        ("zzz", r"\. It takes"),
    ],
)
async def test_options_of_calls(reranker, option, message):
    given = {option: 1}
    with pytest.raises(TypeError, match=rf"^rerank\(\) got an unexpected .* '{option}'.*{message}"):
        reranker.rerank("q", ["a"], **given)
    with pytest.raises(TypeError, match=rf"^arerank\(\).*{message}"):
        await reranker.arerank("q", ["a"], **given)
    with pytest.raises(TypeError, match=rf"^rerank_many\(\).*'{option}'"):
        reranker.rerank_many([("q", ["a"])], **given)
    for call in (reranker.score, reranker.logits):
        with pytest.raises(TypeError, match=f"'{option}'"):
            call("q", ["a"], **given)


@pytest.mark.parametrize(
    ("option", "here"),
    [
        ("use_fp16", "here it is called dtype"),
        ("torch_dtype", "here it is called dtype"),
        ("devices", "here it is called device"),
        ("model_name_or_path", "here it is called model"),
        ("cache_folder", "here it is called cache_dir"),
        ("batch_size", "not needed: packs are built by tokens, see pack_tokens"),
        ("trust_remote_code", "no code of a checkpoint is ever run"),
    ],
)
def test_options_of_constructors(option, here):
    with pytest.raises(TypeError, match=rf"^Reranker\(\) got an unexpected .*'{option}'; .*{here}"):
        Reranker("tiny", **{option: True})
    for adapter in (BGEDocumentCompressor, BGENodePostprocessor):
        with pytest.raises(ValueError, match=f"'{option}'; .*{here}"):
            adapter(**{option: True})


@pytest.mark.parametrize("adapter", [BGEDocumentCompressor, BGENodePostprocessor])
def test_options_that_no_library_has_are_refused_with_those_there_are(adapter):
    named = rf"{adapter.__name__}\(\) got an unexpected .*'zzz'. It takes .*score_threshold, rer"
    with pytest.raises(ValidationError, match=named):
        adapter(zzz=1)
    with pytest.raises(ValidationError, match=r"'tok_k'; did you mean 'top_k'\?"):
        adapter(tok_k=1)


@pytest.mark.parametrize(
    ("there", "here"),
    [("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("FP32", "float32")],
)
def test_dtypes(there, here):
    message = f"dtype '{there}' is called '{here}' here; use one of auto, float32"
    for make in (Reranker, BGERerankFunction):
        with pytest.raises(SettingsError, match=message):
            make("tiny", dtype=there)
    with pytest.raises(ValueError, match=message):
        BGEDocumentCompressor(dtype=there)
