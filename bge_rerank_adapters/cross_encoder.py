"""sentence-transformers' `CrossEncoder` by one import, for scoring and ranking with BGE rerankers.

```python
from bge_rerank_adapters.cross_encoder import CrossEncoder  # instead of: sentence_transformers

model = CrossEncoder("BAAI/bge-reranker-v2-m3")
scores = model.predict([("Who wrote Faust?", "Goethe did."), ("Who wrote Faust?", "It rains.")])
ranked = model.rank("Who wrote Faust?", ["It rains.", "Goethe did."], return_documents=True)
```

Constructor, `predict`, `rank` and what they return follow sentence-transformers 6.2, which need not
be installed. Different are:

- The dtype is the fastest that the device runs; `model_kwargs={"dtype": "float32"}` is obeyed.
- Of a pair that is too long the end of the document is cut, not that of the longer text.
- `trust_remote_code=True` runs no code of a checkpoint.
- Causal models, which are scored by yes minus no there, several labels and training are refused.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bge_rerank_adapters.calls.limits import check_top_k
from bge_rerank_adapters.calls.progress import ProgressBar
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.engine.hosted.flag_arguments import check_batch_size
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine
from bge_rerank_adapters.errors import InputTypeError, SettingsError
from bge_rerank_adapters.settings import EngineSettings, checks
from bge_rerank_adapters.settings.checkpoints import family_setting

_THERE = "use sentence_transformers' own CrossEncoder for that"
# By its names of old releases, which it still takes.
_OLD_NAMES = {
    "model_name": "model_name_or_path",
    "automodel_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "tokenizer_kwargs": "processor_kwargs",
    "config_args": "config_kwargs",
    "cache_dir": "cache_folder",
    "default_activation_function": "activation_fn",
    "sentences": "inputs",
    "activation_fct": "activation_fn",
}
# Methods and attributes of training, saving, moving, and of the torch module itself.
_ELSEWHERE = frozenset(
    (
        *("fit", "old_fit", "train", "half", "compile", "merge", "evaluate", "forward"),
        *("save", "save_pretrained", "save_to_hub", "push_to_hub", "to", "cpu", "cuda"),
        *("start_multi_process_pool", "stop_multi_process_pool", "smart_batching_collate"),
        *("model", "transformers_model", "tokenizer", "config", "parameters"),
    )
)
# How many pairs a progress bar advances by.
_BAR_PAIRS = 256


class CrossEncoder:
    """Scores pairs of texts with a cross-encoder of one label.

    Pickling carries the settings, never weights or the token; the copy loads on first use.

    Attributes:
        prompts: By their names; those of the checkpoint's author among them.
        default_prompt_name: Which one stands before each query where a call names none.
        activation_fn: Makes scores of logits; may be assigned.
        max_seq_length: Most tokens of a pair; may be assigned.
        num_labels: 1.
    """

    num_labels = 1
    _max_seq_length: int

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        modules: Any = None,
        device: Any = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        cache_folder: str | None = None,
        trust_remote_code: bool = False,  # noqa: ARG002 - accepted, see the module
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        model_card_data: Any = None,
        backend: str = "torch",
        num_labels: int | None = None,
        max_length: int | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        keep_in_fp32_modules: Sequence[str] | None = None,
        **unknown: Any,
    ) -> None:
        """Load the model, or share the one that is loaded with equal settings.

        Args:
            model_name_or_path: A folder, a name on the hub, or `"tiny"` for the bundled checkpoint.
            modules: Must be `None`, like model_card_data and keep_in_fp32_modules.
            device: One device; `None` chooses one.
            prompts: Added to those of the checkpoint.
            default_prompt_name: The prompt of calls that name none; `None` is the checkpoint's.
            cache_folder: Of the hub's cache; `None` is `SENTENCE_TRANSFORMERS_HOME`, or the hub
                library's own.
            trust_remote_code: No code of a checkpoint is run, whatever this says.
            revision: Branch, tag or commit on the hub.
            local_files_only: Never ask the hub.
            token: Secret for private checkpoints; `True` is the one that the hub library knows.
            model_kwargs: `dtype` (or `torch_dtype`) is obeyed; `device_map` may name one device;
                `attn_implementation` is not needed.
            processor_kwargs: `model_max_length` is obeyed.
            config_kwargs: `num_labels` may be 1.
            model_card_data: See `modules`.
            backend: `"torch"`.
            num_labels: 1 or `None`.
            max_length: Most tokens of a pair; `None` is what the tokenizer allows, and never more
                than the model's positions.
            activation_fn: Makes scores of logits; `None` is the checkpoint's, or the sigmoid.
            keep_in_fp32_modules: See `modules`.
            **unknown: None.

        Raises:
            TypeError: There is no argument of that name.
            SettingsError: An argument has a value that is not allowed, or not done here.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device is not there.
        """
        _refuse_unknown("CrossEncoder", unknown)
        _refuse_given(
            modules=modules,
            model_card_data=model_card_data,
            keep_in_fp32_modules=keep_in_fp32_modules or None,
            backend=None if backend == "torch" else backend,
        )
        if model_name_or_path is None:
            raise SettingsError("model_name_or_path must name a checkpoint, got None.")
        config = _only(config_kwargs, "config_kwargs", "num_labels", "classifier_dropout")
        for labels in (num_labels, config.get("num_labels")):
            if labels not in (None, 1):
                raise SettingsError(f"num_labels must be 1, got {labels!r}; {_THERE}.")
        processor = _only(processor_kwargs, "processor_kwargs", "model_max_length")
        loading = _only(
            model_kwargs,
            "model_kwargs",
            "dtype",
            "torch_dtype",
            "device_map",
            "attn_implementation",
        )
        self._engine = LazyEngine(
            EngineSettings(
                model=model_name_or_path,
                family=family_setting(
                    model_name_or_path,
                    "encoder",
                    instead="CrossEncoder scores such models by yes minus no, which is not done "
                    "here; use Reranker",
                ),
                device=_device(loading.get("device_map") or device),
                dtype=loading.get("dtype") or loading.get("torch_dtype") or "auto",
                revision=revision,
                cache_dir=cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME") or None,
                local_files_only=local_files_only,
                token=_token(token),
            )
        )
        self._read_author(prompts, default_prompt_name, activation_fn)
        given = processor.get("model_max_length") if max_length is None else max_length
        self.max_seq_length = self.reranker.readings.longest if given is None else given

    def _read_author(
        self,
        prompts: Mapping[str, str] | None,
        default_prompt_name: str | None,
        activation_fn: Callable[[Any], Any] | None,
    ) -> None:
        from bge_rerank_adapters.engine.models.tensors import named_activation

        author = self.reranker.readings.author
        self.prompts: dict[str, str] = author.prompts | dict(prompts or {})
        self.default_prompt_name = default_prompt_name or author.default_prompt_name
        self.activation_fn = activation_fn or named_activation(author.activation)
        self._prompt(None, None)

    @property
    def reranker(self) -> Any:
        """The engine that scores, shared by all with equal settings, and loaded again if need be.

        Raises:
            RerankError: The model cannot be loaded.
        """
        return self._engine.get()

    @property
    def device(self) -> str:
        """Where the model runs."""
        return str(self.reranker.device)

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a pair."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self._max_seq_length = checks.count("max_seq_length", value)

    # Its name of old releases.
    max_length = max_seq_length

    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        apply_softmax: bool | None = False,  # noqa: ARG002 - of several labels
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,  # noqa: ARG002 - of a pool
        **unknown: Any,
    ) -> Any:
        """Return the scores of pairs, in input order.

        Args:
            inputs: (query, document) pairs, or a single one; may be empty.
            prompt_name: Which of `prompts` stands before each query.
            prompt: Stands there instead; `""` is none.
            batch_size: Accepted and not needed: packs are built by tokens.
            show_progress_bar: Whether to show a bar on standard error; needs rich.
            activation_fn: For this call; `None` is as constructed.
            apply_softmax: Without effect, since there is one label.
            convert_to_numpy: Whether the result is a numpy array.
            convert_to_tensor: Whether it is a tensor, whatever `convert_to_numpy` says.
            device: Must be the one of the model.
            pool: Must be `None`.
            chunk_size: Not needed.
            **unknown: None.

        Returns:
            A float32 array of shape (n,), a tensor, or a list of tensors; of a single pair one
            score of that kind.

        Raises:
            InputTypeError: A pair is not two `str`; the message names which.
            SettingsError: An argument has a value that is not allowed.
            RerankError: The model failed.
        """
        _refuse_unknown("predict", unknown)
        self._check_call(batch_size=batch_size, device=device, pool=pool)
        single = _is_single(inputs)
        pairs = _pairs([inputs] if single else inputs)
        logits = self._logits(
            pairs, prompt=self._prompt(prompt_name, prompt), shown=bool(show_progress_bar)
        )
        scores = self._scores(logits, activation_fn)
        if not convert_to_tensor:
            scores = _as_numpy(scores, len(pairs)) if convert_to_numpy else list(scores)
        return scores[0] if single else scores

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,  # noqa: ARG002 - of a pool
        **unknown: Any,
    ) -> list[dict[str, Any]]:
        """Return the documents best first, as `{"corpus_id": int, "score": float}`.

        Documents with equal scores keep the order of their logits, and then that of the input.

        Args:
            query: The question.
            documents: n texts; may be empty.
            top_k: Most results; `None` is all.
            return_documents: Whether each result has its document as `"text"`.
            prompt_name: As of `predict`, like all that follow.
            prompt: Put before the query.
            batch_size: Not needed.
            show_progress_bar: Whether to show a bar.
            activation_fn: For this call.
            device: Must be the one of the model.
            pool: Must be `None`.
            chunk_size: Not needed.
            **unknown: None.

        Raises:
            InputTypeError: The query or a document is not a `str`.
            SettingsError: An argument has a value that is not allowed.
            RerankError: The model failed.
        """
        _refuse_unknown("rank", unknown)
        self._check_call(batch_size=batch_size, device=device, pool=pool)
        most, request = check_top_k(top_k), Request.checked(query, documents)
        logits = self._logits(
            [(request.query, text) for text in request.texts],
            prompt=self._prompt(prompt_name, prompt),
            shown=bool(show_progress_bar),
        )
        scores = self._scores(logits, activation_fn).tolist()
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], -logits[place]))
        results = [{"corpus_id": place, "score": scores[place]} for place in order[:most]]
        if return_documents:
            for result in results:
                result["text"] = documents[result["corpus_id"]]
        return results

    def close(self) -> None:
        """Let go of the shared engine, freed with its last user; a later use loads again."""
        self._engine.close()

    def _logits(self, pairs: list[tuple[str, str]], *, prompt: str, shown: bool) -> list[float]:
        engine = self.reranker
        reading = engine.readings.of_whole_pairs(max_length=self.max_seq_length, prompt=prompt)
        size = _BAR_PAIRS if shown else max(1, len(pairs))
        logits: list[float] = []
        with ProgressBar(pairs, shown=shown) as bar:
            for start in range(0, len(pairs), size):
                rows = engine.pair_logits(pairs[start : start + size], reading)
                logits.extend(row[0] for row in rows)
                bar.advance(len(rows))
        return logits

    def _scores(self, logits: list[float], activation_fn: Callable[[Any], Any] | None) -> Any:
        from bge_rerank_adapters.engine.models.tensors import activated

        return activated(logits, activation_fn or self.activation_fn)

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        """Return what stands before each query."""
        if prompt is not None:
            return prompt
        chosen = self.default_prompt_name if name is None else name
        if chosen is None:
            return ""
        if chosen not in self.prompts:
            raise SettingsError(
                f"The prompt name {chosen!r} is none of the prompts "
                f"({', '.join(map(repr, self.prompts)) or 'there are none'}); name one of them, or "
                "give prompt=."
            )
        return self.prompts[chosen]

    def _check_call(self, *, batch_size: object, device: object, pool: object) -> None:
        check_batch_size(batch_size)
        if pool is not None:
            raise SettingsError(f"pool is not done here, got {type(pool).__name__}; {_THERE}.")
        if device is not None and str(device) != self.device:
            raise SettingsError(
                f"device {device!r} of a call is not the model's, {self.device!r}; make a "
                "CrossEncoder for each device."
            )

    def __getattr__(self, name: str) -> Any:
        """Say of methods of sentence-transformers' class where they are.

        Raises:
            AttributeError: Always.
        """
        if name in _ELSEWHERE:
            raise AttributeError(
                f"CrossEncoder.{name} is not here, where models score alone; {_THERE}."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _is_single(inputs: Any) -> bool:
    """Return whether inputs are one pair, by sentence-transformers' rule."""
    if isinstance(inputs, list | tuple):
        first = inputs[0] if inputs else ()
        return not isinstance(first, list | tuple) and getattr(first, "shape", ()) == ()
    return getattr(inputs, "ndim", None) == 1 and len(inputs) > 0


def _pairs(inputs: Any) -> list[tuple[str, str]]:
    if hasattr(inputs, "tolist"):
        inputs = inputs.tolist()
    if not isinstance(inputs, str | bytes) and isinstance(inputs, Iterable):
        inputs = [each.tolist() if hasattr(each, "tolist") else each for each in inputs]
    try:
        return [(request.query, request.texts[0]) for request in Request.checked_pairs(inputs)]
    except InputTypeError as error:
        raise InputTypeError(str(error).replace("pairs", "inputs")) from None


def _as_numpy(scores: Any, pairs: int) -> Any:
    import numpy as np

    return scores.numpy() if pairs else np.array([])


def _device(device: Any) -> str:
    if isinstance(device, Mapping | list | tuple):
        raise SettingsError(
            f"device must name one device, got {device!r}; use Reranker, which takes a list."
        )
    return "auto" if device is None else str(device)


def _token(token: bool | str | None) -> str | None:
    if token is False:
        raise SettingsError("token must be a str, True or None, got False; leave it out.")
    return None if token is True else token


def _only(given: Mapping[str, Any] | None, name: str, *allowed: str) -> Mapping[str, Any]:
    entries = given or {}
    for key in entries:
        if key not in allowed:
            raise SettingsError(
                f"{name} takes {', '.join(allowed)} here, got {key!r}; leave it out, or {_THERE}."
            )
    return entries


def _refuse_given(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise SettingsError(f"{name} is not done here, got {value!r}; {_THERE}.")


def _refuse_unknown(function: str, arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        now = _OLD_NAMES.get(name)
        action = f"it is called {now!r} now" if now else f"leave it out, or {_THERE}"
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {action}.")
