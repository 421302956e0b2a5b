"""Detects quantised weights, which are not supported."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import UnsupportedCheckpointError

# As safetensors names them. I64 and BOOL are for positions and masks, which some checkpoints store;
# reading one of these as a weight is an error elsewhere.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL", "C64")
# Buffers that old releases of transformers stored in other dtypes.
_BUFFERS = ("position_ids", "token_type_ids", "masked_bias", "attn.bias", "attention.bias")
# Tensors that accompany quantised weights: compressed-tensors and DeepSeek `weight_scale(_inv)`,
# bitsandbytes `SCB`, `absmax` and `quant_state`, GPTQ and AWQ `scales`, `qzeros` and `g_idx`,
# torchao and quanto `weight._scale`, HQQ `zero`, ModelOpt `input_amax`.
_COMPANION = re.compile(r"scale|absmax|amax$|^SCB$|zero|quant|g_idx|codebook", re.ASCII)
_WEIGHTS = ("weight", "qweight", "weight_packed", "W_q")
_CONFIG_ENTRIES = ("quantization_config", "compression_config")
_ADVICE = (
    "read as plain numbers they would rank wrongly, so they are not run; use the checkpoint that "
    "was quantised, with weights in float32, float16 or bfloat16 "
    '(on a CPU dtype="int8" quantises that at load)'
)


def check_config_plain(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a `config.json` that declares quantisation.

    Args:
        config: Its content.
        path: Its path, for the error.

    Raises:
        UnsupportedCheckpointError: It does so; the message names the method.
    """
    for entry in _CONFIG_ENTRIES:
        found = config.get(entry)
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UnsupportedCheckpointError(
            f"{path} has a {entry} of the method {method!r}, so the weights are quantised; "
            f"{_ADVICE}."
        )


def check_tensors_plain(dtypes: Mapping[str, str], path: Path) -> None:
    """Refuse quantised tensors, whatever the config declares.

    Args:
        dtypes: The stored dtype of each tensor by name, as safetensors names it.
        path: The file, for the error.

    Raises:
        UnsupportedCheckpointError: There is one; the message names it.
    """
    for name, dtype in dtypes.items():
        if dtype not in _PLAIN_DTYPES and not name.endswith(_BUFFERS):
            raise UnsupportedCheckpointError(
                f"{path}: the tensor {name} is stored in {_dtype_name(dtype)}, which is not a "
                f"floating-point dtype, so the weights are quantised; {_ADVICE}."
            )
        if _stands_beside_weight(name, dtypes):
            raise UnsupportedCheckpointError(
                f"{path}: the tensor {name} stands beside a weight, as scales of quantised "
                f"weights do; {_ADVICE}."
            )


def _stands_beside_weight(name: str, names: Mapping[str, str]) -> bool:
    module, _, last = name.rpartition(".")
    if not module or not _COMPANION.search(last):
        return False
    return module.endswith("weight") or any(f"{module}.{each}" in names for each in _WEIGHTS)


def _dtype_name(dtype: str) -> str:
    """Return the usual name of a dtype of safetensors, such as `int8` for `I8`."""
    kinds = {"I": "int", "U": "uint", "F": "float"}
    return kinds.get(dtype[:1], dtype[:1]) + dtype[1:].lower()
