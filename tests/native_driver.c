/* Runs every kernel over odd sizes and alignments, for tests/sanitize.sh. Values are the Python tests' business; here
 * memory is: each buffer is exactly as large as it must be, so that one byte too far is a report.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

static const int64_t lengths[] = {0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 511, 512, 513, 1023, 1025, 4099};
enum { LENGTHS = sizeof lengths / sizeof lengths[0], SEGMENTS = 3 };

static unsigned failures;

static void expect(bool condition, const char *what, int source, int out, int64_t count) {
    if (!condition) {
        fprintf(stderr, "%s: dtype %d to %d, %lld elements\n", what, source, out, (long long)count);
        failures++;
    }
}

static char *allocate(int64_t bytes) {
    char *memory = malloc((size_t)(bytes > 0 ? bytes : 1));
    if (!memory) {
        perror("malloc");
        exit(2);
    }
    return memory;
}

/* Every bit pattern turns up in the halves; NaN, infinities and subnormals in the floats. */
static void fill(char *memory, int64_t bytes, uint32_t seed) {
    for (int64_t i = 0; i < bytes; i++) {
        seed = seed * 1664525u + 1013904223u;
        memory[i] = (char)(seed >> 24);
    }
}

/* Three segments: `count` elements, none, and `count` again, after a gap of one in the flat buffer. */
static void round_trip(int from, int to, int64_t count, int shift, double scale) {
    int64_t bytes = count * mpidl_itemsize(from), flat_bytes = (2 * count + 1) * mpidl_itemsize(to);
    char *first = allocate(bytes + shift), *last = allocate(bytes + shift), *flat = allocate(flat_bytes + shift);
    fill(first, bytes + shift, 1u + (uint32_t)count);
    fill(last, bytes + shift, 2u + (uint32_t)count);
    memset(flat, 0x5a, (size_t)(flat_bytes + shift));
    const uintptr_t addresses[SEGMENTS] = {(uintptr_t)(first + shift), 0, (uintptr_t)(last + shift)};
    const int64_t counts[SEGMENTS] = {count, 0, count}, offsets[SEGMENTS] = {0, 0, count + 1};
    mpidl_packed packed;
    int status =
        mpidl_gather(SEGMENTS, addresses, counts, offsets, from, (uintptr_t)(flat + shift), to, scale, &packed);
    expect(status == MPIDL_OK && packed.count == 2 * count, "gather failed", from, to, count);
    const char *gap = flat + shift + count * mpidl_itemsize(to);
    for (int64_t i = 0; i < mpidl_itemsize(to); i++) {
        expect(gap[i] == 0x5a, "gather wrote into the gap", from, to, count);
    }
    char *before = allocate(bytes);
    memcpy(before, first + shift, (size_t)bytes);
    status = mpidl_scatter(SEGMENTS, addresses, counts, offsets, from, (uintptr_t)(flat + shift), to, scale, &packed);
    expect(status == MPIDL_OK && packed.count == 2 * count, "scatter failed", to, from, count);
    if (from == to && scale == 1.0) {
        expect(memcmp(before, first + shift, (size_t)bytes) == 0, "bytes changed", from, to, count);
    }
    free(before);
    free(first);
    free(last);
    free(flat);
}

/* A kernel alone, past the caches and not: neither one byte nor a partial sum may tell which it was. */
static void streamed_or_not(int from, int to, int64_t count, int shift, double scale) {
    int64_t bytes = count * mpidl_itemsize(from) + shift, out_bytes = count * mpidl_itemsize(to) + 8 - shift;
    char *source = allocate(bytes), *plain = allocate(out_bytes), *streamed = allocate(out_bytes);
    fill(source, bytes, 3u + (uint32_t)count);
    memset(plain, 0x5a, (size_t)out_bytes);
    memset(streamed, 0x5a, (size_t)out_bytes);
    double sums[2][MPIDL_LANES] = {{0}, {0}};
    mpidl_kernel *kernel = mpidl_find_kernel(from, to);
    kernel(source + shift, plain + 8 - shift, count, scale, false, sums[0]);
    kernel(source + shift, streamed + 8 - shift, count, scale, true, sums[1]);
    expect(memcmp(plain, streamed, (size_t)out_bytes) == 0, "streaming changed bytes", from, to, count);
    for (int i = 0; i < MPIDL_LANES; i++) {
        bool nan = isnan(sums[0][i]) && isnan(sums[1][i]);
        expect(nan || sums[0][i] == sums[1][i], "streaming changed a sum", from, to, count);
    }
    free(source);
    free(plain);
    free(streamed);
}

static void every_size(int from, int to) {
    for (int n = 0; n < LENGTHS; n++) {
        for (int shift = 0; shift < 9; shift++) {
            round_trip(from, to, lengths[n], shift, 1.0);
            streamed_or_not(from, to, lengths[n], shift, 1.0);
            if (!mpidl_is_integer(from)) {
                round_trip(from, to, lengths[n], shift, -0.3);
                streamed_or_not(from, to, lengths[n], shift, -0.3);
            }
        }
    }
}

static void refusals(void) {
    int64_t one = 1, minus = -1, huge = INT64_MAX, zero = 0;
    double x = 1, y = 2;
    uintptr_t from = (uintptr_t)&x, null = 0, to = (uintptr_t)&y;
    mpidl_packed packed;
    const int f64 = MPIDL_FLOAT64;
    expect(mpidl_gather(1, &from, &one, &zero, f64, to, MPIDL_DTYPES, 1, &packed) == MPIDL_BAD_DTYPE, "dtype", 1, 12,
           1);
    expect(mpidl_gather(1, &from, &one, &zero, -1, to, f64, 1, &packed) == MPIDL_BAD_DTYPE, "dtype", -1, 1, 1);
    expect(mpidl_gather(1, &from, &minus, &zero, f64, to, f64, 1, &packed) == MPIDL_BAD_COUNT, "count", 1, 1, -1);
    expect(mpidl_gather(1, &from, &one, &huge, f64, to, f64, 1, &packed) == MPIDL_BAD_COUNT, "offset", 1, 1, 1);
    expect(mpidl_gather(-1, &from, &one, &zero, f64, to, f64, 1, &packed) == MPIDL_BAD_COUNT, "segments", 1, 1, 1);
    expect(mpidl_gather(1, &null, &one, &zero, f64, to, f64, 1, &packed) == MPIDL_BAD_ADDRESS, "address", 1, 1, 1);
    expect(mpidl_gather(1, &from, NULL, &zero, f64, to, f64, 1, &packed) == MPIDL_BAD_ADDRESS, "counts", 1, 1, 1);
    expect(mpidl_gather(1, &from, &one, &zero, f64, to, f64, 1, NULL) == MPIDL_BAD_ADDRESS, "packed", 1, 1, 1);
    expect(mpidl_gather(1, &from, &one, &zero, f64, to, f64, 1 / 0.0, &packed) == MPIDL_BAD_SCALE, "scale", 1, 1, 1);
    expect(y == 2, "a refused call wrote", 1, 1, 1);
    expect(mpidl_use(-1) == MPIDL_BAD_INSTRUCTIONS, "instructions", 0, 0, 0);
    expect(mpidl_use(MPIDL_INSTRUCTION_SETS) == MPIDL_BAD_INSTRUCTIONS, "instructions", 0, 0, 0);
}

static int every_pair(void) {
    int pairs = 0;
    for (int from = 0; from < MPIDL_DTYPES; from++) {
        for (int to = 0; to < MPIDL_DTYPES; to++) {
            if (mpidl_find_kernel(from, to)) {
                every_size(from, to);
                pairs++;
            }
        }
    }
    return pairs;
}

int main(void) {
    static const char *const names[MPIDL_INSTRUCTION_SETS] = {"portable", "avx2", "avx512"};
    int pairs = 0;
    for (int set = 0; set < MPIDL_INSTRUCTION_SETS; set++) {
        if (mpidl_use(set) != MPIDL_OK) {
            printf("%s: this processor does not run it\n", names[set]);
            continue;
        }
        pairs = every_pair();
        printf("%s: %d pairs of dtypes, %d lengths, 9 alignments: %u failures\n", names[set], pairs, LENGTHS, failures);
    }
    refusals();
    return pairs == 0 || failures > 0;
}
