#!/usr/bin/env bash
# Builds the plans of all network packages of a folder on this GPU, and runs the checks whose engines are there.
# usage: tests/gpu/run.sh PACKAGES RESULTS [MODEL]
# PACKAGES holds NAME/network folders of tiny models (make_packages.py) and, where they were made, SmolLM2-fp32 and
# SmolLM2-fp16. python must have TensorRT, numpy, onnx, onnx-ir, pydantic, typer, tokenizers, jinja2, cuda-bindings and
# this package. With MODEL, the file that the SmolLM2 packages were made of, missing network.weights are made from it,
# and refit is checked against a fresh build of other weights. RESULTS gets a JSON file of each step. The exit status is
# 0 when every step's was.
set -uo pipefail
packages=$(realpath "${1:?usage: $0 PACKAGES RESULTS [MODEL]}") results=$(realpath -m "${2:?usage: $0 PACKAGES RESULTS}")
model=${3:+$(realpath "$3")}
here=$(realpath "$(dirname "$0")")
python=${PYTHON:-python3}
mkdir -p "$results"
status=0

step() {
  echo "== $*"
  "$@" || status=1
}

shopt -s nullglob
tiny=()
for package in "$packages"/*/network; do [ "$package" = "$packages/perturbed/network" ] || tiny+=("$package"); done
large=("$packages"/SmolLM2-fp32 "$packages"/SmolLM2-fp16)
existing=()
for package in "${large[@]}"; do [ -d "$package" ] && existing+=("$package"); done
unweighted=()
for package in "${existing[@]}"; do [ -f "$package/network.weights" ] || unweighted+=("$package"); done
[ ${#unweighted[@]} -gt 0 ] && step "$python" "$here/restore_weights.py" "$model" "${unweighted[@]}"
perturbed=$packages/perturbed
if [ -n "$model" ] && [ -d "$packages/SmolLM2-fp32" ]; then
  [ -d "$perturbed" ] || step "$python" "$here/make_perturbed.py" "$model" "$packages/SmolLM2-fp32" "$perturbed"
  existing+=("$perturbed/network")
fi
[ ${#tiny[@]} -gt 0 ] && step "$python" "$here/build_plans.py" "${tiny[@]}" --json "$results/tiny_plans.json"
[ ${#existing[@]} -gt 0 ] && step "$python" "$here/build_plans.py" "${existing[@]}" --json "$results/plans.json"
[ ${#tiny[@]} -gt 0 ] && step "$python" "$here/run_tiny.py" "$packages" --json "$results/tiny.json"
if [ -d "$packages/SmolLM2-fp32-engine" ]; then
  session=("$python" "$here/run_session.py" --fp32 "$packages/SmolLM2-fp32-engine" --json "$results/session.json")
  [ -d "$packages/SmolLM2-fp16-engine" ] && session+=(--fp16 "$packages/SmolLM2-fp16-engine")
  if [ -d "$perturbed/engine" ]; then
    session+=(--perturbed "$perturbed/model.safetensors" --perturbed-engine "$perturbed/engine" --base "$model")
  fi
  step "${session[@]}"
fi
exit $status
