#!/usr/bin/env bash
# Builds the native kernels with the address and undefined-behaviour sanitizers and runs every variant that this CPU has
# over odd shapes, and fused decoders of several sizes, with buffers of exactly the promised size. Any finding, leak or wrong product is a failure.
#
#   scripts/check_native.sh          (needs a C++ compiler with its sanitizer runtimes; about a minute)
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
compiler="${CXX:-c++}"
sanitize=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1)

flags=()
for flag in "${sanitize[@]}"; do flags+=("--flag=$flag"); done
python "$root/hf_quant/kernels/build.py" --target "$work/libnative.so" "${flags[@]}"
# shellcheck disable=SC2086  # CXX may hold a command with arguments
$compiler -std=c++17 -Wall -Wextra "${sanitize[@]}" -fopenmp -I "$root/hf_quant/kernels/csrc" \
  "$root/scripts/check_native.cpp" "$root/scripts/check_decoder.cpp" -L "$work" -lnative -Wl,-rpath,"$work" -o "$work/check_native"
export ASAN_OPTIONS=detect_leaks=1:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
OMP_NUM_THREADS=2 "$work/check_native"
