#!/usr/bin/env bash
# Builds the extension module with AddressSanitizer and UndefinedBehaviorSanitizer, and runs the native backend's tests
# with it: bash csrc/sanitize.sh [pytest arguments; default: tests/native].
# PYTHON is an interpreter with the test extra and pip (default: python); CXX is a GCC (default: g++).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
export CXX=${CXX:-g++}
work=$(mktemp -d "${TMPDIR:-/tmp}/llm-trm-sanitize.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Python itself is built without sanitizers, so the runtime must be preloaded, and also libstdc++, whose exceptions the
# runtime wraps at start-up.
preload=
for library in libasan.so libstdc++.so; do
    path=$("$CXX" -print-file-name="$library")
    if [[ $path != /* ]]; then
        echo "$CXX has no $library" >&2
        exit 1
    fi
    preload+=${preload:+:}$(readlink -f "$path")
done

# Optimised, because the tests would take too long otherwise, and with source lines in reports.
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
if ! "$python" -m pip install --quiet --no-deps --no-compile --target "$work/tree" "$root" \
    --config-settings=cmake.build-type=RelWithDebInfo \
    --config-settings=cmake.define.CMAKE_CXX_FLAGS="$flags" \
    --config-settings=cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1"; then
    exit 1
fi
if ! grep -q __asan_init "$work"/tree/trm_kernels/_native*.so; then
    echo "the module was not built with the sanitizers" >&2
    exit 1
fi
cp -r "$root/tests" "$root/bench" "$root/csrc" "$root/pyproject.toml" "$root/CMakeLists.txt" "$work/tree"

# A separate environment that sees the packages of $python but ignores its .pth files: an editable install of the
# package would take precedence over the one just built.
"$python" -m venv --without-pip "$work/venv"
packages=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
{
    echo "$work/tree"
    "$python" -c 'import sysconfig; print(*dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))), sep="\n")'
} >"$packages/tree.pth"

cd "$work/tree"
if (($# == 0)); then set -- tests/native; fi
# Python and torch keep memory until the process exits, which is not a leak. A report ends the process, and pytest's
# default capture of standard error would lose it.
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$work/venv/bin/python" -m pytest -p no:cacheprovider --capture=sys "$@"
