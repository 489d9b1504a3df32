/* Copying past the caches, for what nobody reads soon. */
#ifndef MPIDL_COPY_H
#define MPIDL_COPY_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* The two lie apart. Whoever is to see what was streamed must be told through a fence or an atomic exchange. */
static inline void mpidl_copy(char *restrict out, const char *restrict source, int64_t nbytes, bool streamed) {
#if defined(__SSE2__)
    if (streamed && nbytes >= 128) {
        int64_t head = (int64_t)(-(uintptr_t)out % 64);
        memcpy(out, source, (size_t)head);
        int64_t i = head;
        for (; i + 64 <= nbytes; i += 64) { /* a whole line at once: nothing has to be read of it */
            __m128i first = _mm_loadu_si128((const __m128i *)(source + i));
            __m128i second = _mm_loadu_si128((const __m128i *)(source + i + 16));
            __m128i third = _mm_loadu_si128((const __m128i *)(source + i + 32));
            __m128i fourth = _mm_loadu_si128((const __m128i *)(source + i + 48));
            _mm_stream_si128((__m128i *)(out + i), first);
            _mm_stream_si128((__m128i *)(out + i + 16), second);
            _mm_stream_si128((__m128i *)(out + i + 32), third);
            _mm_stream_si128((__m128i *)(out + i + 48), fourth);
        }
        memcpy(out + i, source + i, (size_t)(nbytes - i));
        return;
    }
#endif
    (void)streamed;
    if (nbytes > 0) {
        memcpy(out, source, (size_t)nbytes);
    }
}

#endif
