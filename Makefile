# Every target makes the environment it needs in .venv (Python 3.10 to 3.12).
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEEPSPEED ?= deepspeed==0.19.8
MEGATRON ?= 0.16.1 0.19.2
OLDER_DEEPSPEED ?= 0.18.9
OTHER_TORCH ?= 2.6.0 2.14.1
export TORCH_RELEASES ?= $(CURDIR)/.venv/torch-releases
BIN := .venv/bin
export DS_ACCELERATOR ?= cpu
# The tests start hundreds of processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train train-megatron paper paper-runs test test-fast tests-fast lint wheel slurm other-torch docs bench bench-megatron gpu clean

train: .venv/examples  ## a small Llama on the standard library's source: AdamW, then Muon; 8 to 12 minutes on 2 cores, half an hour without bf16 instructions
	$(BIN)/python examples/llama/compare.py

train-megatron: .venv/megatron  ## a small GPT under Megatron-Core, TP 2 x DP 2 on the CPU: AdamW, then Muon
	PYTHONPATH=.venv/megatron-core/0.19.2 $(BIN)/python examples/megatron/compare.py

paper: .venv/examples  ## the reports in docs/paper and their pictures again, out of the logged runs; under a minute
	$(BIN)/python examples/paper/report.py
	$(BIN)/python examples/paper/report.py --logged docs/paper/small/small.jsonl --notes docs/paper/small/notes.md --out docs/paper/small

paper-runs: .venv/examples  ## the paper's experiments from scratch at the smallest scale; under half an hour on 2 cores
	$(BIN)/python examples/paper/run.py --scale toy
	$(BIN)/python examples/paper/report.py --logged runs/paper/toy.jsonl --out runs/paper/report

test: lint docs .venv/megatron .venv/older_deepspeed .venv/emerging_optimizers .venv/compiled .venv/client_libraries $(if $(FULL),.venv/client_scripts other-torch) slurm  ## everything that CI runs; FULL=1 for every combination
	REQUIRE_RELEASES=1 $(BIN)/python -m pytest -n 3 --dist loadgroup --durations=25

test-fast: .venv/dev .venv/megatron-0.19.2  ## lint, types, the core and one path through each engine; 90 seconds on 2 cores
	$(MAKE) -j 2 --output-sync=target lint tests-fast

tests-fast: .venv/dev .venv/megatron-0.19.2
	$(BIN)/python -m pytest -m 'fast and not compiles' -k 'not 0.16.1' tests/core tests/deepspeed/test_exact.py tests/megatron/test_e*.py

slurm:  ## for its tests, which are skipped without it: installed by apt, as root where there is apt
	$(PYTHON) tests/support/slurm_cluster.py install

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/base  ## the wheel and the source distribution, in dist/, checked for the package index
	$(BIN)/python -m pip install -q build twine
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

docs: .venv/docs  ## the documentation as a site, in site/; a dead link or an unknown reference is an error
	$(BIN)/python -m mkdocs build --strict

bench: .venv/dev  ## DeepSpeed's built-in Muon, ours and AdamW in one run; then the table in docs/performance.md
	$(BIN)/python benchmarks/deepspeed_muon.py
	$(BIN)/python benchmarks/into_readme.py

bench-megatron: .venv/emerging_optimizers  ## Megatron 0.19.2's own Muon, ours and AdamW in one run
	$(BIN)/python benchmarks/megatron_muon.py
	$(BIN)/python benchmarks/into_readme.py

gpu: .venv/gpu  ## the checks and the measurements on CUDA devices, in parts that resume (docs/gpu.md); PART=bits for one
	$(BIN)/python benchmarks/gpu.py $(if $(PART),--part $(PART)) $(if $(MINUTES),--minutes $(MINUTES))

clean:
	rm -rf .venv runs build dist *.egg-info

.venv/base:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and f"Python 3.10 to 3.12 is needed, not {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel
	$(BIN)/python -m pip install -q '$(TORCH)' numpy
	touch $@

.venv/examples: .venv/base pyproject.toml
	$(BIN)/python -m pip install -q '$(DEEPSPEED)' -e '.[examples]'
	touch $@

.venv/dev: .venv/base pyproject.toml
	$(BIN)/python -m pip install -q '$(DEEPSPEED)' -e '.[examples,dev]'
	touch $@

# Both releases side by side, each in a folder of its own; pip wants Python 3.12 for 0.19, which runs on 3.11 too.
.venv/megatron: $(MEGATRON:%=.venv/megatron-%)
	touch $@

.venv/megatron-%: .venv/dev
	$(BIN)/python -m pip install -q triton einops packaging typing_extensions
	$(BIN)/python -m pip install -q --no-deps --ignore-requires-python --upgrade \
	  --target .venv/megatron-core/$* megatron-core==$*
	touch $@

# DeepSpeed has no wheels: 40 seconds, without compiling its kernels.
.venv/older_deepspeed: .venv/dev
	for release in $(OLDER_DEEPSPEED); do \
	  DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-deps --no-build-isolation --upgrade \
	    --target .venv/deepspeed/$$release deepspeed==$$release || exit 1; \
	done
	touch $@

# DeepSpeed compiles its AdamW at first use, for a minute or two: once for all runs of the tests.
.venv/compiled: .venv/dev
	$(BIN)/python -m tests.support.torch_releases
	touch $@

# The oldest torch that is promised and the newest, each in a folder of its own with what it depends on: with CUDA's
# libraries 5 GB each. Triton is the environment's: the 3.2 of torch 2.6 wants a GPU when a kernel is defined, and
# Megatron 0.19 defines some when its Mamba and its training loop are imported.
other-torch: $(OTHER_TORCH:%=$(TORCH_RELEASES)/%/installed)

$(TORCH_RELEASES)/%/installed: | .venv/dev
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --target $(@D) torch==$*
	rm -rf $(@D)/triton $(@D)/triton-*
	PYTHONPATH=$(@D) $(BIN)/python -m tests.support.torch_releases
	touch $@

# TRL, PEFT, Lightning: in a folder of their own, without their dependencies, among which is another torch.
.venv/client_libraries: .venv/dev tests/clients/libraries.txt
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .venv/clients -r tests/clients/libraries.txt
	touch $@

# Four that want older libraries, each in a folder. torchaudio's kernels want CUDA's libraries, text wants no kernels.
# pip wants Python 3.12 for Megatron-Bridge, which runs on 3.11 too.
CLIENT_SCRIPTS := llamafactory ms_swift megatron_bridge verl
.venv/client_scripts: .venv/megatron $(CLIENT_SCRIPTS:%=tests/clients/%.txt)
	for client in $(CLIENT_SCRIPTS); do \
	  $(BIN)/python -m pip install -q --no-deps --ignore-requires-python --upgrade --target .venv/clients-$$client \
	    -r tests/clients/$$client.txt || exit 1; \
	done
	rm -f .venv/clients-llamafactory/torchaudio/lib/*.so
	touch $@

# What Megatron 0.19's own Muon is made of.
.venv/emerging_optimizers: .venv/megatron
	$(BIN)/python -m pip install -q absl-py
	$(BIN)/python -m pip install -q --no-deps --ignore-requires-python --upgrade \
	  --target .venv/megatron-core/emerging-optimizers-0.3.0 emerging-optimizers==0.3.0
	touch $@

.venv/docs: .venv/base docs/requirements.txt
	$(BIN)/python -m pip install -q -r docs/requirements.txt
	touch $@

.venv/gpu: .venv/emerging_optimizers
	-$(BIN)/python -m pip install -q -e '.[gpu]'
	touch $@
