"""A setting of torch's that makes float32 products less exact: told, and never changed."""

import logging

import torch

_log = logging.getLogger(__name__)


def warn_of_matmul_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Log a warning where float32 products are run in fewer bits, as the program has asked.

    Args:
        device: Where a model is loaded.
        dtype: Of its activations.
    """
    precision = _matmul_precision()
    # A CPU computes with "high" as with "highest".
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
        # Where the program has used torch's newer settings, one for each back end, as well.
        return "mixed"
