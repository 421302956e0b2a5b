"""What imports what: the layers, the weight of an import, the public names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bge_rerank_adapters
from bge_rerank_adapters import errors

PACKAGE = Path(bge_rerank_adapters.__file__).parent
NAME = PACKAGE.name
# A part of the package may import those before it, and its own modules.
LAYERS = (
    ("errors",),
    ("settings",),
    ("calls",),
    ("engine", "remote"),
    (
        *("langchain", "llama_index", "milvus", "haystack"),
        *("flag_embedding", "cross_encoder"),
        *("evaluation", "serve", "ray"),
    ),
    ("cli",),
    ("__main__", "__init__"),
)
# Likewise the parts of the engine.
ENGINE_LAYERS = (
    ("json_files",),
    ("text", "checkpoints", "stats"),
    ("models",),
    ("queue",),
    ("reranker",),
    ("shared",),
    ("hosted",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
ENGINE_LEVEL = {part: level for level, parts in enumerate(ENGINE_LAYERS) for part in parts}
MOST_LEVELS = 8
HOSTS = {
    "langchain": ("langchain_core", "langchain"),
    "llama_index": ("llama_index", "llama-index"),
    "haystack": ("haystack", "haystack"),
    "remote": ("httpx", "remote"),
}
HEAVY = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy"),
    *("langchain_core", "langchain_classic", "llama_index", "pymilvus", "milvus_model"),
    *("FlagEmbedding", "pydantic", "typer", "rich", "fastapi", "prometheus_client", "ray"),
    "httpx",
)
MODELS = PACKAGE / "engine" / "models"
FILES = sorted(PACKAGE.rglob("*.py"))


def run_python(code: str, *, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in which some packages cannot be imported."""
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
    return subprocess.run(
        [sys.executable, "-c", block + code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
        cwd=PACKAGE.parent,
    )


def imported(path: Path, *, nested: bool = True) -> set[str]:
    """Return the full names of the modules that a file imports, inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names.add(node.module)
            if node.module == NAME:
                names |= {f"{NAME}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    """Return the part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def engine_part(path: Path) -> str:
    """Return the part of the engine that one of its files belongs to."""
    return path.relative_to(PACKAGE / "engine").parts[0].removesuffix(".py")


def part_levels() -> dict[str, int]:
    """Return how many parts follow one another in the longest chain of imports below each part.

    Those within functions are left out, since they are not made when a module is imported.
    """

    def part_of(name: str) -> str:
        first, *rest = name.split(".")[1:] or ["__init__"]
        return f"engine.{rest[0]}" if first == "engine" and rest else first

    below: dict[str, set[str]] = {}
    for path in FILES:
        own = part_of(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        inner = {part_of(n) for n in imported(path, nested=False) if n.startswith(f"{NAME}.")}
        below.setdefault(own, set()).update(inner - {own})

    def level(part: str) -> int:
        return 1 + max(map(level, below[part]), default=0)

    return {part: level(part) for part in below}


def test_every_module_has_its_layer():
    assert {part(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = part(path)
    inner = {name.split(".")[1] for name in imported(path) if name.startswith(f"{NAME}.")}
    upwards = {name for name in inner if LEVEL[name] >= LEVEL[own] and name != own}
    assert upwards == set()


ENGINE_FILES = [path for path in (PACKAGE / "engine").rglob("*.py") if path.stem != "__init__"]


def test_every_module_of_the_engine_has_its_layer():
    assert {engine_part(path) for path in ENGINE_FILES} == set(ENGINE_LEVEL)


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_within_the_engine_point_downwards(path):
    own, engine = engine_part(path), f"{NAME}.engine."
    names = {name.split(".")[2] for name in imported(path) if name.startswith(engine)}
    upwards = {name for name in names if ENGINE_LEVEL[name] >= ENGINE_LEVEL[own] and name != own}
    assert upwards == set()


def test_imports_run_through_few_levels():
    levels = part_levels()
    assert max(levels.values()) <= MOST_LEVELS, levels


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_imported_in_models_alone(path):
    torch = {name for name in imported(path) if name.partition(".")[0] == "torch"}
    assert not torch or MODELS in path.parents


def test_the_search_for_imports_sees_those_within_functions():
    """The two tests above would pass on anything if it did not."""
    lazy = PACKAGE / "engine" / "hosted" / "lazy.py"
    assert f"{NAME}.engine.shared" in imported(lazy)
    assert f"{NAME}.engine.shared" not in imported(lazy, nested=False)
    assert "torch" in imported(MODELS / "encoder" / "model.py")


def loaded_after(code: str, names: tuple[str, ...]) -> list[str]:
    done = run_python(f"{code}\nprint(*[name for name in {names!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after(f"import {NAME}", HEAVY) == []
    assert loaded_after(f"from {NAME} import Reranker", ("torch",)) == ["torch"]


@pytest.mark.parametrize(
    "module", ["milvus", "flag_embedding", "cli", "settings", "engine.checkpoints.hub", "serve"]
)
def test_light_modules_load_no_torch(module):
    assert loaded_after(f"import {NAME}.{module}", ("torch", "transformers", "numpy")) == []


@pytest.mark.parametrize("module", ["langchain", "llama_index"])
def test_an_adapters_setting_is_refused_before_the_engine_is_loaded(module):
    name = {"langchain": "BGEDocumentCompressor", "llama_index": "BGENodePostprocessor"}[module]
    pytest.importorskip(HOSTS[module][0])
    code = f"""
from {NAME}.{module} import {name}
try:
    {name}(model="tiny", top_k=0)
except ValueError:
    pass
else:
    raise SystemExit("not refused")
"""
    assert loaded_after(code, (f"{NAME}.engine.reranker",)) == []


@pytest.mark.parametrize("module", HOSTS)
def test_an_adapter_without_its_host_names_its_extra(module):
    host, extra = HOSTS[module]
    done = run_python(f"import {NAME}.{module}", blocked=(host,))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {NAME}.{module} needs ")
    assert last.endswith(f'run: pip install "bge-rerank-adapters[{extra}]"')


@pytest.mark.parametrize("absent", ["fastapi", "prometheus_client"])
def test_the_server_names_its_extra(absent):
    pytest.importorskip("fastapi")
    done = run_python(f"import {NAME}.serve", blocked=(absent,))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f'ImportError: {NAME}.serve needs {absent}; run: pip install "bge-rerank-adapters[serve]"'
    )


def test_the_deployment_names_the_extra_of_ray():
    pytest.importorskip("fastapi")
    done = run_python(f"from {NAME}.serve import deployment", blocked=("ray",))
    assert done.returncode == 1
    assert 'ray; run: pip install "bge-rerank-adapters[ray]"' in done.stderr


def test_the_engine_needs_no_host():
    code = f"""
from {NAME} import Reranker
with Reranker("tiny", device="cpu", dtype="float32") as reranker:
    print(reranker.rerank("Who wrote Faust?", ["It rains.", "Goethe wrote Faust."])[0].index)
"""
    hosts = ("langchain_core", "langchain_classic", "llama_index", "pymilvus", "pydantic")
    done = run_python(code, blocked=hosts)
    assert (done.stdout.strip(), done.returncode) == ("1", 0), done.stderr


def test_all_names_every_exported_name():
    public = {name for name in vars(bge_rerank_adapters) if not name.startswith("_")}
    modules = {path.stem for path in PACKAGE.iterdir()} | {"annotations"}
    helpers = {"TYPE_CHECKING", "Any"}
    exported = (public - modules - helpers) | {"Reranker", "RemoteReranker", "__version__"}
    assert sorted(exported) == sorted(bge_rerank_adapters.__all__)
    assert dir(bge_rerank_adapters) == sorted(bge_rerank_adapters.__all__)
    for name in bge_rerank_adapters.__all__:
        assert getattr(bge_rerank_adapters, name) is not None


def test_all_names_every_error_and_the_tree_draws_it():
    classes = {
        name: each
        for name, each in vars(errors).items()
        if isinstance(each, type) and each.__module__ == errors.__name__
    }
    assert set(classes) <= set(bge_rerank_adapters.__all__)
    assert all(issubclass(each, errors.RerankError) for each in classes.values())
    assert all(name in errors.__doc__ for name in classes)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Rerankr'"):
        bge_rerank_adapters.Rerankr  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module(f"{NAME}.nothing")
