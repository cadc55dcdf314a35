/* netproto/zero.c - is this page all zeros?
 *
 * Most pages that are not zero differ in their first words, so those are looked
 * at first; a page that is zero is read in full, at memory speed. */
#include "netproto/netproto.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static bool zero_avx2(const uint8_t *p, size_t n)
{
    for (; n >= 256; p += 256, n -= 256) {
        const __m256i *v = (const __m256i *)(const void *)p;
        __m256i a = _mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
        __m256i b = _mm256_or_si256(_mm256_loadu_si256(v + 2), _mm256_loadu_si256(v + 3));
        __m256i c = _mm256_or_si256(_mm256_loadu_si256(v + 4), _mm256_loadu_si256(v + 5));
        __m256i d = _mm256_or_si256(_mm256_loadu_si256(v + 6), _mm256_loadu_si256(v + 7));
        a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if (!_mm256_testz_si256(a, a))
            return false;
    }
    for (; n > 0; p += 64, n -= 64) {
        const __m256i *v = (const __m256i *)(const void *)p;
        __m256i a = _mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
        if (!_mm256_testz_si256(a, a))
            return false;
    }
    return true;
}
#endif

static bool zero_words(const uint8_t *p, size_t n)
{
    for (; n > 0; p += 64, n -= 64) {
        uint64_t w[8];
        memcpy(w, p, sizeof(w));
        if (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7])
            return false;
    }
    return true;
}

bool lb_is_zero(const void *p, size_t n_bytes)
{
    if (n_bytes == 0)
        return true;
    if (!zero_words(p, 64))
        return false;
    const uint8_t *rest = (const uint8_t *)p + 64;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return zero_avx2(rest, n_bytes - 64);
#endif
    return zero_words(rest, n_bytes - 64);
}
