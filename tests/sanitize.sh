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

build() { # build SOURCE...: and run what it makes
    build_with address,undefined,float-cast-overflow "$@"
}

build_with() { # build_with SANITIZERS SOURCE...
    sanitizers=$1
    shift
    # CC may hold a command with arguments.
    # shellcheck disable=SC2086
    $CC -std=gnu11 -O1 -g -Wall -Wextra -Werror -ffp-contract=off -fno-trapping-math -fno-math-errno -pthread \
        "-fsanitize=$sanitizers" -fno-sanitize-recover=all -Icsrc -o "$folder/driver" "$@"
    "$folder/driver"
}

build tests/native_driver.c csrc/kernels/*.c csrc/packing/packing.c
if [ -e /usr/include/simde/x86/avx512.h ]; then
    echo "again, with AVX-512 in plain C:"
    # SIMDe lets signed integers wrap; ours were held to not doing so above.
    build -fwrapv -Wno-psabi -Itests/avx512 -include tests/avx512/supported.h \
        tests/native_driver.c csrc/kernels/*.c csrc/packing/packing.c
else
    echo "skipped: AVX-512 in plain C needs SIMDe: apt-get install libsimde-dev"
fi
printf "the device's kernels, on the host: "
build -Itests/cuda_host tests/cuda_host/driver.c tests/cuda_host/runtime.c csrc/cuda/memory.c -x c csrc/cuda/packing.cu
for sanitizers in thread address,undefined; do
    printf '%s: ' "$sanitizers"
    build_with "$sanitizers" tests/center_driver.c csrc/center/center.c csrc/kernels/*.c
    printf '%s: ' "$sanitizers"
    build_with "$sanitizers" tests/node_driver.c csrc/kernels/*.c \
        csrc/node/progress_thread.c csrc/node/schedule.c csrc/packing/gather_range.c csrc/node/phases.c csrc/node/store_policy.c
done
