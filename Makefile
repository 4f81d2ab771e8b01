# make check | test | mutants | run | board
.PHONY: check test mutants run board
check:  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy
test:
	python -m pytest
mutants:  ## break chosen lines one by one; the tests should notice
	python -m tests.mutations
run:
	python distill.py
board:
	tensorboard --logdir lightning_logs --host 127.0.0.1
