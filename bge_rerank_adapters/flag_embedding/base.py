"""The base of FlagEmbedding's classes: the engine, and the settings of each call."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, TypedDict

from bge_rerank_adapters.calls.ranking import sigmoid
from bge_rerank_adapters.calls.requests import Request
from bge_rerank_adapters.engine.hosted.flag_arguments import (
    Devices,
    Instruction,
    check_batch_size,
    engine_devices,
)
from bge_rerank_adapters.engine.hosted.lazy import LazyEngine, UsesEngine
from bge_rerank_adapters.errors import SettingsError
from bge_rerank_adapters.settings import EngineSettings
from bge_rerank_adapters.settings.checkpoints import family_setting
from bge_rerank_adapters.settings.options import check_options

Pairs = Sequence[Sequence[str]]
"""Pairs of a query and a document, or a single one: a list of two texts."""
Scores = list[float]

_AUTO = "use FlagAutoReranker.from_finetuned(), which finds the class"


class FlagOptions(TypedDict, total=False):
    """The engine's settings that FlagEmbedding's constructors do not have."""

    revision: str | None
    local_files_only: bool
    token: str | None
    pack_tokens: int | str
    max_queued_pairs: int


class FlagBase(UsesEngine):
    """The base of FlagEmbedding's classes.

    As in FlagEmbedding, the attributes that a constructor sets may be assigned, for later calls. A
    pickle has the settings, but neither weights nor the token; the copy loads on first use.
    """

    family: ClassVar[str]
    # The instructions that the engine adds by default.
    instructions: ClassVar[tuple[str | None, str | None]] = ("A: ", "B: ")
    prompt: str | None = None

    def __init__(
        self,
        model_name_or_path: str,
        *,
        use_fp16: bool,
        query_instruction_for_rerank: str | None,
        query_instruction_format: str,
        passage_instruction_for_rerank: str | None,
        passage_instruction_format: str,
        cache_dir: str | None,
        devices: Devices,
        batch_size: int,
        query_max_length: int | None,
        max_length: int,
        normalize: bool,
        options: FlagOptions,
        use_bf16: bool = False,
        peft_path: str | None = None,
        prompt: str | None = None,
    ) -> None:
        check_options(type(self), options)
        check_batch_size(batch_size)
        _check_no_adapter(peft_path)
        self.model_name_or_path, self.use_fp16, self.prompt = model_name_or_path, use_fp16, prompt
        self.query_instruction_for_rerank = query_instruction_for_rerank
        self.query_instruction_format = query_instruction_format
        self.passage_instruction_for_rerank = passage_instruction_for_rerank
        self.passage_instruction_format = passage_instruction_format
        self.batch_size, self.normalize = batch_size, normalize
        self.query_max_length, self.max_length = query_max_length, max_length
        self._engine = LazyEngine(
            EngineSettings(
                model=model_name_or_path,
                family=family_setting(model_name_or_path, self.family, instead=_AUTO),
                dtype="auto" if use_fp16 or use_bf16 else "float32",
                device=engine_devices(devices),
                cache_dir=cache_dir,
                **self._text_settings(),
                **options,
            )
        )
        self.target_devices: list[str] = self.reranker.device.split(", ")

    def stop_self_pool(self) -> None:
        """Do what `close` does, under FlagEmbedding's name for it."""
        self.close()

    def _compute(
        self,
        pairs: Pairs,
        *,
        batch_size: int | None,
        normalize: bool | None,
        layers: tuple[int, ...] = (),
        **changes: Any,
    ) -> Any:
        """Return the scores of pairs; arguments that are `None` are taken from the attributes."""
        from bge_rerank_adapters.engine.models.call_settings import CallSettings

        check_batch_size(self.batch_size if batch_size is None else batch_size)
        query, passage = self._instructions()
        requests, engine = Request.checked_pairs(_pairs(pairs)), self.reranker
        rows = engine.pair_logits(
            [(query.apply(each.query), passage.apply(each.texts[0])) for each in requests],
            CallSettings(replace(engine.settings, **self._text_settings(**changes)), layers),
        )
        scores = [list(layer) for layer in zip(*rows, strict=True)]
        if self.normalize if normalize is None else normalize:
            scores = [list(map(sigmoid, layer)) for layer in scores]
        # Without pairs there are no layers either.
        return scores if len(scores) > 1 else [each for layer in scores for each in layer]

    def _text_settings(self, **changes: Any) -> dict[str, Any]:
        """Return the settings for reading texts; `changes` override attributes unless `None`."""
        query, passage = self._instructions()
        settings = {
            "max_length": self.max_length,
            "query_max_length": self.query_max_length,
            "query_instruction": query.setting,
            "passage_instruction": passage.setting,
            "prompt": self.prompt,
        }
        return settings | {name: value for name, value in changes.items() if value is not None}

    def _instructions(self) -> tuple[Instruction, Instruction]:
        of_query, of_passage = self.instructions
        return (
            Instruction(self.query_instruction_for_rerank, self.query_instruction_format, of_query),
            Instruction(
                self.passage_instruction_for_rerank, self.passage_instruction_format, of_passage
            ),
        )

    def __enter__(self) -> Self:
        """Return the reranker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def shared_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a constructor's arguments, its `locals()`, that `FlagBase` takes."""
    taken = inspect.signature(FlagBase.__init__).parameters.keys() - {"self"}
    return {name: value for name, value in given.items() if name in taken}


def _check_no_adapter(peft_path: object) -> None:
    if peft_path is not None:
        raise SettingsError(
            f"peft_path={peft_path!r} is not needed: give this folder as model_name_or_path; its "
            "adapter_config.json names the base that it is merged with."
        )


def _pairs(pairs: Any) -> Any:
    """Return a list of pairs, also for a single pair."""
    single = isinstance(pairs, list | tuple) and pairs and isinstance(pairs[0], str)
    return [pairs] if single else pairs
