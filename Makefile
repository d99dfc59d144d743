# Each target prepares .venv by itself, so a fresh clone needs only make and Python >= 3.10.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart test test-slow check bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

quickstart: ## teach the bundled model a new task with LoRA
	@scripts/setup train
	@.venv/bin/lorakit quickstart

test: ## run the quick tests
	@scripts/test

test-slow: ## run the slow tests
	@scripts/test -q -m "slow and not gpu and not net"

check: ## lint, format and types
	@scripts/check

bench: ## answer every question in bench/; takes long
	@scripts/setup dev train report serve
	@set -e; for file in bench/*.py; do \
	    head -n 1 "$$file" | grep -q '?$$' || continue; echo "bench: $$file"; .venv/bin/python "$$file"; done

clean: ## remove caches and build outputs; keeps .venv and runs/
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests scripts bench examples docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
