# Shared by .ci/run and .ci/newest, which source it. PYTHON names the interpreter (python3 by default).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/llm-trm-ci.XXXXXX")
trap 'rm -rf "$work"' EXIT
exec </dev/null

# Makes the README's commands clone this checkout's HEAD instead of the network.
export TRM_REPO=$root
# Do not let pip compile all 13,800 modules of the tests' environment: Python compiles those that it imports.
export PIP_COMPILE=0
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PYTHONUNBUFFERED=1
# Caches of an earlier run must not hide a kernel that no longer compiles.
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
unset TRITON_INTERPRET TRM_BACKEND PYTHONPATH

heading() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

# Run the rest of the arguments under heading $1. After a failure, the other sections still run, and then the run fails.
failed=()
section() {
    heading "$1"
    "${@:2}" || failed+=("$1")
}

# Print the sections that failed, and fail if there are any.
finish() {
    if ((${#failed[@]})); then
        heading "Failed"
        printf '%s\n' "${failed[@]}"
        exit 1
    fi
    heading "All passed"
}

# Print the one command line of README.md that contains $1.
readme_command() {
    local lines
    lines=$(grep -E '^git clone ' "$root/README.md" | grep -F -e "$1" || true)
    if [[ -z $lines || $lines == *$'\n'* ]]; then
        echo "README.md must contain exactly one command line with '$1'; found: ${lines:-none}" >&2
        return 1
    fi
    printf '%s\n' "$lines"
}

# Print $1 with $2, which it must contain, replaced by $3.
replaced() {
    if [[ $1 != *"$2"* ]]; then
        echo "README.md's command no longer has '$2': $1" >&2
        return 1
    fi
    printf '%s\n' "${1/"$2"/$3}"
}

# Run command line $2 in the new, empty directory $work/$1, in a new virtual environment. The steps are chained:
# bash ignores "set -e" in a function whose result is tested.
run_fresh() {
    mkdir "$work/$1" && "${PYTHON:-python3}" -m venv "$work/$1-venv" && (
        # shellcheck disable=SC1091
        cd "$work/$1" && . "$work/$1-venv/bin/activate" && printf '$ %s\n' "$2" &&
            bash -euo pipefail -c "$2"
    )
}

# Run the rest of the arguments. pytest writes a report, which tests_ran reads by the name $1.
reported() { PYTEST_ADDOPTS="--junitxml=$work/$1.xml --durations=15" "${@:2}"; }

# Fail unless at least one test passed in pytest's report $1.
tests_ran() {
    "${PYTHON:-python3}" - "$work/$1.xml" <<'PYTHON'
import sys
from xml.etree import ElementTree

suites = list(ElementTree.parse(sys.argv[1]).iter("testsuite"))
total, failed, skipped = (
    sum(int(suite.get(key, 0)) for suite in suites for key in keys)
    for keys in (("tests",), ("failures", "errors"), ("skipped",))
)
passed = total - failed - skipped
print(f"{passed} passed, {failed} failed, {skipped} skipped")
if passed <= 0:
    sys.exit("no test ran")
PYTHON
}

test_command=$(readme_command 'python -m pytest')
bench_command=$(readme_command 'llm-trm bench')
small_bench_command=$(replaced "$bench_command" '--latents 256' '--latents 16 --d-model 64 --backends eager')
if [[ -n $(git -C "$root" status --porcelain) ]]; then
    echo "note: the checkout has uncommitted changes; its HEAD is tested, without them"
fi
