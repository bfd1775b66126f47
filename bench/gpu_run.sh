#!/usr/bin/env bash
# What there is to run on a machine with a GPU, in one call and without a network: the tests marked `gpu`, then the bench.
#
#     bash bench/gpu_run.sh RESULTS [arguments of python -m bench.gpu]
#
# RESULTS, a folder, gets machine.txt, tests.txt, tests.xml, bench.txt and bench.jsonl.
# PYTHON names the interpreter, by default python3. It needs torch with CUDA, anyio, aiofiles, pytest, hypothesis and psutil;
# aioloader need not be installed. pytest-asyncio is used if it is there, and not missed if it is not.
# TESTS_SECONDS (300) and BENCH_SECONDS (240) bound the two parts, so that a hang leaves what was found before it.
#
# Exit status: 0, all has passed; 1, something failed (what came after it has run all the same); 3, there is no GPU.
set -uo pipefail

if [ $# -lt 1 ]; then
    echo "usage: bash bench/gpu_run.sh RESULTS [arguments of python -m bench.gpu]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
results=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
python=${PYTHON:-python3}
failed=0

"$python" - <<'END' | tee "$results/machine.txt" || exit 1
import os, platform, torch
count = torch.cuda.device_count()
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
print(f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.platform()}")
print(f"{count} GPUs: " + ", ".join(torch.cuda.get_device_name(number) for number in range(count)))
END

options=(-q -p no:cacheprovider --junitxml "$results/tests.xml" -m gpu)
if ! "$python" -c "import pytest_asyncio" 2>/dev/null; then
    # Its settings in pyproject.toml are unknown without it, which `--strict-config` and our filters make an error.
    options+=(-p no:asyncio -o "addopts=--strict-markers --import-mode=importlib -ra" -W "ignore::pytest.PytestConfigWarning")
fi
# By name: other test files import packages that such a machine may lack.
mapfile -t tests < <(grep -lE "mark\.gpu\b" tests/test_*.py)
echo "== python -m pytest -m gpu ${tests[*]}"
timeout "${TESTS_SECONDS:-300}" "$python" -m pytest "${options[@]}" "${tests[@]}" 2>&1 | tee "$results/tests.txt" || failed=1

echo "== python -m bench.gpu $*"
timeout "${BENCH_SECONDS:-240}" "$python" -m bench.gpu "$@" 2>&1 | tee "$results/bench.txt" || failed=1
grep "^{" "$results/bench.txt" > "$results/bench.jsonl"

if grep -q "^0 GPUs" "$results/machine.txt"; then
    echo "there is no GPU here: nothing was tested or measured"
    exit 3
fi
exit $failed
