# Two commands, each doing its own set-up: `make demo` runs the whole path, `make test` checks everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# uv looks for local wheels where pip was told to look
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# DeepSpeed's operations are compiled where and when they are first used
export DS_BUILD_OPS := 0

.PHONY: demo test format clean

demo: $(READY)
	$(BIN)/decant demo

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Byte code is compiled once here, because Ray starts many processes and each imports the frameworks.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Decant needs Python 3.11 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs
