"""Chooses the kit of an encoder: its layers, attention and number of streams."""

import logging

import torch

from bge_rerank_adapters.engine.models.cpu.amx.kit import AmxInt8Kit, AmxKit
from bge_rerank_adapters.engine.models.cpu.avx512_vnni import Avx512VnniInt8Kit
from bge_rerank_adapters.engine.models.cpu.onednn.kit import OneDnnInt8Kit, OneDnnKit
from bge_rerank_adapters.engine.models.devices import resolve_dtype
from bge_rerank_adapters.engine.models.encoder.config import EncoderConfig
from bge_rerank_adapters.engine.models.encoder.plain import KitRequest, PlainKit

_log = logging.getLogger(__name__)

# Fastest first: a model runs with the first kit that can run it. New back ends are added here.
KITS: tuple[type[PlainKit], ...] = (
    AmxInt8Kit,
    AmxKit,
    Avx512VnniInt8Kit,
    OneDnnInt8Kit,
    OneDnnKit,
    PlainKit,
)

_BASE = EncoderConfig(
    prefix="roberta",
    layers=12,
    hidden=768,
    heads=12,
    intermediate=3072,
    vocabulary=250_002,
    positions=514,
    types=1,
    epsilon=1e-5,
    activation="gelu",
    pad_id=1,
    counts_from_pad=True,
)


def choose_kit(config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> PlainKit:
    """Return the kit that a model runs with.

    Args:
        config: The model's config.
        device: The model's device.
        dtype: A floating-point dtype, or int8. With int8, activations have the fastest
            floating-point dtype, and so have the layers if no 8-bit kit is faster.
    """
    int8 = dtype == torch.int8
    compute = resolve_dtype("auto", device) if int8 else dtype
    request = KitRequest(config, device, compute)
    kit = _first_kit(request, int8=int8)
    if int8 and not kit.int8:
        _log.info("no 8-bit layers are faster here than %s in %s, which run", kit.label, compute)
    return kit(request)


def _first_kit(request: KitRequest, *, int8: bool) -> type[PlainKit]:
    return next(kit for kit in KITS if (int8 or not kit.int8) and kit.lack(request) is None)


def describe_kits(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Return which kits a model of bge-reranker-base's size would use.

    Args:
        device: The device.
        dtype: The dtype of activations.

    Returns:
        The label of each kit, and whether it is used or why not.
    """
    request = KitRequest(_BASE, device, dtype)
    used = {
        _first_kit(request, int8=True): "used with int8",
        _first_kit(request, int8=False): "used",
    }

    def verdict(kit: type[PlainKit]) -> str:
        if kit in used:
            return used[kit]
        lack = kit.lack(request)
        return "not used: another one is faster" if lack is None else f"not used: {lack}"

    return [(kit.label, verdict(kit)) for kit in KITS]
