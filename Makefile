.PHONY: help check format test test-all mutants docs wheel run board
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'
check:  ## lint, format, types, import contracts
	ruff check .
	ruff format --check .
	mypy
	lint-imports
format:  ## format and fix what can be fixed
	ruff check --fix .
	ruff format .
test:  ## the tests that take less than five seconds each
	python -m pytest
test-all:  ## all tests
	python -m pytest -m ""
mutants:  ## break chosen lines one by one; a test should notice each
	python -m tests.mutations
docs:  ## build the docs into site/
	mkdocs build --strict
wheel:  ## build dist/*.whl
	python -m build --wheel
run:  ## distill with the default settings
	python distill.py
board:  ## curves of all runs in TensorBoard
	tensorboard --logdir lightning_logs --host 127.0.0.1
