# Every target does its own set-up on a fresh Debian or Ubuntu machine with Python 3.11 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := CMakeLists.txt $(wildcard csrc/*/*.h csrc/*/*/*.h csrc/*/*.cpp csrc/*/*.cu)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# What setup installs: "dev" for tests and tools, "demo" for the demo alone.
EXTRA ?= dev
export PYTHONPATH :=

.PHONY: setup demo test lint format bench proto proto-check stubs stubs-check native-test \
	native-asan native-tsan native-bench gpu-test check clean

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Esper needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip # the one that comes with Python 3.11 takes twice as long to resolve
	@touch $@

# torch by its exact version and before what needs it: an open range may pull a build of several gigabytes.
$(VENV)/.torch: constraints.txt | $(VENV)/.build-tools
	$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.build-tools: constraints.txt | $(VENV)/.python
	$(PIP_INSTALL) scikit-build-core pybind11 cmake ninja
	@touch $@

# The native core alone; it needs no torch, so it builds while torch is unpacked.
$(VENV)/.native: pyproject.toml $(NATIVE_SOURCES) | $(VENV)/.build-tools
	$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

# What an installation is made of; when one of them changes, it is made anew.
INSTALLED = pyproject.toml constraints.txt $(NATIVE_SOURCES)
define install_extra
	@$(MAKE) --no-print-directory -j 2 $(VENV)/.torch $(VENV)/.native
	$(PIP_INSTALL) --no-build-isolation -e '.[$(1)]'
endef

$(VENV)/.setup-demo: $(INSTALLED)
	$(call install_extra,demo)
	@touch $@

$(VENV)/.setup-dev: $(INSTALLED)
	$(call install_extra,dev)
	@touch $@ $(VENV)/.setup-demo

setup: $(VENV)/.setup-$(EXTRA)

demo: $(VENV)/.setup-demo
	$(BIN)/esper demo

# Two workers on two cores: torch's own threads would only fight over them.
test: $(VENV)/.setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow and not chaos and not gpu"

# The services live in services/ and are imported as esper.services: the tools read a tree laid out like the installed package.
build/tree/esper: FORCE
	@rm -rf build/tree && mkdir -p build/tree && cp -r esper build/tree/esper && cp -r services build/tree/esper/services
	@cp -r bench pyproject.toml build/tree/
FORCE:

lint: $(VENV)/.setup-dev build/tree/esper
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/tree && ../../$(BIN)/mypy --cache-dir ../mypy -p esper -p bench
	cd build/tree && PYTHONPATH=. ../../$(BIN)/lint-imports --config pyproject.toml --no-cache
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	cd proto && ../$(BIN)/buf lint

format: $(VENV)/.setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# Generated code is committed, so that users need no protoc; proto-check proves it fresh.
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc
proto: $(VENV)/.setup-dev
	$(PROTOC) --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. proto/esper/v1/*.proto

proto-check: $(VENV)/.setup-dev
	@rm -rf build/proto && mkdir -p build/proto
	$(PROTOC) --python_out=build/proto --grpc_python_out=build/proto --mypy_out=quiet:build/proto \
		--mypy_grpc_out=quiet:build/proto proto/esper/v1/*.proto
	diff -r -x __init__.py -x __pycache__ build/proto/esper/v1 esper/v1

# The types of the native module, from the module itself.
define write_stub
	$(BIN)/python csrc/bindings/generate_stubs.py $(1)
	$(BIN)/ruff format --quiet $(1)
endef

stubs: $(VENV)/.setup-dev
	$(call write_stub,esper/execution/_native.pyi)

stubs-check: $(VENV)/.setup-dev
	@mkdir -p build/stubs
	$(call write_stub,build/stubs/_native.pyi)
	diff build/stubs/_native.pyi esper/execution/_native.pyi

define native_suite
	$(BIN)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DESPER_BUILD_PYTHON=OFF \
		-DESPER_BUILD_TESTS=ON -DESPER_SANITIZE=$(2)
	$(BIN)/cmake --build build/$(1)
	$(BIN)/ctest --test-dir build/$(1) --output-on-failure
endef

native-test: $(VENV)/.setup-dev
	$(call native_suite,native,)

native-asan: $(VENV)/.setup-dev
	$(call native_suite,asan,address$(comma)undefined)

native-tsan: $(VENV)/.setup-dev
	$(call native_suite,tsan,thread)

# Not part of CI: needs libbenchmark-dev. A bare 0.05 means seconds in every version; those before 1.8 refuse "0.05s".
native-bench: $(VENV)/.setup-dev
	$(BIN)/cmake -S . -B build/bench -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DESPER_BUILD_PYTHON=OFF \
		-DESPER_BUILD_BENCH=ON -DESPER_CUDA=OFF
	$(BIN)/cmake --build build/bench
	build/bench/esper_bench --benchmark_min_time=0.05

# What CI's machines have no device for. Without one the tests would all be skipped, and say nothing.
gpu-test: $(VENV)/.setup-dev
	@$(BIN)/python -c 'import sys, torch; from esper.execution._native import cuda_available; \
		seen = {"the native core": cuda_available(), f"torch {torch.__version__}": torch.cuda.is_available()}; \
		blind = [name for name, sees in seen.items() if not sees]; \
		sys.exit("gpu-test needs a CUDA device; none is seen by " + " and by ".join(blind) if blind else 0)'
	$(call native_suite,native,)
	$(BIN)/python -m pytest -q -m gpu

comma := ,

bench: $(VENV)/.setup-dev
	$(PIP_INSTALL) --no-build-isolation -e '.[dev,bench]'
	$(BIN)/esper bench all --quick

# What CI runs.
check: lint proto-check stubs-check native-test
	$(BIN)/python -m pytest -q -m "not gpu"

clean:
	rm -rf build .venv
