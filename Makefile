# `make help` lists the commands. Each makes its own virtual environment in .venv if there is none.

RUN := .venv/bin/python
# One thread per process: tests start several processes, and threads beyond the cores slow all of them down.
# Files stay together, because the tests of one share engines and runs; in order, because the longest come early then.
PYTEST := -m pytest -q --disable-warnings --durations=10 -n 2 --dist loadfile --no-loadscope-reorder
TEST := OMP_NUM_THREADS=1 $(RUN) $(PYTEST)
TEST312 := OMP_NUM_THREADS=1 .venv312/bin/python $(PYTEST)

# Without compiled files, each of the many processes would compile vLLM, transformers and Megatron-Core: half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart docs check format test-fast test test-slow test-312 test-contracts
.PHONY: environment environment-312 environment-contracts environment-docs environment-gpu environment-slurm

# The times are those of two cores; "up to" where they were shared with other work.
help:
	@echo "make quickstart         train a tiny policy by self-play on this machine; no GPU is needed"
	@echo "make docs               make a site of the documentation in build/docs/site, with all settings, commands and metrics"
	@echo
	@echo "make check              format, lint, types and structure of the code (10 seconds)"
	@echo "make format             format the code, and correct what the linter can correct"
	@echo "make test-fast          the tests that start no processes, engines, browser or Slurm (2 minutes)"
	@echo "make test               all tests but the slow ones (20 to 30 minutes)"
	@echo "make test-slow          the slow tests (more than an hour)"
	@echo "make test-312           tests of the trainer on Python 3.12 with its newer Megatron-Core, in .venv312 (up to 19 minutes)"
	@echo "make test-contracts     tests of the code for GPUs with the Python files of packages that need one (up to 15 minutes)"
	@echo
	@echo "make environment        only install what these commands need, into .venv"
	@echo "make environment-contracts  fetch these Python files into .venv-contracts (downloads 0.3 GB)"
	@echo "make environment-docs   install what \`make docs\` needs, into .venv-docs (downloads 0.03 GB)"
	@echo "make environment-gpu    install everything for NVIDIA GPUs (CUDA 13) into .venv-gpu; needs nvcc, 25 GB of disk"
	@echo "make environment-slurm  install what \`spell launch\` needs to submit jobs to Slurm, into .venv-slurm"

environment:
	@python3 tools/setup_environment.py

# Every call is a run of its own: runs/quickstart, runs/quickstart-2, ...
quickstart: environment
	@name=quickstart; n=1; \
	while [ -e "runs/$$name" ]; do n=$$((n + 1)); name="quickstart-$$n"; done; \
	$(RUN) -m spell_megatron train --config examples/quickstart.yaml --run.name="$$name"

# Any fault in the pages is an error. The site needs no server: its search works on files too.
docs: environment-docs
	@rm -rf build/docs
	@.venv-docs/bin/python tools/docs_site.py build/docs/pages
	@.venv-docs/bin/sphinx-build --fail-on-warning --keep-going --quiet --conf-dir docs/site build/docs/pages build/docs/site
	@echo "Open build/docs/site/index.html in a browser."

# Everything that takes no more than a minute, before the tests.
check: environment
	@$(RUN) -m ruff format --check
	@$(RUN) -m ruff check
	@$(RUN) -m mypy
	@$(RUN) -m pytest -q tests/test_architecture.py

format: environment
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

# Its tests share little, so the cores divide them evenly instead of file by file.
test-fast: environment
	@$(TEST) --dist worksteal -m fast

test: environment
	@$(TEST) -m "not slow and not gpu and not contracts"

test-slow: environment
	@$(TEST) -m "slow and not gpu"

environment-312:
	@python3 tools/setup_environment.py .venv312

environment-contracts: environment
	@$(RUN) tools/fetch_contract_sources.py

environment-docs:
	@python3 tools/setup_environment.py .venv-docs

environment-gpu:
	@python3 tools/setup_environment.py .venv-gpu

environment-slurm:
	@python3 tools/setup_environment.py .venv-slurm

# Without vLLM: the engines, which `make test` tries, do not depend on the version of Megatron-Core.
test-312: environment-312
	@$(TEST312) -m "not slow and not gpu and not contracts and not engine" tests/training tests/weights

# Their sources are fetched first; without them these tests are skipped.
test-contracts: environment-contracts environment-312
	@$(TEST) -m contracts tests/gpu_contracts
	@$(TEST312) -m contracts tests/gpu_contracts
