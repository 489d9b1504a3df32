#!/usr/bin/env bash
# One command from a fresh machine to two trained models: with 2 ranks by allreduce, with 4 ranks through the one-sided
# parameter server. Needs Debian's python3, python3-venv and gcc; root or not; no MPI. Made to be run again at will.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: jobs/quickstart.sh [--torch-index URL] [--epochs N] [--output DIR]
       jobs/quickstart.sh --check

Installs mpidl with an MPI from PyPI into the active virtual environment (.venv is made if none is active), trains
jobs/digits.py with 2 ranks synchronously and with 4 ranks by AGN, and prints a table. It succeeds only if both reach
0.95 held-out accuracy.

  --torch-index URL   a further package index for torch, such as PyTorch's index of CPU builds, whose address
                      pytorch.org gives under "Get started" (or set MPIDL_TORCH_INDEX). pip's own settings are honoured too.
  --epochs N          epochs of each training (default 25)
  --check             only look whether Debian's packages are there, and name those that are missing
  --output DIR        where the two runs are written (default runs/quickstart)
TEXT
}

torch_index=${MPIDL_TORCH_INDEX:-}
epochs=25
check_only=
output=runs/quickstart
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --check) check_only=yes; shift ;;
        --torch-index | --epochs | --output)
            [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
            case $1 in
                --torch-index) torch_index=$2 ;;
                --epochs) epochs=$2 ;;
                --output) output=$2 ;;
            esac
            shift 2 ;;
        *) echo "unknown argument: $1; see --help" >&2; exit 2 ;;
    esac
done
# A relative --output is meant from where the user stands.
case $output in runs/quickstart | /*) ;; *) output=$PWD/$output ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

# Without this trap bash would go on with the next step after a Ctrl-C that the step itself has handled.
trap 'echo; echo "quickstart: interrupted"; exit 130' INT TERM

# ------------------------------------------------------------------------------------------------ what Debian must give
missing=()
command -v python3 > /dev/null || missing+=(python3)
# Debian keeps ensurepip, which venv needs, in python3-venv.
python3 -c 'import ensurepip, venv' > /dev/null 2>&1 || missing+=(python3-venv)
# gcc without the C library's headers, which Debian only recommends, cannot build the extension either.
compiles() { echo '#include <stdio.h>' | gcc -x c -fsyntax-only - > /dev/null 2>&1; }
if ! command -v gcc > /dev/null; then
    missing+=(gcc)
elif ! compiles; then
    missing+=(libc6-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
    as_root=$([ "$(id -u)" -eq 0 ] || echo "sudo ")
    echo "missing on this machine: ${missing[*]}. Please run:" >&2
    echo "    ${as_root}apt-get install -y ${missing[*]}" >&2
    exit 1
fi
[ -z "$check_only" ] || exit 0

# ----------------------------------------------------------------------------------------------- a virtual environment
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/pip ] || { say "making the virtual environment .venv"; python3 -m venv .venv; }
    VIRTUAL_ENV=$PWD/.venv
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
fi
python=$VIRTUAL_ENV/bin/python
pip=("$python" -m pip --disable-pip-version-check)
index=()
[ -z "$torch_index" ] || index=(--extra-index-url "$torch_index")

# ------------------------------------------------------------------------------ which torch, before it is downloaded
# pip resolves from the metadata that an index offers beside the file and downloads nothing large for it.
say "looking up torch"
report=$(mktemp)
trap 'rm -f "$report"' EXIT
"${pip[@]}" install --quiet --dry-run --report "$report" -c jobs/constraints.txt "${index[@]}" torch
"$python" jobs/quickstart.py torch "$report"

# -------------------------------------------------------------------------------------------------------- installation
say "installing mpidl, with MPICH and scikit-learn, into $VIRTUAL_ENV"
quiet=(--quiet)
[ ! -t 1 ] || quiet=() # on a terminal pip shows how far the downloads are
rm -rf build # left by an earlier run; setuptools would pack files that are no longer in the source
"${pip[@]}" install "${quiet[@]}" -c jobs/constraints.txt "${index[@]}" '.[mpich,jobs]'

# ------------------------------------------------------------------------------------------------------------ training
train() { # ranks, algorithm
    say "training jobs/digits.py with $1 ranks, $2"
    "$VIRTUAL_ENV/bin/mpidl" run -n "$1" -- "$VIRTUAL_ENV/bin/mpidl" train jobs/digits.py \
        --algorithm "$2" --epochs "$epochs" --output "$output/$2" --overwrite
}
began=$SECONDS
train 2 synchronous
train 4 agn

say "trained in $((SECONDS - began)) s; held-out accuracy of at least 0.95 is asked for"
"$python" jobs/quickstart.py table 0.95 "$output/synchronous" "$output/agn"
