# Every target makes what it needs in .venv; nothing but git, make and Python 3.11+ is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-all test-wheel test-oldest lint docs parity speed clean

install: $(VENV)/.installed

# torch first, alone and pinned, so that no later requirement makes pip choose another build. For
# a CPU build where the index offers several: PIP_EXTRA_INDEX_URL, or install torch in .venv before.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		"setuptools<81" wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable ".[nni,torch-pruning,data,report,eval,docs,dev]"
	touch $@

demo: install
	rm -rf demo-out
	$(BIN)/python -m benchmarks.demo

# Tests run on one thread each, so two at a time; files stay whole, because fixtures are shared.
test: install lint
	$(BIN)/python -m pytest -m "not long" --numprocesses 2 --dist loadfile

# The long ones take the memory of full-size models, one at a time.
test-all: test
	$(BIN)/python -m pytest -m long

# Wheel and sdist, in an environment without extras and a folder without the sources.
test-wheel: install
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --no-isolation > /dev/null
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet "$(TORCH)"
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	$(BIN)/python -m benchmarks.demo.build_data dist/photos --calibration 64 --downstream 0 --test 0
	cp -r benchmarks/demo/models/blip dist/blip
	cd dist && ../.venv-wheel/bin/vlp prune paper/multiflow-blip --model blip --data photos/calibration \
		--batch-size 16 --batches 4 --save-model --out pruned
	test -f dist/pruned/report.html
	cd dist && ../.venv-wheel/bin/vlp masks verify pruned/masks-0.75.safetensors pruned/model-0.75
	.venv-wheel/bin/python -m pip uninstall --quiet --yes vlp-plugins
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.tar.gz
	cd dist && ../.venv-wheel/bin/vlp plan paper/multiflow-blip --model blip --batch-size 16 --batches 4

# What setup.cfg names as the lowest torch and transformers, and a part of the tests with them. The
# file left out takes a default device back, after which torch 2.6 has none and cannot say so.
OLDEST := $(shell sed -n 's/^    \(torch\|transformers\)>=/\1==/p' setup.cfg)
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(filter torch==%,$(OLDEST))
	.venv-oldest/bin/python -m pip install --quiet $(OLDEST) --editable ".[report,torch-pruning]" \
		hypothesis psutil pytest scikit-learn
	.venv-oldest/bin/python -m pytest -m "not long" tests/contract tests/adapters tests/calibration \
		tests/masks tests/models tests/scoring tests/cli/test_prune_command.py \
		--ignore tests/contract/test_global_state.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in site/: site/index.html opens without a server. Any dead link stops it.
docs: install
	$(BIN)/python docs/generate.py
	$(BIN)/python -m zensical build --strict --clean
	@echo "open site/index.html"

parity: install
	$(BIN)/python -m benchmarks.parity tests/golden

speed: install
	$(BIN)/python -m benchmarks.speed multiflow

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info demo-out
