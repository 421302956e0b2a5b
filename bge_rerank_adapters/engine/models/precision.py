"""Warns of a setting of torch that makes float32 products less exact, and never changes it."""

import logging

import torch

_log = logging.getLogger(__name__)


def warn_of_matmul_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Log a warning if the program has set torch to run float32 products with fewer bits.

    Args:
        device: The model's device.
        dtype: The dtype of its activations.
    """
    precision = _matmul_precision()
    # On a CPU "high" is the same as "highest".
    exact = ("highest", "high") if device.type == "cpu" else ("highest",)
    if dtype == torch.float32 and precision not in exact:
        _log.warning(
            "torch.set_float32_matmul_precision(%r) is set, so float32 logits on %s may be off by "
            'some hundredths; set "highest" for exact ones.',
            precision,
            device,
        )


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # The program has also used torch's newer settings, one for each back end.
        return "mixed"
