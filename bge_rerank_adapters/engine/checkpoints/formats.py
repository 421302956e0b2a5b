"""Describes the weights of a checkpoint that has no safetensors."""

from collections.abc import Iterable
from pathlib import Path

_PICKLE = (
    "a pickle, which can run any code when it is read; convert it to model.safetensors, for "
    "instance with AutoModelForSequenceClassification.from_pretrained(...).save_pretrained(...)"
)
_OTHER = "which this package does not run; give the checkpoint with safetensors that it came from"
_FROM_OTHER_LIBRARY = (
    "weights of TensorFlow or Flax, which this package does not read; convert them to "
    "model.safetensors with from_pretrained(..., from_tf=True), or from_flax=True, of "
    "transformers 4 and save_pretrained(...)"
)
_KINDS = (
    ((".bin", ".pt", ".pth", ".ckpt", ".pkl"), _PICKLE),
    ((".onnx", ".onnx_data"), f"an ONNX model, {_OTHER}"),
    ((".gguf",), f"a GGUF model, {_OTHER}"),
    (("openvino_model.xml",), f"an OpenVINO model, {_OTHER}"),
    ((".h5", ".msgpack"), _FROM_OTHER_LIBRARY),
)
# Files of training runs that are pickles but not weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin")


def describe_folder(folder: Path) -> str | None:
    """Return `describe_weights` for the files of a folder and its direct subfolders."""
    # No deeper, since the user may have given a folder with very many files.
    inside = [*folder.glob("*"), *folder.glob("*/*")]
    return describe_weights(path.relative_to(folder).as_posix() for path in inside)


def describe_weights(names: Iterable[str]) -> str | None:
    """Return the format of weights that are not usable safetensors; `None` if there are no weights.

    Args:
        names: Paths of all files, relative to the folder or repository.
    """
    files = sorted(names, key=lambda name: (name.count("/"), name))
    weights = [name for name in files if name.rpartition("/")[2] not in _NO_WEIGHTS]
    for endings, advice in _KINDS:
        found = [name for name in weights if name.endswith(endings)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"has its weights as {found[0]}{more} only, {advice}"
    nested = [name for name in weights if name.endswith(".safetensors")]
    if nested:
        return (
            f"has safetensors in a subfolder only ({nested[0]}); give a folder that holds that "
            "file and its config.json"
        )
    return None
