"""Options, methods and dtypes of other libraries, and their names in this one."""

from collections.abc import Iterable
from difflib import get_close_matches

# From FlagEmbedding's FlagReranker, sentence-transformers' CrossEncoder, the rerankers of
# LangChain, LlamaIndex and Haystack, and clients of rerank servers.
_OPTIONS = {
    "top_k": ("top_n", "k"),
    "score_threshold": ("threshold", "min_score"),
    "timeout_s": ("timeout",),
    "documents": ("passages", "docs", "texts", "nodes"),
    "pairs": ("sentence_pairs", "sentences", "text_pairs"),
    "progress": ("show_progress_bar", "show_progress", "progress_bar"),
    "model": ("model_name", "model_name_or_path", "model_id"),
    "device": ("devices", "device_map", "target_devices"),
    "dtype": ("use_fp16", "use_bf16", "fp16", "bf16", "half", "torch_dtype", "model_kwargs"),
    "max_length": ("max_seq_length",),
    "query_max_length": ("max_query_length",),
    "cache_dir": ("cache_folder", "model_cache_dir"),
    "token": ("use_auth_token", "hf_token"),
    "query_instruction": ("query_instruction_for_rerank",),
    "passage_instruction": ("passage_instruction_for_rerank",),
    "max_document_tokens": ("max_tokens_per_doc",),
    "max_query_tokens": ("max_tokens_per_query",),
    "max_pair_tokens": ("truncate_prompt_tokens",),
}
_NAMES_HERE = {there: here for here, names in _OPTIONS.items() for there in names}
_SCORES = "score() gives numbers in [0, 1], and logits() the model's own"
_NOT_NEEDED = {
    **dict.fromkeys(("batch_size", "num_workers"), "packs are built by tokens, see pack_tokens"),
    **dict.fromkeys(("normalize", "activation_fn", "activation_fct", "apply_softmax"), _SCORES),
    **dict.fromkeys(("convert_to_numpy", "convert_to_tensor"), "results are plain floats"),
    "return_documents": "each result has its document",
    "keep_retrieval_score": "it is kept, as retrieval_score in the metadata",
    "trust_remote_code": "no code of a checkpoint is ever run",
}
_METHODS = {
    "predict": "score_pairs(pairs), or score(query, documents)",
    "compute_score": "score_pairs(pairs), or logits(query, documents) for the model's own numbers",
    "rank": "rerank(query, documents)",
    "arank": "arerank(query, documents)",
}
_DTYPES = {
    **dict.fromkeys(("fp16", "half", "f16"), "float16"),
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("fp32", "full", "float", "f32"), "float32"),
}


def advice_on_option(name: str, allowed: Iterable[str] = ()) -> str | None:
    """Return what an option of another library is called here, or why there is none.

    Args:
        name: The option there.
        allowed: The options of the function that was called; empty if unknown.

    Returns:
        A clause; `None` for an option that no such library has.
    """
    if name in _NOT_NEEDED:
        return f"it is not needed: {_NOT_NEEDED[name]}"
    here, names = _NAMES_HERE.get(name), list(allowed)
    if here is None:
        return None
    elsewhere = names and here not in names
    return f"here it is called {here}{', and is no option of this call' if elsewhere else ''}"


def unexpected_option(name: str, *, of: str, allowed: Iterable[str]) -> TypeError:
    """Return the error for an option that a function does not have.

    Args:
        name: The option.
        of: The function's name.
        allowed: The options that it has.
    """
    names = list(allowed)
    advice, close = advice_on_option(name, names), get_close_matches(name, names, n=1)
    if advice is not None:
        end = f"; {advice}."
    else:
        end = f"; did you mean {close[0]!r}?" if close else "."
    return TypeError(
        f"{of}() got an unexpected keyword argument {name!r}{end} It takes {', '.join(names)}."
    )


def no_attribute(name: str, *, of: str) -> str:
    """Return the message for an attribute that objects of a class do not have."""
    message = f"{of!r} object has no attribute {name!r}"
    return f"{message}; here it is {_METHODS[name]}" if name in _METHODS else message


def dtype_here(name: str) -> str | None:
    """Return this library's name of a dtype that others abbreviate; `None` if it is none."""
    return _DTYPES.get(name.lower())
