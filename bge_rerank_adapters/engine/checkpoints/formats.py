"""What a checkpoint's files are, where the weights are not safetensors."""

from collections.abc import Iterable
from pathlib import Path

# What becomes of files by how their names end.
_PICKLE = (
    "a pickle, which can run any code when it is read; convert it to model.safetensors, for "
    "instance with AutoModelForSequenceClassification.from_pretrained(...).save_pretrained(...)"
)
_OTHER = "which this package does not run; give the checkpoint with safetensors that it was made of"
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
# Files of training runs, which are pickles and no weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin")


def describe_folder(folder: Path) -> str | None:
    """Return the same as `describe_weights` of a folder's files and those right below it."""
    # No deeper: the folder may be any, with very many files below it.
    inside = [*folder.glob("*"), *folder.glob("*/*")]
    return describe_weights(path.relative_to(folder).as_posix() for path in inside)


def describe_weights(names: Iterable[str]) -> str | None:
    """Return in what form the weights are there instead of safetensors; `None` where none are.

    Args:
        names: Of the files of a folder or a repository, as paths inside it.
    """
    files = sorted(names, key=lambda name: (name.count("/"), name))
    weights = [name for name in files if name.rpartition("/")[2] not in _NO_WEIGHTS]
    for endings, way_out in _KINDS:
        found = [name for name in weights if name.endswith(endings)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"has its weights as {found[0]}{more} only, {way_out}"
    nested = [name for name in weights if name.endswith(".safetensors")]
    if nested:
        return (
            f"has safetensors in a subfolder only ({nested[0]}); give a folder that holds that "
            "file and its config.json"
        )
    return None
