"""A cross-encoder on OpenVINO itself, batched and streamed as its performance guide advises."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bge_rerank_adapters.engine.models.devices import resolve_dtype

_CALIBRATION_TEXTS = 64


class OpenVinoReranker:
    """Converts a checkpoint once, keeps the result beside it, and runs it."""

    def __init__(self, folder: Path, *, precision: str, batch: int, streams: int) -> None:
        """Convert or read the model and compile it.

        Args:
            folder: The checkpoint.
            precision: `"f32"`, `"bf16"` or `"int8"` (nncf, transformer preset; the rest of the
                arithmetic in bf16 where the processor has it).
            batch: Pairs of a padded batch.
            streams: Batches that run at once.
        """
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._batch = batch
        core = ov.Core()
        path = folder / f"openvino-{'int8' if precision == 'int8' else 'f32'}.xml"
        if not path.is_file():
            ov.save_model(self._convert(folder, precision), path, compress_to_fp16=False)
        # Where ONEDNN_MAX_CPU_ISA leaves bfloat16 out, OpenVINO lists it still, and emulates it.
        has_bf16 = (
            "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            and resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
        )
        if precision == "bf16" and not has_bf16:
            raise RuntimeError("OpenVINO has no BF16 on this processor, or is not to use it")
        settings: dict[str, Any] = {
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": "bf16" if has_bf16 and precision != "f32" else "f32",
        }
        self._queue = ov.AsyncInferQueue(core.compile_model(path, "CPU", settings), streams)

    def score(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the documents' logits in input order."""
        encoded = self._tokenizer(
            [query] * len(documents), list(documents), truncation="only_second", max_length=512
        )
        ids = encoded["input_ids"]
        logits = np.zeros(len(ids))

        def store(request: Any, places: list[int]) -> None:
            logits[places] = request.get_output_tensor().data[:, 0]

        self._queue.set_callback(store)
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            padded = self._tokenizer.pad(
                {"input_ids": [ids[place] for place in places]}, return_tensors="np"
            )
            self._queue.start_async(dict(padded), places)
        self._queue.wait_all()
        return [float(each) for each in logits]

    def _convert(self, folder: Path, precision: str) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        model.config.return_dict = False
        example = dict(self._tokenizer(["a b"] * 2, ["c d e"] * 2, return_tensors="pt"))
        example = {name: example[name] for name in ("input_ids", "attention_mask")}
        converted = ov.convert_model(model, example_input=example)
        if precision != "int8":
            return converted
        import nncf

        texts = [f"passage number {place} " * (place + 1) for place in range(_CALIBRATION_TEXTS)]
        samples = [
            {name: rows[name] for name in example}
            for text in texts
            for rows in [
                self._tokenizer(["a query"], [text], return_tensors="np", truncation="only_second")
            ]
        ]
        return nncf.quantize(
            converted,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )
