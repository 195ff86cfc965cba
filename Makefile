# Every chore of this project. Each needs a python3 and nothing else: .venv is made first, and what it lacks is fetched.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# `$(INSTALLED)` is there when what serving needs is installed, `$(INSTALLED)-NAME` when the extra NAME is too.
INSTALLED := $(VENV)/.installed
# A user's pip may be set to install elsewhere. What it downloads waits beside the place where it goes: /tmp may be small.
export PIP_USER := 0
PIP := TMPDIR="$(CURDIR)/$(VENV)" $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The exit status of pytest where ARGS leaves no test.
NONE_CHOSEN := 5

.PHONY: serve test test-gpu test-bare test-container lint configs perf bench compare clients soak faults fuzz fleet capacity clean

# Serves the embedded model, or what ARGS says: make serve ARGS="--model EleutherAI/gpt-j-6b --device cuda"
serve: $(INSTALLED)
	exec $(BIN)/python tools/serve.py $(ARGS)

# Every test that needs no GPU, two at once, and then those that must be alone: make test ARGS="-k lifecycle"
test: $(INSTALLED)-test
	$(BIN)/python -m pytest tests/unit tests/server -n 2 --dist worksteal -m "not alone" $(ARGS) || [ $$? = $(NONE_CHOSEN) ]
	$(BIN)/python -m pytest tests/server -m alone $(ARGS) || [ $$? = $(NONE_CHOSEN) ]

# The kernels: on a GPU if there is one, else in the interpreter of Triton (the language).
test-gpu: $(INSTALLED)-test $(INSTALLED)-gpu
	$(BIN)/python -m pytest tests/gpu $(ARGS)

# README's commands, as an ordinary user of small Debian and Ubuntu systems that debootstrap makes. Needs root and a network.
test-bare: $(INSTALLED)-test
	$(BIN)/python -m pytest tests/bare $(ARGS)

# The image, built with buildah and run with podman (apt-get install buildah podman runc debootstrap). Needs root, a network.
test-container: $(INSTALLED)-test
	$(BIN)/python -m pytest tests/container $(ARGS)

lint: $(INSTALLED)-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy gptj_triton tools tests

# Writes what is made from code: the models' configurations, and the tables in docs/reference.md.
configs: $(INSTALLED)
	$(BIN)/python tools/make_configs.py

# A small sweep of the real perf_analyzer: answers over HTTP and gRPC, and streams; a table and a plot in build/perf.
# Another model: make perf ARGS="--model DIR"
perf: $(INSTALLED)-plots
	$(BIN)/python tools/perf.py $(ARGS)

# The same requests at once and one after another, and the cost of one; streams; the engine by itself beside transformers.
# The options of the three differ, so they take no ARGS from here.
bench: $(INSTALLED)-bench
	$(BIN)/python tools/benchmark_concurrency.py
	$(BIN)/python tools/benchmark_streaming.py
	$(BIN)/python tools/benchmark_engine.py

# A FastAPI service around transformers and this project's server under the same load, into build/comparison.
compare: $(INSTALLED)-compare
	$(BIN)/python tools/compare.py $(ARGS)

# Clients of others from PyPI, each in an environment of its own under build/clients-env, against this server; a table.
# Some of them: make clients ARGS="kserve litellm"
clients: $(INSTALLED)
	test -x build/clients-env/bin/uv || $(BIN)/python -m venv build/clients-env
	build/clients-env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/python tests/clients/run_clients.py $(ARGS)

# A mixed load for 20 minutes: memory, leftovers, and an account of every request. make soak ARGS="--minutes 60"
soak: $(INSTALLED)-bench
	$(BIN)/python tools/soak.py $(ARGS)

# Breaks parts of a running server, one after another, then kills its processes 50 times. make faults ARGS="--only body"
faults: $(INSTALLED)-bench
	$(BIN)/python tools/faults.py $(ARGS)

# 10,000 inputs of any kind over both protocols, and those that chance does not find. make fuzz ARGS="--inputs 500"
fuzz: $(INSTALLED)-fuzz
	$(BIN)/python tools/fuzz.py $(ARGS)

# Three servers behind nginx, then behind HAProxy: one is killed every 20 s under load, then all are restarted in turn.
# make fleet ARGS="--proxy haproxy --minutes 1"
fleet: $(INSTALLED)-bench
	$(BIN)/python tools/fleet.py $(ARGS)

# Real load on a server here beside the simulation of the same, three minutes; wants a machine that does nothing else.
# How many servers a load needs: tools/capacity.py --help
capacity: $(INSTALLED)-bench
	$(BIN)/python tools/capacity.py --validate $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import json, subprocess, sys, venv; sys.exit(sys.version_info < (3, 7))' 2>/dev/null || \
	  { echo "make: $(PYTHON) is no Python 3.7 or newer with its standard library: apt-get install python3, or make PYTHON=..." >&2; exit 1; }
	@PYTHONSAFEPATH= $(PYTHON) -m gptj_triton.install $(VENV)
	$(PIP) -e '.[tritonserver]'
	touch $@

$(INSTALLED)-%: $(INSTALLED)
	$(PIP) -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .python .mypy_cache .pytest_cache .ruff_cache .hypothesis gptj_triton.egg-info
