# Every target sets up what it needs, from an empty clone on: Python 3.11, a C++ compiler and make must be there.
#
#   make demo               for each host a teacher, a plain and a distilled student on embedded data; a table and a report
#                           TASK="core nlp": only these; FULL=1 SEEDS=3: the whole benchmarks, over hours
#   make test               the default tests        make test-slow, make test-gpu: opt-in ones
#   make test-core          the tests of the core, without any host, in an environment of its own: nothing to compile
#   make campaign           seeded attacks on the promises, all of them: half an hour to an hour on two cores; a second call completes the first
#                           CAMPAIGNS="kills 'fuzz taps'": only these; SHARE=0.1: a tenth
#   make test-versions      the core, and methods in Hugging Face, on the oldest and newest releases that are declared
#   make lint typecheck     ruff, codespell, mypy
#   make docs               the documentation as a site in build/docs
#   make bench-det bench-seg bench-nlp   what distilling costs
#
#   STACK=upstream          the alternative mm stack, in an environment of its own
#   TORCH=torch==2.13.0     the torch to install
#   TEST_JOBS=1             processes that test side by side; by default one a core, 8 at most

PYTHON ?= python3.11
STACK ?= onedl
TORCH ?= torch==2.13.0
TASK ?= core nlp seg det
SEEDS ?= 1
FULL ?=
DEVICE ?= cpu
PYTEST_ARGS ?=
TEST_JOBS ?= auto
CAMPAIGNS ?=
SHARE ?= 1
# A Python and an end of the declared ranges, or the core alone (transformers 5.23 is for Python 3.11).
# A Python that is not installed is left out with a line.
VERSIONS ?= 3.10-core 3.11-oldest 3.12-newest
RELEASES_core := torch==2.6.0 accelerate==1.0.0
RELEASES_oldest := torch==2.6.0 accelerate==1.3.0 transformers==5.23.0 datasets==4.0.0
RELEASES_newest := torch accelerate transformers datasets
EXTRAS_core := bench,test
EXTRAS_oldest := vision,bench,test
EXTRAS_newest := $(EXTRAS_oldest)

VENV ?= $(if $(filter onedl,$(STACK)),.venv,.venv-$(STACK))
BIN := $(VENV)/bin
# Named after the torch it stands for, so that another TORCH= installs anew (and compiles mmcv against it).
TORCH_STAMP := $(VENV)/.$(subst /,_,$(subst $() ,_,$(TORCH)))
PIP := $(BIN)/pip --disable-pip-version-check
MMCV_onedl := onedl-mmcv
MM_onedl := onedl-mmengine onedl-mmdetection onedl-mmsegmentation
MMCV_upstream := mmcv
MM_upstream := mmengine mmdet mmsegmentation ftfy regex
# The demos that need no compiled ops run while these compile.
FIRST := $(filter core nlp,$(TASK))
THEN := $(filter-out core nlp,$(TASK))
# By another name, as make -n carries out lines that say $(MAKE).
AGAIN = $(MAKE) --no-print-directory
DEMO = $(BIN)/python -m kdgraft demo $(1) --seeds $(SEEDS) --device $(DEVICE) $(if $(FULL),--full)
CONSTRAINTS := -c constraints/common.txt -c constraints/$(STACK).txt -c $(VENV)/torch.txt

.PHONY: env demo test test-core test-slow test-gpu test-versions campaign lint typecheck format docs bench-det bench-seg bench-nlp clean
.DELETE_ON_ERROR:

env: $(VENV)/.ready

# Torch first and pinned: everything later is held to it, so that nothing pulls another build.
$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet "setuptools<81" wheel ninja psutil "$(TORCH)" -c constraints/common.txt
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/torch.txt
	echo 'setuptools<81' >> $(VENV)/torch.txt
	touch $@

# Compiles the ops: about eight minutes on two cores; pip keeps the wheel for the next time.
$(VENV)/.mmcv: $(TORCH_STAMP) constraints/$(STACK).txt
	@echo "compiling mmcv's ops; about 8 minutes on two cores the first time"
	MMCV_WITH_OPS=1 $(PIP) install --quiet --no-build-isolation $(MMCV_$(STACK)) $(CONSTRAINTS)
	touch $@

# What Hugging Face and measurements need, without any mm package.
$(VENV)/.plain: $(TORCH_STAMP) pyproject.toml constraints/common.txt
	$(PIP) install --quiet --no-build-isolation -e '.[nlp,bench]' $(CONSTRAINTS)
	touch $@

# torchdistill is a peer of the benchmark; its losses need no torchvision, which the package asks for.
$(VENV)/.ready: $(VENV)/.mmcv pyproject.toml constraints/common.txt
	$(PIP) install --quiet --no-build-isolation $(MM_$(STACK)) $(CONSTRAINTS)
	$(PIP) install --quiet --no-build-isolation -e '.[nlp,dev]' $(CONSTRAINTS)
	$(PIP) install --quiet --no-deps torchdistill $(CONSTRAINTS)
	touch $@

# Torch alone, as users of plain PyTorch have it: no mm stack, no transformers.
$(VENV)/.core: $(TORCH_STAMP) pyproject.toml constraints/common.txt
	$(PIP) install --quiet --no-build-isolation -e '.[test]' -c constraints/common.txt -c $(VENV)/torch.txt
	touch $@

demo: $(VENV)/.plain
	$(if $(and $(FIRST),$(THEN)),@$(AGAIN) $(VENV)/.mmcv & compiling=$$!; $(call DEMO,$(FIRST)) || { kill $$compiling; exit 1; }; wait $$compiling)
	$(if $(FIRST),$(if $(THEN),,$(call DEMO,$(FIRST))))
	$(if $(THEN),@$(AGAIN) env && $(call DEMO,$(THEN)))

# Sources are compiled once, not by every process that tests start, where PYTHONDONTWRITEBYTECODE is set.
test: env
	$(BIN)/python -m compileall -q plugins det seg nlp tests/support
	$(BIN)/python -m pytest -n $(TEST_JOBS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-core:
	$(MAKE) --no-print-directory STACK=core .venv-core/.core
	.venv-core/bin/python -m pytest -n $(TEST_JOBS) --maxprocesses 8 --dist worksteal tests/plugins $(PYTEST_ARGS)

test-slow: env
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-gpu: env
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-versions: $(addprefix .versions-,$(VERSIONS))

# Torch 2.6 has no FSDP2 on CPUs; what needs it is left out.
.versions-%:
	@if ! python$(firstword $(subst -, ,$*)) -c '' 2> /dev/null; then \
		echo "python$(firstword $(subst -, ,$*)) is not installed: left out"; exit 0; \
	fi; \
	python$(firstword $(subst -, ,$*)) -m venv .venv-$* && \
	.venv-$*/bin/pip --disable-pip-version-check install --quiet "setuptools>=77,<81" wheel $(RELEASES_$(lastword $(subst -, ,$*))) && \
	.venv-$*/bin/pip --disable-pip-version-check install --quiet --no-build-isolation -e '.[$(EXTRAS_$(lastword $(subst -, ,$*)))]' && \
	.venv-$*/bin/python -m pytest -n $(TEST_JOBS) --maxprocesses 8 --dist worksteal tests/plugins $(if $(filter %core,$*),,tests/nlp/test_methods.py) \
		-k "not test_sharded_weights_are_refused" $(PYTEST_ARGS)

campaign: env
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore -m campaigns $(CAMPAIGNS) --share $(SHARE)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

typecheck: env
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: env
	$(BIN)/mkdocs build --quiet
	@echo "build/docs/index.html"

bench-det bench-seg bench-nlp: bench-%: env
	KINETO_LOG_LEVEL=5 $(BIN)/python -m kdgraft bench $* --costs --device $(DEVICE)

clean:
	rm -rf .venv .venv-upstream .venv-core runs work_dirs build
