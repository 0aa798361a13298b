# Everything a new user needs is two commands: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-clients bench gpu docs clean

demo: $(STAMP)          ## the main job on real weights: check, fix, quantize, verify (TINY=1: no download)
	$(BIN)/python fixtures/demo.py $(if $(TINY),--tiny)

test: $(STAMP)          ## every test that needs no other engine and no GPU
	$(BIN)/python -m pytest

test-clients: $(STAMP)  ## load our output in vLLM and transformers, each in its own environment
	bash tests/clients/setup.sh
	$(BIN)/python -m pytest -m clients tests/clients

bench: $(STAMP)         ## measure against peers in one run
	$(BIN)/python bench/header.py
	$(BIN)/python bench/scan.py
	$(BIN)/python bench/fix.py

gpu: $(STAMP)           ## on a machine with a GPU: kernels against the reference, compute-sanitizer, measurements, goldens
	@$(BIN)/python -c "import sys; from doctor.quant import kernels; r = kernels.available(); \
	  r and sys.exit(f'make gpu: no GPU here: {r}. Nothing was run.')"
	$(BIN)/python -m pytest tests/cuda
	if command -v compute-sanitizer >/dev/null; then \
	  compute-sanitizer --error-exitcode 9 $(BIN)/python -m pytest tests/cuda/test_kernels.py -k "gpu and (ragged or streams or cached or scan)"; \
	else echo "make gpu: no compute-sanitizer here, so that check was not run"; fi
	$(BIN)/python bench/gpu.py --record

docs: $(STAMP)          ## write the rule table of the README and docs/rules/ anew
	$(BIN)/python docs/generate.py

# The constraints file pins torch: an open range would take gigabytes of CUDA libraries on some machines.
$(STAMP): pyproject.toml constraints.txt $(wildcard setup.py cuda/host/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info
