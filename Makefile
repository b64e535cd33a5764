# Each target sets up its own environment first (.venv, from constraints.txt); later runs find it ready.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo demo-real compare test lint docs-site audit clean

demo: $(READY)
	$(VENV)/bin/python -m jobs.demo

# A real model, a small one: five questions to three short PDF files. MODEL: a folder, or an id on the hub.
MODEL ?= Qwen/Qwen2.5-0.5B-Instruct
REAL := demo_output/real-$(notdir $(patsubst %/,%,$(MODEL)))
demo-real: $(READY)
	$(VENV)/bin/python -m jobs.summarize --config examples/demo-real.yaml --model $(MODEL) --output $(REAL)
	$(VENV)/bin/python -m jobs.report $(REAL)

compare: $(READY)
	$(VENV)/bin/python -m jobs.demo --arms stem dense published

# Six processes, since many tests wait for others (Ray, browsers); one thread each: more would only wait for each other.
# Bytecode is kept whatever the environment says: the tests start many processes of our own code.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n 6 --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The pages of docs/ as a site, in site/; a warning is an error.
docs-site: $(READY)
	$(VENV)/bin/python -m mkdocs build --strict

# Known vulnerabilities of the pinned versions; needs a network that reaches PyPI's advisories.
audit: $(READY)
	$(VENV)/bin/python -m pip install --quiet pip-audit
	$(VENV)/bin/pip-audit --strict -r constraints.txt --no-deps --disable-pip

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo_output site
