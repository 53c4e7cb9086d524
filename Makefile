# Everything happens in .venv; nothing is installed outside it. `make help` lists the targets.

.DEFAULT_GOAL := help
.PHONY: help demo test test-versions lint clean

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet --quiet
# Test processes at a time.
JOBS ?= 2

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Without a GPU, JAX's CUDA plugin package alone (no driver, no CUDA libraries) lets the tests lower
# programs for CUDA.
$(READY): pyproject.toml Makefile scripts/make-venv scripts/cuda-extra
	@$(PYTHON) -c '' 2> /dev/null || { echo "Creating $(VENV)" && scripts/make-venv $(VENV); }
	@cuda=$$(scripts/cuda-extra) && \
	extras=dev$${cuda:+,$$cuda} && \
	echo "Installing jevt[$$extras] into $(VENV)" && \
	$(PYTHON) $(PIP_INSTALL) --editable ".[$$extras]" && \
	if [ -z "$$cuda" ]; then \
	  $(PYTHON) $(PIP_INSTALL) --no-deps \
	    "jax-cuda13-plugin==$$($(PYTHON) -c 'import jaxlib; print(jaxlib.__version__)')"; \
	fi
	@touch $@

demo: $(READY)  ## Train a small model on real data, under jevt.jit and under jax.jit
	@$(PYTHON) examples/train_digits.py

# Triton compiles or interprets, from its import on: two processes.
test: $(READY)  ## Run the tests; those that need a GPU are skipped and counted without one
	$(PYTHON) -m pytest -n $(JOBS) -m "not interpret"
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -n $(JOBS) -m interpret

lint: $(READY)  ## Check style and types
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# The combinations beside the default one that are supported, each in an environment of its own.
VERSIONS := jax-0.12_triton-3.8 jax-0.11_triton-3.6 jax-0.11_triton-3.9

test-versions: $(addprefix test-,$(VERSIONS))  ## Run the tests with other versions of JAX and Triton

$(VENV)/versions/%/.ready: $(READY)
	@jax=$$(echo $* | sed -E 's/jax-(.*)_.*/\1/') && \
	triton=$$(echo $* | sed -E 's/.*_triton-(.*)/\1/') && \
	echo "Installing JAX $$jax and Triton $$triton into $(@D)" && \
	$(PYTHON) -m venv --clear $(@D) && \
	$(@D)/bin/python $(PIP_INSTALL) --editable ".[dev]" && \
	$(@D)/bin/python $(PIP_INSTALL) --no-deps \
	  "jax==$$jax.*" "jaxlib==$$jax.*" "triton==$$triton.*" "jax-cuda13-plugin==$$jax.*"
	@touch $@

.PHONY: $(addprefix test-,$(VERSIONS))
$(addprefix test-,$(VERSIONS)): test-%: $(VENV)/versions/%/.ready
	$(<D)/bin/python -m pytest -n $(JOBS) -m "not interpret"
	TRITON_INTERPRET=1 $(<D)/bin/python -m pytest -n $(JOBS) -m interpret

clean:  ## Remove the environments and everything generated
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
