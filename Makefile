# Needs make and Python 3.11 or newer; everything else is installed into .venv the first time.
#
#   make app                        the page, on http://localhost:8501 (PORT= for another port)
#   make test                       linters, type checker and all tests
#   make app TORCH_INDEX=<url>      torch and torchvision from another package index, e.g. a build for the CPU only

PORT ?= 8501
# Who can open the page: this machine only, or with ADDRESS=0.0.0.0 everybody on its network.
ADDRESS ?= localhost
PYTHON ?=

VENV := .venv
PY := $(VENV)/bin/python
# A stamp is newer than pyproject.toml only when the installation that it stands for went through.
STAMPS := $(VENV)/stamps
PIP := $(PY) -m pip --disable-pip-version-check

# Left out, TORCH_INDEX means the build that is there; given, also as an empty string, it means that index.
ifneq ($(origin TORCH_INDEX),undefined)
TORCH_INDEX_STAMP := $(STAMPS)/index
endif

.DELETE_ON_ERROR:
.PHONY: app test lint soak clean help always

help:
	@echo "make app    set up what is missing and serve the page (PORT=$(PORT), ADDRESS=$(ADDRESS))"
	@echo "make test   set up what is missing, then linters, type checker and all tests"
	@echo "make lint   linters and type checker only"
	@echo "make soak   many visitors at once on a server of its own, with its memory's slope"
	@echo "make clean  remove .venv and what the tools cached"
	@echo "TORCH_INDEX=<url> takes torch from that package index, PYTHON=<path> chooses the interpreter of a new .venv."

app: $(STAMPS)/app
	$(PY) -m streamlit run app.py --server.address $(ADDRESS) --server.port $(PORT)

# A process for each core, each with a network and the page of its own: so not for every core of a large machine. By
# hand, `python -m pytest tests/test_x.py` runs in one process.
test: lint
	$(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

lint: $(STAMPS)/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy gradinv

soak: $(STAMPS)/test
	$(PY) docs/soak.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist

# An interpreter that is not there (never set up, or upgraded away) voids the stamps.
$(shell test -x $(PY) || rm -rf $(STAMPS))

$(PY):
	@found=; \
	for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3." >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found lacks venv or ensurepip; install them (on Debian and Ubuntu: the package python3-venv)." >&2; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$found"; \
	"$$found" -m venv --clear $(VENV)

$(STAMPS)/venv: | $(PY)
	@if ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo "$(VENV) holds a Python older than 3.11; run 'make clean' first." >&2; exit 1; \
	fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade
	@mkdir -p $(STAMPS) && touch $@

# Noted before the attempt: after one that failed half-way, the same index goes on and another one starts anew.
$(STAMPS)/index: always $(STAMPS)/venv
	@if ! echo '$(TORCH_INDEX)' | cmp -s - $@; then \
	    $(PIP) uninstall --quiet --yes torch torchvision && echo '$(TORCH_INDEX)' >$@; \
	fi

# torch and torchvision go first and together, so that they fit each other and TORCH_INDEX concerns only them.
$(STAMPS)/torch: $(STAMPS)/venv $(TORCH_INDEX_STAMP)
	@rm -f $@
	$(PIP) install $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch torchvision
	@touch $@

$(STAMPS)/app: $(STAMPS)/torch pyproject.toml
	$(PIP) install --editable '.[app]'
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch pyproject.toml
	$(PIP) install --editable '.[app,test]'
	@touch $@ $(STAMPS)/app
