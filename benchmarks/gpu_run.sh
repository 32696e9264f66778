#!/usr/bin/env bash
# Builds the CUDA kernels for the GPU that is here, times them by themselves (make gpu-times), tests them and measures
# them, within ten minutes and without a network: with torch that has CUDA, nvcc, make, a C++ compiler, ninja and, for
# all of it, pytest with its plugins xdist and timeout, hypothesis, expecttest, rich and matplotlib. What is missing is
# left out, and said.
#
#   benchmarks/gpu_run.sh [DIRECTORY]      for gpu_times.csv, gpu.csv, gpu.png and the logs; default: benchmarks/results
#
#   PYTHON=python3.12              the interpreter that has torch; default: python3
#   GPU_RUN_SECONDS=570            in all; tests and cases that do not fit are skipped
#   SOFTMAX_EXT_COMMIT=abc123      what the tables say where git can't tell
#
# Exit status: 0, 1 where a step failed (the others are done all the same), 2 where there is no GPU or the build fails.
set -uo pipefail

if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
  echo "usage: benchmarks/gpu_run.sh [DIRECTORY]" >&2
  exit 2
fi
total=${GPU_RUN_SECONDS:-570}
if ! [[ "$total" =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu_run.sh: GPU_RUN_SECONDS needs a whole number, 1 or more; got '$total'" >&2
  exit 2
fi
output=${1:-"$(dirname "${BASH_SOURCE[0]}")/results"}
mkdir -p "$output" || exit 2
output=$(cd "$output" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_run.sh: ${PYTHON:-python3} cannot be run" >&2 && exit 2; }
[[ "$python" == /* ]] || python=$PWD/$python
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FORCE_CUDA=1

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability(0))' 2>/dev/null)
if [ -z "$capability" ]; then
  echo "gpu_run.sh: $python has no torch that can use a GPU here; without one: make test, make bench" >&2
  exit 2
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}

status=0
lines=()
left() { echo $((total - SECONDS)); }
has() { "$python" -c "import $1" 2>/dev/null; }
line() { lines+=("$(printf '%-20s %-44s %6s' "$1" "$2" "$3")"); }
skipped() { line "$1" "skipped: $2" ""; }

# share PERCENT MOST: of the time that is left
share() {
  local seconds=$(($(left) * $1 / 100))
  echo $((seconds < 1 ? 1 : seconds < $2 ? seconds : $2))
}

# step NAME LIMIT LOG COMMAND...: runs it for at most so many seconds, its output appended to the log.
step() {
  local name=$1 limit=$2 log=$output/$3 begin=$SECONDS result said=ok
  shift 3
  echo "== $name, at most $limit s" | tee -a "$log"
  echo "$*" >>"$log"
  # An interrupt, after which pytest still says what has failed until then.
  timeout --signal=INT --kill-after=15 "$limit" "$@" >>"$log" 2>&1
  result=$?
  if [ $result -eq 124 ] || [ $result -eq 137 ]; then
    said="NOT FINISHED in $limit s, $(basename "$log")"
  elif [ $result -ne 0 ]; then
    said="FAILED with status $result, $(basename "$log")"
  fi
  [ $result -eq 0 ] || status=1
  line "$name" "$said" "$((SECONDS - begin)) s"
  return $result
}

finish() {
  printf '\n%-20s %-44s %6s\n' step result time
  printf '%s\n' "${lines[@]}"
  printf '%-20s %-44s %6s\n' "in all" "$output" "$SECONDS s"
  exit "$1"
}

rm -f "$output"/gpu_{times,build,tests,bench,sanitizer}.log "$output"/gpu_times.csv

# ---- the kernels by themselves, without torch ----

if step "build of gpu-times" "$(left)" gpu_times.log make -j"$(nproc)" build/gpu_times/gpu_times; then
  step "gpu-times" "$(share 20 90)" gpu_times.log make gpu-times GPU_TIMES_ARGS="--csv '$output/gpu_times.csv'"
  sed '1,/^== gpu-times/d' "$output/gpu_times.log"
else
  tail -n 30 "$output/gpu_times.log"
fi

# ---- build ----

if ! step "build for $TORCH_CUDA_ARCH_LIST" "$(left)" gpu_build.log "$python" setup.py build_ext --inplace; then
  tail -n 30 "$output/gpu_build.log"
  finish 2
fi
{ "$python" -m softmax_ext && nvidia-smi; } 2>&1 | tee -a "$output/gpu_build.log"

# ---- tests ----

pytest=("$python" -m pytest --device cuda -q --tb=short --maxfail=100 -p no:cacheprovider)
has pytest_timeout || pytest+=(-o addopts=-ra) # --strict-config refuses the setting of a plugin that is not there
rest=(--ignore=tests/gpu/test_cuda.py -m "not slow")
has xdist && rest+=(-n "$(($(nproc) < 16 ? ($(nproc) + 1) / 2 : 8))")

if ! has pytest; then
  skipped "tests" "pytest is not installed"
else
  step "tests of CUDA" "$(share 20 80)" gpu_tests.log "${pytest[@]}" tests/gpu/test_cuda.py
  has hypothesis || { rest+=(--ignore=tests/unit/test_softmax.py) && skipped "tests of softmax" "no hypothesis"; }
  has expecttest || { rest+=(-k "not opcheck") && skipped "tests by opcheck" "no expecttest"; }
  skipped "slow tests" "make test-gpu runs them"
  step "other tests" "$(share 35 130)" gpu_tests.log "${pytest[@]}" "${rest[@]}" tests
  grep -E '^(FAILED|ERROR)|^[0-9]+ (passed|failed|skipped)|^=.*(passed|failed|error)' "$output/gpu_tests.log" | head -n 60
fi

# ---- compute-sanitizer: out of bounds or not ----

if ! has pytest; then
  skipped "compute-sanitizer" "pytest is not installed"
else
  before=$status
  step "compute-sanitizer" "$(share 20 70)" gpu_sanitizer.log \
    "$python" tests/gpu/sanitize_gpu.py --tool memcheck -q -k "test_every_kernel and (float32 or bfloat16)"
  case $? in 124 | 137) status=$before ;; esac # the rest is for make test-gpu, which has the time
  grep -hE '^compute-sanitizer|ERROR SUMMARY' "$output/gpu_sanitizer.log"
fi

# ---- benchmark ----

if ! has rich || ! has matplotlib; then
  skipped "benchmark" "rich or matplotlib is not installed"
else
  # No case begins in the last 40 seconds; one that hangs is ended.
  seconds=$(($(left) > 80 ? $(left) - 40 : 40))
  step "benchmark" "$((seconds + 35))" gpu_bench.log \
    "$python" benchmarks/bench.py --device cuda --op cross_entropy softmax --output "$output" --seconds "$((seconds * 3 / 4))"
  seconds=$(($(left) > 60 ? $(left) - 40 : 20))
  step "linear" "$((seconds + 35))" gpu_bench.log \
    "$python" benchmarks/bench.py --device cuda --op linear --output "$output" --seconds "$seconds"
  cat "$output/gpu_bench.log"
fi

finish $status
