# `make video` makes a video and `make test` runs the tests, in a fresh clone, with nothing but Python 3.10 or later.
# Both first install into .venv, once. Set any of these: make video PROMPT="a large ring growing" ARGS="--seed 8"
PROMPT = a red circle moving left
ARGS =
EXTRAS = cpu,video,test
PYTHON = python3 python3.14 python3.13 python3.12 python3.11 python3.10 python
export PROMPT
READY = .venv/installed-$(EXTRAS)

.PHONY: help video test
help:
	@echo 'make video   make a video of "$(PROMPT)"; PROMPT="..." for another'
	@echo 'make test    run the tests'

video: $(READY)
	@.venv/bin/mlx-unet3d generate "$$PROMPT" $(ARGS)

test: $(READY)
	@.venv/bin/pytest -n auto --dist worksteal $(ARGS)

# Print why a Python does not fit. Old ones run this, too.
define PROBE
import platform, sys
if sys.version_info < (3, 10):
    sys.exit("is " + platform.python_version())
if sys.platform == "darwin" and platform.machine() != "arm64":
    sys.exit("is not for Apple silicon")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("lacks venv (apt-get install python3-venv)")
endef
export PROBE

$(READY): pyproject.toml Makefile
	@for python in .venv/bin/python $(PYTHON); do \
	    command -v "$$python" >/dev/null && "$$python" -c '' 2>/dev/null || continue; \
	    reason=$$("$$python" -c "$$PROBE" 2>&1) && found=$$python && break; \
	    reasons="$$reasons $$python $$reason;"; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make: no fitting Python:$${reasons:- none found;} install Python 3.10 or later" \
	        "(https://www.python.org/downloads), or name one: PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi; \
	echo "installing into .venv with $$("$$found" --version)" >&2; \
	{ [ "$$found" = .venv/bin/python ] || "$$found" -m venv --clear .venv; } && \
	{ .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null; } && \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]" || { \
	    echo "make: could not install; mend what pip says above, often the network, and run make again" >&2; \
	    exit 1; \
	}; \
	touch $@
