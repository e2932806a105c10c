# `make help` lists the commands. Each makes its own virtual environment in .venv if there is none.

RUN := .venv/bin/python
# One thread per process: tests start several processes, and threads beyond the cores slow all of them down.
# Files stay together, because the tests of one share engines and runs; in order, because the longest come early then.
PYTEST := -m pytest -q --disable-warnings --durations=10 -n 2 --dist loadfile --no-loadscope-reorder
TEST := OMP_NUM_THREADS=1 $(RUN) $(PYTEST)
TEST312 := OMP_NUM_THREADS=1 .venv312/bin/python $(PYTEST)

# Without compiled files each of the many processes compiles vLLM, transformers and Megatron-Core anew, half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help environment quickstart test test-slow environment-312 test-312 environment-slurm

help:
	@echo "make quickstart   train a tiny policy by self-play on this machine; no GPU is needed"
	@echo "make test         run the tests"
	@echo "make test-slow    run the tests that take longer"
	@echo "make test-312     run the trainer's tests on Python 3.12, with the Megatron-Core of that version, in .venv312"
	@echo "make environment-slurm  install what \`spell launch\` needs to submit jobs to Slurm, into .venv-slurm"
	@echo "make environment  only install what the others need, into .venv"

environment:
	@python3 tools/setup_environment.py

# Every call is a run of its own: runs/quickstart, runs/quickstart-2, ...
quickstart: environment
	@name=quickstart; n=1; \
	while [ -e "runs/$$name" ]; do n=$$((n + 1)); name="quickstart-$$n"; done; \
	$(RUN) -m spell_megatron train --config examples/quickstart.yaml --run.name="$$name"

test: environment
	@$(TEST) -m "not slow and not gpu"

test-slow: environment
	@$(TEST) -m "slow and not gpu"

environment-312:
	@python3 tools/setup_environment.py .venv312

environment-slurm:
	@python3 tools/setup_environment.py .venv-slurm

# Without vLLM: the engines, which `make test` tries, do not depend on the version of Megatron-Core.
test-312: environment-312
	@$(TEST312) -m "not slow and not gpu and not engine" tests/training tests/weights
