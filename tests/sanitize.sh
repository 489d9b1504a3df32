#!/bin/sh
# The C of csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer, with every instruction set that this processor
# runs, and AVX-512 on any; and with threads standing in for ranks under ThreadSanitizer too. At -O1, since instrumented
# loops are not vectorised anyway and -O3 compiles ten times longer.
# A report, a warning or a wrong result ends in a status other than 0.
set -eu
cd "$(dirname "$0")/.."

CC=${CC:-gcc}
command -v "${CC%% *}" >/dev/null || {
    echo "sanitize.sh needs a C compiler with its sanitizers: apt-get install gcc libc6-dev" >&2
    exit 2
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1

FLAGS="-std=gnu11 -O1 -g -Wall -Wextra -Werror -ffp-contract=off -fno-trapping-math -fno-math-errno -pthread"
MEMORY="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
THREAD="-fsanitize=thread -fno-sanitize-recover=all"
KERNELS=$(echo csrc/kernels/*.c)
NODE="csrc/node/progress_thread.c csrc/node/schedule.c csrc/packing/gather_range.c csrc/node/phases.c csrc/node/store_policy.c"

# Each source is compiled once for each set of flags; its object is named after it, in the folder of that set.
compile() { # compile SET "FLAGS" SOURCE...: notes the commands
    set_=$1 flags=$2
    shift 2
    mkdir -p "$folder/$set_"
    for source; do
        case $source in *.cu) language="-x c" ;; *) language="" ;; esac
        echo "$CC $FLAGS $flags -Icsrc -c $language $source -o $folder/$set_/$(basename "$source").o"
    done >> "$folder/commands"
}

run() { # run SET "FLAGS" SOURCE...: links the objects of these sources and runs the program
    set_=$1 flags=$2
    shift 2
    objects=
    for source; do objects="$objects $folder/$set_/$(basename "$source").o"; done
    # CC, the flags and the objects are lists of words.
    # shellcheck disable=SC2086
    $CC -pthread $flags -o "$folder/driver" $objects
    "$folder/driver"
}

# The kernels' names are a list of words, here and below.
# shellcheck disable=SC2086
{
    compile memory "$MEMORY" $KERNELS tests/native_driver.c csrc/packing/packing.c
    compile thread "$THREAD" $KERNELS
    # SIMDe lets signed integers wrap; ours are held to not doing so by the set `memory`.
    [ ! -e /usr/include/simde/x86/avx512.h ] ||
        compile simde "$MEMORY -fwrapv -Wno-psabi -Itests/avx512 -include tests/avx512/supported.h" \
            $KERNELS tests/native_driver.c csrc/packing/packing.c
    for set in memory thread; do
        [ "$set" = memory ] && flags=$MEMORY || flags=$THREAD
        compile "$set" "$flags" tests/center_driver.c csrc/center/center.c tests/node_driver.c $NODE
    done
    # A folder of its own: CUDA's packing.cu and its driver stand beside files of the same names.
    compile host "$MEMORY -Itests/cuda_host" \
        tests/cuda_host/driver.c tests/cuda_host/runtime.c csrc/cuda/memory.c csrc/cuda/packing.cu
}
xargs -P "$(nproc)" -d '\n' -I '{}' sh -c '{}' < "$folder/commands"

# shellcheck disable=SC2086
{
    run memory "$MEMORY" tests/native_driver.c $KERNELS csrc/packing/packing.c
    if [ -d "$folder/simde" ]; then
        echo "again, with AVX-512 in plain C:"
        run simde "$MEMORY" tests/native_driver.c $KERNELS csrc/packing/packing.c
    else
        echo "skipped: AVX-512 in plain C needs SIMDe: apt-get install libsimde-dev"
    fi
    printf "the device's kernels, on the host: "
    run host "$MEMORY" tests/cuda_host/driver.c tests/cuda_host/runtime.c csrc/cuda/memory.c csrc/cuda/packing.cu
    for set in thread memory; do
        [ "$set" = memory ] && flags=$MEMORY || flags=$THREAD
        printf '%s: ' "$set"
        run "$set" "$flags" tests/center_driver.c csrc/center/center.c $KERNELS
        printf '%s: ' "$set"
        run "$set" "$flags" tests/node_driver.c $KERNELS $NODE
    done
}
