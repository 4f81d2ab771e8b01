# make check | test | run | board
.PHONY: check test run board
check:  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy
test:
	python -m pytest
run:
	python distill.py
board:
	tensorboard --logdir lightning_logs --host 127.0.0.1
