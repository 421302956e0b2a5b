"""ONNX files of a checkpoint, for the peers that read those, made as sentence-transformers says."""

from pathlib import Path

from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

_WHOLE = "model.onnx"


def exported(folder: Path) -> Path:
    """Return the folder in the checkpoint's whose `onnx` has `model.onnx`, made if need be."""
    made = folder / "for-onnx"
    if not (made / "onnx" / _WHOLE).is_file():
        CrossEncoder(str(folder), backend="onnx", device="cpu").save_pretrained(str(made))
    return made


def quantised(folder: Path) -> tuple[Path, str]:
    """Return that folder and the name of its file in 8-bit integers, scaled as it runs.

    The kind is that of processors that add 8-bit products in one step, where this is one.
    """
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8").split() if info.is_file() else []
    kind = "avx512_vnni" if "avx512_vnni" in flags else "avx2"
    made, name = exported(folder), f"model_{kind}.onnx"
    if not (made / "onnx" / name).is_file():
        whole = CrossEncoder(
            str(made), backend="onnx", device="cpu", model_kwargs={"file_name": _WHOLE}
        )
        export_dynamic_quantized_onnx_model(whole, kind, str(made), file_suffix=kind)
    return made, name
