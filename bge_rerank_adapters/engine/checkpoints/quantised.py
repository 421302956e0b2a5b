"""Tells quantised weights, which cannot be run as they are, from plain ones."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bge_rerank_adapters.errors import UnsupportedCheckpointError

# As safetensors names them. Whole numbers of 64 bits and booleans are positions and masks that
# some checkpoints store; a model that asks for one as a weight is refused where it reads it.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL", "C64")
# Buffers that old releases of transformers stored in dtypes of their own.
_BUFFERS = ("position_ids", "token_type_ids", "masked_bias", "attn.bias", "attention.bias")
# What stands beside quantised weights: compressed-tensors and DeepSeek `weight_scale(_inv)`,
# bitsandbytes `SCB`, `absmax` and `quant_state`, GPTQ and AWQ `scales`, `qzeros` and `g_idx`,
# torchao and quanto `weight._scale`, HQQ `zero`, ModelOpt `input_amax`.
_COMPANION = re.compile(r"scale|absmax|amax$|^SCB$|zero|quant|g_idx|codebook", re.ASCII)
_WEIGHTS = ("weight", "qweight", "weight_packed", "W_q")
_CONFIG_ENTRIES = ("quantization_config", "compression_config")
_WAY_OUT = (
    "read as plain numbers they would rank wrongly, so they are not run; use the checkpoint that "
    "was quantised, with weights in float32, float16 or bfloat16 "
    '(on a processor dtype="int8" quantises that at load)'
)


def check_config_plain(config: Mapping[str, Any], path: Path) -> None:
    """Check that a `config.json` tells of no quantisation.

    Args:
        config: Its content.
        path: Its path, for the error.

    Raises:
        UnsupportedCheckpointError: It does; the message names the method.
    """
    for entry in _CONFIG_ENTRIES:
        found = config.get(entry)
        if not found:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UnsupportedCheckpointError(
            f"{path} has a {entry} of the method {method!r}, so the weights are quantised; "
            f"{_WAY_OUT}."
        )


def check_tensors_plain(dtypes: Mapping[str, str], path: Path) -> None:
    """Check that no tensor is quantised, whatever the config says.

    Args:
        dtypes: By each tensor's name the dtype in which it is stored, as safetensors names it.
        path: The file, for the error.

    Raises:
        UnsupportedCheckpointError: One is; the message names it.
    """
    for name, dtype in dtypes.items():
        if dtype not in _PLAIN_DTYPES and not name.endswith(_BUFFERS):
            raise UnsupportedCheckpointError(
                f"{path}: the tensor {name} is stored in {_dtype_name(dtype)}, which is no plain "
                f"floating-point dtype, so the weights are quantised; {_WAY_OUT}."
            )
        if _stands_beside_weight(name, dtypes):
            raise UnsupportedCheckpointError(
                f"{path}: the tensor {name} stands beside a weight, as scales of quantised "
                f"weights do; {_WAY_OUT}."
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
