# Tasks of this project. All of them run in .venv, which the first one creates.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

LOCK := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"

.PHONY: demo test test-container lint format bench bench-quality docs pictures lock clean

# Run the pipeline on a small real data set, with a local S3 endpoint.
demo: .venv/demo
	$(BIN)/python pipeline.py demo

# Run all tests. `make test PYTEST="-m 'not slow and not container'"` skips the slow ones.
test: .venv/test
	$(BIN)/python -m pytest $(PYTEST)

# Build the container images and test them in a Docker engine. CONTAINER_S3 may be the address of an S3 server that
# containers can reach.
test-container: .venv/test
	$(BIN)/python -m pytest --numprocesses 0 -m container tests/test_container.py $(PYTEST)

# Check style, types, the Dockerfile and the workflows. No linter needs a network.
lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --quiet --offline .github

# Compare the speed of the pipeline with that of other methods and write benchmarks/RESULTS.md. Takes about 40 minutes.
bench: .venv/test .venv/demo .venv/bench
	$(BIN)/python -m benchmarks

# Compare the models with usual methods on real images and write benchmarks/QUALITY.md. Takes about 30 minutes.
# The variables CLOTHING_TAR and MOBILENETV2_WEIGHTS give the paths of two files that no package contains. Data sets
# whose files are missing are skipped with a message.
bench-quality: .venv/bench
	$(BIN)/python -m benchmarks.quality $(QUALITY)

# Generate docs/configuration.md from the settings.
docs: .venv/docs
	$(BIN)/python docs/scripts/configuration.py

# Render the README's images from the demo. Needs Chromium or Chrome; takes about two minutes.
pictures: .venv/demo .venv/docs
	$(BIN)/python docs/scripts/images.py

# Resolve the versions in the container images again, within the bounds of requirements.txt and setup.py.
lock: .venv/lock
	$(LOCK) setup.py --extra cluster --extra login --output-file locks/cpu.txt
	$(LOCK) setup.py --extra demo --constraints locks/cpu.txt --output-file locks/demo.txt
	echo "tensorflow-cpu; sys_platform == 'never'" \
	  | $(LOCK) setup.py --extra cuda --extra cluster --extra login --constraints locks/cpu.txt --override - --output-file locks/cuda.txt

# Fix style where the linter can.
format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo-data demo.env

# An extra of setup.py is installed when its stamp is older than setup.py or requirements.txt.
.venv/%: setup.py requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
