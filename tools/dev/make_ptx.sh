#!/usr/bin/env bash
# Compiles the runtime's CUDA kernels to PTX, which every GPU from compute capability 7.5 on takes.
# usage: make_ptx.sh [SOURCE.cu] ; writes SOURCE.ptx beside it. Needs nvcc.
#
# nvcc stamps its newest language version on what it writes, and drivers refuse versions newer than themselves. These
# kernels use nothing new, so they are stamped 7.0, which drivers from R450 on take; ptxas proves it where it is at hand.
set -euo pipefail
source=${1:-$(dirname "$0")/../../runtime/cuda/cache_kernels.cu}
target=${2:-${source%.cu}.ptx}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nvcc -ptx -arch=compute_75 -O3 -o "$work/raw.ptx" "$source"
{
  echo "// Made by tools/dev/make_ptx.sh of $(basename "$source"), sha256 $(sha256sum "$source" | cut -d' ' -f1)"
  grep -v '^//' "$work/raw.ptx" | sed -e 's/^\.version .*/.version 7.0/' | cat -s
} > "$work/made.ptx"
if command -v ptxas > /dev/null; then
  for chip in sm_75 sm_90; do ptxas -arch=$chip -o /dev/null "$work/made.ptx"; done
fi
mv "$work/made.ptx" "$target"
