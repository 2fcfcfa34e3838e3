# Sourced by scripts/demo and scripts/test: makes .venv with this checkout and the extras in $1, at the versions of
# constraints.txt, unless it is there already. Sets $root and $venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

find_python() {
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "safelora-gguf is tested with Python 3.11 to 3.13, and none of these was found on the PATH" >&2
    return 1
}

marker="$venv/.installed-$1"
wanted=$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)
if [ "$(cat "$marker" 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    echo "setting up $venv (llama-cpp-python compiles for some minutes the first time) ..." >&2
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/scripts/constraints.txt" --editable "$root[$1]"
    echo "$wanted" >"$marker"
fi
