/* Runs every kernel of the device over odd sizes and alignments, for tests/sanitize.sh: each buffer is exactly as large
 * as it must be, so that a word read or written beyond it is a report. Values are the Python tests' business.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_runtime_api.h"
#include "include/mpidl_cuda.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, nbytes) ((void)(memory), (void)(nbytes))
#endif

void cuda_host_finish(cudaStream_t stream);

static const int64_t lengths[] = {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 47, 64, 65, 127, 511, 4099};
static const int sizes[MPIDL_DTYPES] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8};
enum { LENGTHS = sizeof lengths / sizeof lengths[0], SEGMENTS = 3 };

static unsigned failures;

static void expect(int status, int wanted, const char *what) {
    if (status != wanted) {
        fprintf(stderr, "%s: status %d, not %d\n", what, status, wanted);
        failures++;
    }
}

/* `count` elements, none, and `count` again, without a gap. Returns whether the pair has a kernel. */
static int round_trip(int from, int to, int64_t count, int shift, int flat_shift) {
    size_t bytes = (size_t)(count * sizes[from]), flat_bytes = (size_t)(2 * count * sizes[to]);
    char *first = calloc(bytes + (size_t)shift, 1), *last = calloc(bytes + 3, 1);
    char *flat = calloc(flat_bytes + (size_t)flat_shift, 1);
    /* What lies before the data belongs to somebody else too; the sanitizer sees that in steps of 8 bytes. */
    ASAN_POISON_MEMORY_REGION(first, (size_t)shift / 8 * 8);
    ASAN_POISON_MEMORY_REGION(flat, (size_t)flat_shift / 8 * 8);
    const uintptr_t addresses[SEGMENTS] = {(uintptr_t)(first + shift), 0, (uintptr_t)(last + 3)};
    const int64_t counts[SEGMENTS] = {count, 0, count}, offsets[SEGMENTS] = {0, 0, count};
    mpidl_cuda_table *table = NULL;
    expect(mpidl_cuda_table_make(0, SEGMENTS, counts, offsets, &table), MPIDL_OK, "table_make");
    int64_t ticket = -1;
    uintptr_t at = (uintptr_t)(flat + flat_shift);
    int status = mpidl_cuda_gather(table, addresses, from, at, to, 1.0, 0, &ticket);
    if (status == MPIDL_OK) {
        mpidl_packed packed = {0, 0, 0};
        expect(mpidl_cuda_result(table, ticket, &packed), MPIDL_OK, "result");
        expect((int)packed.count, (int)(2 * count), "count");
        expect(mpidl_cuda_scatter(table, addresses, from, at, to, 1.0, 0, &ticket), MPIDL_OK, "scatter");
        cuda_host_finish(NULL);
    }
    expect(mpidl_cuda_table_free(table), MPIDL_OK, "table_free");
    free(first);
    free(last);
    free(flat);
    return status == MPIDL_OK;
}

int main(void) {
    int pairs = 0;
    for (int from = 0; from < MPIDL_DTYPES; from++) {
        for (int to = 0; to < MPIDL_DTYPES; to++) {
            int known = 0;
            for (int n = 0; n < LENGTHS; n++) {
                for (int shift = 0; shift < 16 && (n + shift == 0 || known); shift++) {
                    known = round_trip(from, to, lengths[n], shift, 0) && round_trip(from, to, lengths[n], 0, shift);
                }
            }
            pairs += known;
        }
    }
    printf("%d pairs of dtypes, %d lengths, 2 x 16 alignments: %u failures\n", pairs, LENGTHS, failures);
    return pairs == 0 || failures > 0;
}
