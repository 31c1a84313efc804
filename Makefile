# The few things that one does with this project. Everything happens in .venv, which the first of them makes.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

LOCK := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"

.PHONY: demo test test-container lint format bench bench-quality lock clean

# Run the whole pipeline on a small real data set behind a local S3 endpoint.
demo: .venv/demo
	$(BIN)/python pipeline.py demo

# Run all tests; `make test PYTEST="-m 'not slow and not container'"` leaves out the slow ones.
test: .venv/test
	$(BIN)/python -m pytest $(PYTEST)

# Build the images and try them in a Docker engine. CONTAINER_S3 may name an S3 server that containers reach.
test-container: .venv/test
	$(BIN)/python -m pytest --numprocesses 0 -m container tests/test_container.py $(PYTEST)

# Check style and types, the Dockerfile and the workflows. Nothing of it needs a network.
lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --quiet --offline .github

# Measure every claim about speed against its baseline, and write benchmarks/RESULTS.md. Takes about 40 minutes.
bench: .venv/test .venv/demo .venv/bench
	$(BIN)/python -m benchmarks

# Measure how good the models are on real images, beside usual ways to learn, and write benchmarks/QUALITY.md. Takes about
# 30 minutes. CLOTHING_TAR and MOBILENETV2_WEIGHTS name files that no package has; what is missing is named and left out.
bench-quality: .venv/bench
	$(BIN)/python -m benchmarks.quality $(QUALITY)

# Choose again, within the bounds of requirements.txt, what exactly the images hold.
lock: .venv/lock
	$(LOCK) requirements.txt --output-file locks/cpu.txt
	$(LOCK) setup.py --extra demo --constraints locks/cpu.txt --output-file locks/demo.txt
	echo "tensorflow-cpu; sys_platform == 'never'" \
	  | $(LOCK) setup.py --extra cuda --constraints locks/cpu.txt --override - --output-file locks/cuda.txt

# Mend style where that can be done by a machine.
format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo-data demo.env

# An extra of setup.py is installed when its stamp is older than what is asked for.
.venv/%: setup.py requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
