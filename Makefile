# make demo   set-up from nothing, then two simulated robots learn a task (about 5 minutes)
# make test   set-up from nothing, then the tests
# make test-slow, make test-benchmarks   the long tests; each long measurement in small
# make check  format, lint, types, layers
# make lock   renew requirements.lock after a change of pyproject.toml
# make clean  remove everything that these made, the runs excepted

PYTHON ?= python3
UV_VERSION := 0.13.0
BIN := .venv/bin
SETUP := .venv/.setup
TOOLS := .setup/bin
FAST := not slow and not gpu and not hw
SLOW := slow and not gpu and not hw
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slow test-benchmarks check format lock clean

setup: $(SETUP)

demo: $(SETUP)
	$(BIN)/embodied train experiment=demo

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 -m '$(FAST) and not alone'
	$(BIN)/python -m pytest -m '$(FAST) and alone'

test-slow: $(SETUP)
	$(BIN)/python -m pytest -n 2 -m '$(SLOW) and not alone' --ignore=tests/benchmarks
	$(BIN)/python -m pytest -m '$(SLOW) and alone' --ignore=tests/benchmarks --ignore=tests/hal --ignore=tests/sim
	$(BIN)/python -m pytest -m '$(SLOW) and alone' tests/hal tests/sim

test-benchmarks: $(SETUP)
	$(BIN)/python -m pytest -m '$(SLOW)' tests/benchmarks

check: $(SETUP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(SETUP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(TOOLS)/uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "Python 3.11 or 3.12 is needed, found %d.%d; try: make PYTHON=python3.11" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python lacks venv. Install it with: apt-get install -y python3-venv"; exit 1; }
	$(PYTHON) -m venv .setup
	.setup/bin/python -m pip install -q 'uv~=$(UV_VERSION)'

$(SETUP): requirements.lock pyproject.toml | $(TOOLS)/uv
	test -x $(BIN)/python || $(TOOLS)/uv venv -q --python $(PYTHON) .venv
	$(TOOLS)/uv pip sync -q --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(TOOLS)/uv pip install -q --python $(BIN)/python --no-deps --editable .
	$(BIN)/python -m sim.rendering
	touch $(SETUP)

lock: $(TOOLS)/uv
	$(TOOLS)/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --no-emit-index-url -o requirements.lock

clean:
	rm -rf .venv .setup .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
