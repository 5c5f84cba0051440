#!/usr/bin/env bash
# Builds the plans of all network packages of a folder on this GPU, and runs the checks whose engines are there.
# usage: tests/gpu/run.sh PACKAGES RESULTS
# PACKAGES holds NAME/network folders of tiny models (make_packages.py) and, where they were made, SmolLM2-fp32 and
# SmolLM2-fp16. python must have TensorRT, numpy, onnx, onnx-ir, pydantic, typer, tokenizers, jinja2, cuda-bindings and
# this package. RESULTS gets a JSON file of each step. The exit status is 0 when every step's was.
set -uo pipefail
packages=$(realpath "${1:?usage: $0 PACKAGES RESULTS}") results=$(realpath -m "${2:?usage: $0 PACKAGES RESULTS}")
here=$(realpath "$(dirname "$0")")
python=${PYTHON:-python3}
mkdir -p "$results"
status=0

step() {
  echo "== $*"
  "$@" || status=1
}

shopt -s nullglob
tiny=("$packages"/*/network)
large=("$packages"/SmolLM2-fp32 "$packages"/SmolLM2-fp16)
existing=()
for package in "${large[@]}"; do [ -d "$package" ] && existing+=("$package"); done
[ ${#tiny[@]} -gt 0 ] && step "$python" "$here/build_plans.py" "${tiny[@]}" --json "$results/tiny_plans.json"
[ ${#existing[@]} -gt 0 ] && step "$python" "$here/build_plans.py" "${existing[@]}" --json "$results/plans.json"
[ -f "$here/run_tiny.py" ] && [ ${#tiny[@]} -gt 0 ] && step "$python" "$here/run_tiny.py" "$packages" --json "$results/tiny.json"
if [ -d "$packages/SmolLM2-fp32-engine" ]; then
  session=("$python" "$here/run_session.py" --fp32 "$packages/SmolLM2-fp32-engine" --json "$results/session.json")
  [ -d "$packages/SmolLM2-fp16-engine" ] && session+=(--fp16 "$packages/SmolLM2-fp16-engine")
  step "${session[@]}"
fi
exit $status
