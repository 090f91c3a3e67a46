#!/bin/sh
# Names what this machine lacks to build epi-kernels, with the line that installs it, before
# anything is created.   usage: sh tools/preflight.sh [python] [folder to install into]
# Exit status: 0 nothing is missing, 1 something is (all of it is listed, not just the first).
PYTHON=${1:-python3}
TARGET=${2:-.}
MIN_DISK_MB=3500     # a CPU torch and the rest: 1.9 GB installed, as much again while unpacking
CUDA_DISK_MB=12000   # torch with CUDA and its libraries: 6 GB installed
missing=0

# report <what> <debian> <fedora> <macos>: the line for this system, or all three
report() {
    missing=$((missing + 1))
    printf 'preflight: missing: %s\n' "$1" >&2
    system=$(uname -s 2>/dev/null)
    if [ "$system" = Darwin ]; then
        printf '    install it with:  %s\n' "$4" >&2
    elif command -v apt-get >/dev/null 2>&1; then
        printf '    install it with:  %s\n' "$2" >&2
    elif command -v dnf >/dev/null 2>&1; then
        printf '    install it with:  %s\n' "$3" >&2
    else
        printf '    Debian, Ubuntu:   %s\n    Fedora:           %s\n    macOS:            %s\n' \
            "$2" "$3" "$4" >&2
    fi
}

if ! command -v "$PYTHON" >/dev/null 2>&1; then
    report "Python 3.10 or newer (no '$PYTHON' on PATH; another one: make PYTHON=/path/to/python3)" \
        "sudo apt-get install python3 python3-venv python3-dev" \
        "sudo dnf install python3 python3-devel" "brew install python"
    python_works=no
elif ! version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' 2>/dev/null); then
    report "Python 3.10 or newer ('$PYTHON' is ${version:-not working}; another one: make PYTHON=/path/to/python3)" \
        "sudo apt-get install python3 python3-venv python3-dev" \
        "sudo dnf install python3 python3-devel" "brew install python"
    python_works=no
else
    python_works=yes
fi

compiler=${CXX:-}
if [ "$python_works" = yes ]; then
    if ! "$PYTHON" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        report "Python's venv module (with ensurepip)" \
            "sudo apt-get install python$version-venv" "sudo dnf install python3" \
            "brew install python"
    fi
    if ! "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' >/dev/null 2>&1; then
        report "Python's C headers (Python.h of Python $version)" \
            "sudo apt-get install python$version-dev" "sudo dnf install python3-devel" \
            "brew install python"
    fi
    # The same order as choose_cxx in build_support.py.
    [ -n "$compiler" ] || compiler=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("CXX") or "")' 2>/dev/null)
fi

if [ -z "${CXX:-}" ]; then
    for candidate in "$compiler" c++ g++ clang++; do
        # ${candidate%% *}: Python may name its compiler with flags
        if [ -n "$candidate" ] && command -v "${candidate%% *}" >/dev/null 2>&1; then
            compiler=$candidate
            break
        fi
        compiler=
    done
fi
# It must do C++20, header files of the standard library included.
if [ -n "$compiler" ]; then
    probe=$(printf '#include <bit>\n#include <optional>\nint main() { return std::has_single_bit(4u) ? 0 : 1; }\n' |
        $compiler -std=c++20 -x c++ -fsyntax-only - 2>&1) || {
        report "a working C++20 compiler ('$compiler' failed: $(printf '%s' "$probe" | head -n 1))" \
            "sudo apt-get install g++" "sudo dnf install gcc-c++" "xcode-select --install"
    }
else
    report "a C++ compiler" \
        "sudo apt-get install g++" "sudo dnf install gcc-c++" "xcode-select --install"
fi

while [ ! -d "$TARGET" ] && [ "$TARGET" != "${TARGET%/*}" ]; do
    TARGET=${TARGET%/*} # the folder itself may not exist yet
done
free_mb=$(df -Pk "${TARGET:-/}" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }')
if [ -n "$free_mb" ]; then
    if [ "$free_mb" -lt "$MIN_DISK_MB" ]; then
        report "disk space: $free_mb MB free where $MIN_DISK_MB MB are needed" \
            "free some, or make VENV=/elsewhere/venv" "free some, or make VENV=/elsewhere/venv" \
            "free some, or make VENV=/elsewhere/venv"
    elif [ "$free_mb" -lt "$CUDA_DISK_MB" ] && [ -z "${TORCH_INDEX:-}" ] && [ "$(uname -s)" = Linux ]; then
        printf 'preflight: note: %s MB free; a torch with CUDA needs about %s MB. Without a GPU, set TORCH_INDEX to an index of CPU builds (README).\n' \
            "$free_mb" "$CUDA_DISK_MB" >&2
    fi
fi

if [ "$missing" -gt 0 ]; then
    printf 'preflight: %s missing; nothing was created. Run the same command again once installed.\n' "$missing" >&2
    exit 1
fi
