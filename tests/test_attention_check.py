"""Devices on which torch's attention is wrong: found at load, mended or refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bge_rerank_adapters import DeviceError, Reranker
from bge_rerank_adapters.engine.models.encoder.plain import check_plain_attention
from bge_rerank_adapters.engine.models.layers import attention_check
from tests.family_checkpoints import build_family
from tests.texts import DOCUMENTS, QUERY

pytestmark = pytest.mark.timeout(120)

HONEST = functional.scaled_dot_product_attention


def wrong_unless_contiguous(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """Read the inputs as MPS did: as if they lay in one piece."""
    if all(states.is_contiguous() for states in (query, key, value)):
        return HONEST(query, key, value, **options)
    return HONEST(query, key, value.flip(-2), **options)


def always_wrong(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    return HONEST(query, key, value.flip(-2), **options)


def not_a_number(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    return HONEST(query, key, value, **options) * float("nan")


@pytest.fixture
def device(monkeypatch) -> Callable[..., None]:
    """Pretends that the CPU is another device, which computes attention so."""

    def pretend(attend: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(attention_check, "is_trusted", lambda _: False)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)

    return pretend


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def model(request, tmp_path_factory) -> str:
    if request.param == "encoder":
        return "tiny"
    return str(build_family(tmp_path_factory.mktemp("gemma"), "decoder"))


def logits(model: str) -> list[float]:
    with Reranker(model, device="cpu", dtype="float32") as reranker:
        return reranker.logits(QUERY, DOCUMENTS)


def test_inputs_are_copied_where_that_mends_it(device, model, caplog):
    right = logits(model)
    device(wrong_unless_contiguous)
    with caplog.at_level("WARNING", logger="bge_rerank_adapters"):
        assert logits(model) == pytest.approx(right, abs=1e-4)
    assert "unless its inputs are copied" in caplog.text


@pytest.mark.parametrize("attend", [always_wrong, not_a_number])
def test_a_device_that_is_wrong_in_any_case_is_refused(device, model, attend):
    device(attend)
    with pytest.raises(DeviceError, match=r"attention on device 'cpu' in torch.float32 is off by"):
        logits(model)


def test_a_right_device_is_taken_as_it_is(device, model, caplog):
    right = logits(model)
    device(HONEST)
    assert logits(model) == right
    assert "copied" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_libraries_ways_are_refused_where_they_are_wrong(device, dtype):
    cpu = torch.device("cpu")
    device(HONEST)
    check_plain_attention(cpu, dtype)
    device(wrong_unless_contiguous)
    with pytest.raises(DeviceError, match="rankings would be wrong"):
        check_plain_attention(cpu, dtype)
