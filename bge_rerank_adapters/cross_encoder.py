"""sentence-transformers' `CrossEncoder` by one import, for scoring and ranking with BGE rerankers.

```python
from bge_rerank_adapters.cross_encoder import CrossEncoder  # instead of: sentence_transformers

model = CrossEncoder("BAAI/bge-reranker-v2-m3")
scores = model.predict([("Who wrote Faust?", "Goethe did."), ("Who wrote Faust?", "It rains.")])
ranked = model.rank("Who wrote Faust?", ["It rains.", "Goethe did."], return_documents=True)
```

Constructor, `predict`, `rank` and their results follow sentence-transformers 6.2, which need not be
installed. There are these differences:

- The dtype is the fastest that the device runs, unless `model_kwargs={"dtype": ...}` sets another.
- A pair that is too long loses the end of the document, not of the longer text.
- `trust_remote_code=True` runs no code of a checkpoint.
- Causal models (scored by yes minus no there), several labels and training are not supported.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bge_rerank_adapters.calls.limits import check_top_k
from bge_rerank_adapters.calls.progress import ProgressBar
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.engine.hosted import cross_encoder_arguments as arguments
from bge_rerank_adapters.engine.hosted.flag_arguments import check_batch_size
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine, UsesEngine
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import checks

# How many pairs a progress bar advances by.
_BAR_PAIRS = 256


class CrossEncoder(UsesEngine):
    """Scores pairs of texts with a cross-encoder of one label.

    A pickle has the settings, but neither weights nor the token; the copy loads on first use.

    Attributes:
        prompts: All prompts by name, including those of the checkpoint's author.
        default_prompt_name: The prompt before each query, unless a call names another.
        activation_fn: Turns logits into scores; may be assigned.
        max_seq_length: Maximum tokens of a pair; may be assigned.
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

        The arguments are those of sentence-transformers, with these differences:

        - `model_name_or_path` may also be `"tiny"`, for the bundled checkpoint.
        - `device`, or `device_map` in `model_kwargs`, is one device; `None` chooses one.
        - `model_kwargs` may have `dtype` (or `torch_dtype`), and `attn_implementation`, which is
          ignored; `processor_kwargs` may have `model_max_length`, `config_kwargs` `num_labels`.
        - `cache_folder=None` is `SENTENCE_TRANSFORMERS_HOME`, or the hub library's own.
        - `max_length` is the maximum tokens of a pair, clamped to the model's positions; `None` is
          the tokenizer's limit.
        - `activation_fn=None` is the checkpoint's, or the sigmoid.
        - `num_labels` must be 1 or `None`, and `backend` `"torch"`; `modules`, `model_card_data`
          and `keep_in_fp32_modules` must be `None`.

        Raises:
            TypeError: There is no argument of that name.
            SettingsError: An argument has a value that is not allowed, or not supported.
            CheckpointError: The checkpoint cannot be found or used.
            DeviceError: The device does not exist.
        """
        arguments.refuse_unknown("CrossEncoder", unknown)
        arguments.refuse_given(
            modules=modules,
            model_card_data=model_card_data,
            keep_in_fp32_modules=keep_in_fp32_modules or None,
            backend=None if backend == "torch" else backend,
        )
        processor = arguments.only(processor_kwargs, "processor_kwargs", "model_max_length")
        arguments.check_labels(num_labels, config_kwargs)
        self._engine = LazyEngine(
            arguments.encoder_settings(
                model_name_or_path,
                device=device,
                model_kwargs=model_kwargs,
                revision=revision,
                cache_folder=cache_folder,
                local_files_only=local_files_only,
                token=token,
            )
        )
        from bge_rerank_adapters.engine.models.tensors import named_activation

        author = self.reranker.call_tokenizers.author
        self.prompts: dict[str, str] = author.prompts | dict(prompts or {})
        self.default_prompt_name = default_prompt_name or author.default_prompt_name
        self._prompt(None, None)
        self.activation_fn = activation_fn or named_activation(author.activation)
        given = processor.get("model_max_length") if max_length is None else max_length
        self.max_seq_length = self.reranker.call_tokenizers.longest if given is None else given

    @property
    def device(self) -> str:
        """The model's device."""
        return str(self.reranker.device)

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens of a pair."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self._max_seq_length = checks.count("max_seq_length", value)

    # The name in old releases.
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
            prompt_name: Which of `prompts` is put before each query.
            prompt: A text to put there instead; may be empty.
            batch_size: Not needed: packs are built by tokens.
            show_progress_bar: Whether to show a bar on standard error; needs rich.
            activation_fn: For this call; `None` is as constructed.
            apply_softmax: No effect, since there is one label.
            convert_to_numpy: Whether the result is a numpy array.
            convert_to_tensor: Whether it is a tensor; overrides `convert_to_numpy`.
            device: Must be the model's.
            pool: Must be `None`.
            chunk_size: Not needed.
            **unknown: Refused.

        Returns:
            A float32 array of shape (n,), a tensor, or a list of tensors; for a single pair one
            score of that type.

        Raises:
            InputTypeError: A pair is not two `str`; the message names which.
            SettingsError: An argument has a value that is not allowed.
            RerankError: The model failed.
        """
        arguments.refuse_unknown("predict", unknown)
        self._check_call(batch_size=batch_size, device=device, pool=pool)
        single = arguments.is_single(inputs)
        texts = arguments.pairs([inputs] if single else inputs)
        logits = self._logits(
            texts, prompt=self._prompt(prompt_name, prompt), shown=bool(show_progress_bar)
        )
        scores = self._scores(logits, activation_fn)
        if not convert_to_tensor:
            scores = arguments.as_numpy(scores, len(texts)) if convert_to_numpy else list(scores)
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
        `documents` are n texts and may be empty. `return_documents` adds each as `"text"`, and
        `top_k` is the maximum number of results; `None` is all. Other arguments as for `predict`.

        Raises:
            InputTypeError: The query or a document is not a `str`.
            SettingsError: An argument has a value that is not allowed.
            RerankError: The model failed.
        """
        arguments.refuse_unknown("rank", unknown)
        self._check_call(batch_size=batch_size, device=device, pool=pool)
        top_k, request = check_top_k(top_k), Request.checked(query, documents)
        logits = self._logits(
            [(request.query, text) for text in request.texts],
            prompt=self._prompt(prompt_name, prompt),
            shown=bool(show_progress_bar),
        )
        scores = self._scores(logits, activation_fn).tolist()
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], -logits[place]))
        results = [{"corpus_id": place, "score": scores[place]} for place in order[:top_k]]
        if return_documents:
            for result in results:
                result["text"] = documents[result["corpus_id"]]
        return results

    def _logits(self, pairs: list[tuple[str, str]], *, prompt: str, shown: bool) -> list[float]:
        engine = self.reranker
        call = engine.call_tokenizers.of_whole_pairs(max_length=self.max_seq_length, prompt=prompt)
        size = _BAR_PAIRS if shown else max(1, len(pairs))
        logits: list[float] = []
        with ProgressBar(pairs, shown=shown) as bar:
            for start in range(0, len(pairs), size):
                rows = engine.pair_logits(pairs[start : start + size], call)
                logits.extend(row[0] for row in rows)
                bar.advance(len(rows))
        return logits

    def _scores(self, logits: list[float], activation_fn: Callable[[Any], Any] | None) -> Any:
        from bge_rerank_adapters.engine.models.tensors import activated

        return activated(logits, activation_fn or self.activation_fn)

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        """Return the prompt of a call."""
        if prompt is not None:
            return prompt
        return arguments.choose_prompt(
            self.prompts, self.default_prompt_name if name is None else name
        )

    def _check_call(self, *, batch_size: object, device: object, pool: object) -> None:
        check_batch_size(batch_size)
        if pool is not None:
            raise SettingsError(
                f"pool is not supported here, got {type(pool).__name__}; {arguments.USE_THEIRS}."
            )
        if device is not None and str(device) != self.device:
            raise SettingsError(
                f"device {device!r} of a call is not the model's, {self.device!r}; make a "
                "CrossEncoder for each device."
            )

    def __getattr__(self, name: str) -> Any:
        """Refuse methods that only sentence-transformers' own class has."""
        if name in arguments.UNSUPPORTED_NAMES:
            raise AttributeError(
                f"CrossEncoder.{name} is not supported: models only score here; "
                f"{arguments.USE_THEIRS}."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
