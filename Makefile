# make demo        a small model reads a text it has never seen and gets better while reading
# make real        a real language model is fetched and converted; it talks, and gets better at a text by reading it
# make test        tests and docstring examples, each contract once; HOPE_KERNELS_TEST_SEED=n repeats a run's new draws
# make test-full   all of them: also sweeps over shapes, seeds and settings, long runs, the C++ library under sanitizers,
#                  and the model of make real, where it can be fetched
# make test-programs  installs lm_eval and what transformers serve needs, and runs both from their command lines
# make test-latest the tests with the newest torch, triton and numpy that pip finds, in .venv-latest
# make lint        ruff, and the types of hope_kernels
# make venv        .venv, which the others build when they need it
PYTHON ?= python3

.PHONY: demo real test test-full test-programs test-latest lint venv clean

demo: venv
	@.venv/bin/python -m hope_kernels demo

real: venv
	@.venv/bin/python -m tools.real_model

test: venv
	@tools/tests.sh

test-full: venv
	@tools/tests.sh -m ''

test-programs: venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts -r requirements-programs.txt
	@.venv/bin/python -m pytest tests/hf/test_programs.py tests/hf/test_peers.py

test-latest:
	@tools/venv_latest.sh $(PYTHON)
	@VENV=.venv-latest tools/tests.sh

lint: venv
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m basedpyright --pythonpath .venv/bin/python

venv:
	@tools/venv.sh $(PYTHON)

clean:
	rm -rf .venv .venv-latest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
