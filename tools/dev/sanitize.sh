#!/usr/bin/env bash
# Builds the runtime's core and its C++ tests under sanitizers and runs the tests whose name matches a pattern.
#
#   tools/dev/sanitize.sh address,undefined build/sanitize-address '_test$'
set -euo pipefail
cd "$(dirname "$0")/../.."

sanitizers=$1 folder=$2 pattern=$3
tools=$PWD/.venv/bin
# The random tests of cache and scheduler run 1,900 sequences of operations at scale 1.
export TRTLLM_TEST_SCALE=${TRTLLM_TEST_SCALE:-5.3}
export UBSAN_OPTIONS=print_stacktrace=1

tests=$(find tests/runtime/core -name '*_test.cc' -printf '%f\n' | sed 's/\.cc$//' | grep -E "$pattern" | sort)

"$tools/cmake" -S runtime/core -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$tools/ninja" -DCMAKE_BUILD_TYPE=None \
    -DTRTLLM_SANITIZE="$sanitizers" >/dev/null
# shellcheck disable=SC2086
"$tools/cmake" --build "$folder" --target $tests

# ThreadSanitizer's memory map does not bear the widest address randomization of newer kernels.
runner=
if [[ $sanitizers == thread ]] && setarch --addr-no-randomize true 2>/dev/null; then runner='setarch --addr-no-randomize'; fi
# Two at a time; each one's lines stay together.
run_one() {
    local output status=0
    output=$($2 "$1" 2>&1) || status=$?
    printf '%s\n%s\n' "${1##*/} ($3)" "$output"
    return $status
}
export -f run_one
printf "$folder/%s\n" $tests | xargs -P 2 -I{} bash -c 'run_one "$@"' run_one {} "$runner" "$sanitizers"
