#!/usr/bin/env bash
# Builds mpidl's wheel for every Linux from glibc 2.17 on, has auditwheel check and tag it, and tries it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: packaging/wheel.sh [--python PYTHON] [--output DIR] [-- PYTHON ...]

Builds the wheel with PYTHON (default python3), into which `pip install '.[wheel]'` has put build, auditwheel and zig, and
writes DIR/mpidl-*-manylinux*.whl (default DIR: dist). zig's C compiler links for glibc 2.17 whatever this machine's is;
CC names another compiler, and auditwheel then says which glibc its wheel needs. MPIDL_GLIBC names another version.
Each further PYTHON is the interpreter of an environment that has numpy and cffi: the wheel is installed there, with a PATH
on which there is no compiler, and tried.
TEXT
}

python=python3
output=dist
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --python | --output)
            [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
            case $1 in --python) python=$2 ;; --output) output=$2 ;; esac
            shift 2 ;;
        --) shift; break ;;
        *) echo "unknown argument: $1; see --help" >&2; exit 2 ;;
    esac
done
python=$(command -v "$python")
output=$(realpath -m "$output")
interpreters=()
for interpreter in "$@"; do interpreters+=("$(realpath -s "$interpreter")"); done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export CC=${CC:-$python -m ziglang cc -target $(uname -m)-linux-gnu.${MPIDL_GLIBC:-2.17}}
export MPIDL_CUDA=0 # nvcc's C++ compiler links for this machine's glibc
rm -rf build        # left by an earlier build; setuptools would pack files that are no longer in the source
"$python" -m build --wheel --no-isolation --outdir "$folder" . > "$folder/log" 2>&1 || { tail -n 30 "$folder/log"; exit 1; }
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --wheel-dir "$folder/repaired" "$folder"/mpidl-*.whl
mkdir -p "$output"
wheel=$output/$(cd "$folder/repaired" && echo mpidl-*.whl)
mv "$folder"/repaired/mpidl-*.whl "$wheel"
echo "wrote $wheel"

for interpreter in "${interpreters[@]}"; do
    PATH=$folder "$interpreter" -m pip --disable-pip-version-check --quiet install --no-deps --force-reinstall "$wheel"
    (cd "$folder" && PATH=$folder "$interpreter" "$OLDPWD/packaging/try_wheel.py")
done
