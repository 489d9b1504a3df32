/* Copying, in the caches or past them.
 *
 * Not by memcpy: for some hundred kilobytes the C library moves bytes by one instruction (`rep movsb`), which on Zen 3
 * takes six times as long when the destination begins a little further into its page than the source does. Measured
 * with a ring that begins at a page and arrays that begin 16 bytes behind one, as those of malloc do.
 */
#ifndef MPIDL_COPY_H
#define MPIDL_COPY_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>

/* A cache line; streamed, it must be one of `out`'s own, so that nothing has to be read of it. */
static inline void copy_line(char *restrict out, const char *restrict source, bool streamed) {
    __m128i parts[4];
    for (int i = 0; i < 4; i++) {
        parts[i] = _mm_loadu_si128((const __m128i *)source + i);
    }
    for (int i = 0; i < 4; i++) {
        if (streamed) {
            _mm_stream_si128((__m128i *)out + i, parts[i]);
        } else {
            _mm_storeu_si128((__m128i *)out + i, parts[i]);
        }
    }
}

static inline int64_t copy_lines(char *restrict out, const char *restrict source, int64_t nbytes, bool streamed) {
    int64_t done = 0;
    for (; done + 64 <= nbytes; done += 64) {
        copy_line(out + done, source + done, streamed);
    }
    return done;
}
#else
static inline int64_t copy_lines(char *restrict out, const char *restrict source, int64_t nbytes, bool streamed) {
    (void)out, (void)source, (void)nbytes, (void)streamed;
    return 0;
}
#endif

/* The two lie apart. `streamed`: past the caches, for what nobody reads soon; whoever is to see it must then be told
 * through a fence or an atomic exchange.
 */
static inline void mpidl_copy(char *restrict out, const char *restrict source, int64_t nbytes, bool streamed) {
    int64_t head = (int64_t)(-(uintptr_t)out % 64);
    if (nbytes < head + 128) {
        if (nbytes > 0) {
            memcpy(out, source, (size_t)nbytes);
        }
        return;
    }
    memcpy(out, source, (size_t)head);
    int64_t left = nbytes - head;
    int64_t done = streamed ? copy_lines(out + head, source + head, left, true)
                            : copy_lines(out + head, source + head, left, false);
    memcpy(out + head + done, source + head + done, (size_t)(left - done));
}

#endif
