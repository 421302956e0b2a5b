/* Steps by AVX512: layouts, rounding, GELU, exponentials, norms.
 *
 * Before it includes this, a source defines TARGET, the instructions that its functions may use,
 * and HAS_AVX512_BF16 if those are among them.
 */

#ifndef BGE_AVX512_H
#define BGE_AVX512_H

#include <immintrin.h>
#include <math.h>

#include "shared.h"

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,fma"
#define AVX512_VNNI AVX512 ",avx512vnni"
#define AVX512_BF16 AVX512 ",avx512bf16"
#define AMX AVX512 ",avx512bf16,amx-tile,amx-bf16,amx-int8"
#define KERNEL __attribute__((target(TARGET)))
#define INLINE KERNEL static inline __attribute__((always_inline))

/* Lays out rows of states as a left operand of `width` tiles side by side; rows up to the next
 * multiple of 32 become zeros. */
INLINE void to_left(const bf16 *states, long stride, long rows, long width, bf16 *tiles) {
    const long filled = (rows + 31) / 32 * 32;
    for (long r = 0; r < filled; r++) {
        bf16 *out = left_row(tiles, width, r);
        for (long k = 0; k < width; k++)
            _mm512_store_si512(out + k * TILE,
                               r < rows ? _mm512_loadu_si512(states + r * stride + k * 32)
                                        : _mm512_setzero_si512());
    }
}

/* Transposes 16 rows of 16 numbers of 32 bits. */
INLINE void transpose(__m512i *v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Lays out rows, each with the weights of one output, as a right operand; rows up to the next
 * multiple of 32 become zeros. `width` is a row's length in tiles. */
INLINE void to_right(const bf16 *from, long stride, long rows, long width, bf16 *tiles) {
    for (long group = 0; group < (rows + 31) / 32 * 2; group++)
        for (long k = 0; k < width; k++) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) {
                const long r = group * 16 + i;
                v[i] = r < rows ? _mm512_loadu_si512(from + r * stride + k * 32)
                                : _mm512_setzero_si512();
            }
            transpose(v);
            bf16 *out = tiles + ((group / 2 * width + k) * 2 + group % 2) * TILE;
            for (int i = 0; i < 16; i++) _mm512_store_si512(out + i * 32, v[i]);
        }
}

INLINE void load(const bf16 *from, __m512 *low, __m512 *high) {
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i l = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i h = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    *low = _mm512_castsi512_ps(_mm512_slli_epi32(l, 16));
    *high = _mm512_castsi512_ps(_mm512_slli_epi32(h, 16));
}

#ifdef HAS_AVX512_BF16
INLINE void store(bf16 *to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#else
/* Rounded to the nearest, and between two to the even one; not a number stays so. */
INLINE __m256i rounded(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i top = _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(top, 16));
}

INLINE void store(bf16 *to, __m512 low, __m512 high) {
    _mm256_storeu_si256((__m256i *)to, rounded(low));
    _mm256_storeu_si256((__m256i *)(to + 16), rounded(high));
}
#endif

/* Widens a row. */
INLINE void load_row(const bf16 *from, long count, float *row) {
    for (long j = 0; j < count; j += 32) {
        __m512 low, high;
        load(from + j, &low, &high);
        _mm512_store_ps(row + j, low);
        _mm512_store_ps(row + j + 16, high);
    }
}

/* GELU: x times the normal distribution's share below x. Between -4.5 and 4.5 that share is half
 * plus x times a polynomial in x squared, fitted by linear programming, off by 3e-5 at most after
 * the multiplication, a hundredth of what rounding to bfloat16 does to the largest of them. Not a
 * number stays so. */
INLINE __m512 gelu(__m512 x) {
    const __m512 edge = _mm512_set1_ps(4.5f), least = _mm512_set1_ps(-4.5f);
    const __m512 c = _mm512_min_ps(_mm512_max_ps(x, least), edge);
    const __m512 t =
        _mm512_fmsub_ps(_mm512_mul_ps(c, c), _mm512_set1_ps(2 / (4.5f * 4.5f)), _mm512_set1_ps(1));
    static const float factors[] = {
        0.15690529346466064f,    -0.07718338817358017f, 0.054671913385391235f,
        -0.04029560461640358f,   0.028623398393392563f, -0.01815963350236416f,
        0.010141915641725063f,   -0.00668290164321661f, 0.004654256161302328f,
        -0.0015652513829991221f,
    };
    __m512 p = _mm512_set1_ps(factors[9]);
    for (int i = 8; i >= 0; i--) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(factors[i]));
    const __mmask16 kept = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    return _mm512_maskz_mul_ps(kept, x, _mm512_fmadd_ps(c, p, _mm512_set1_ps(0.5f)));
}

/* 2 to the power of x <= 0, off by 3e-6 of it; fitted likewise. */
INLINE __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126), x);
    /* Less the integer below, by which _mm512_scalef_ps() multiplies. */
    const __m512 rest = _mm512_reduce_ps(x, 9);
    static const float factors[] = {
        1.0000026226043701f,   0.6930038332939148f,   0.2414427548646927f,
        0.052011460065841675f, 0.013534167781472206f,
    };
    __m512 p = _mm512_set1_ps(factors[4]);
    for (int i = 3; i >= 0; i--) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(p, x);
}

/* Takes a row's sums of the 32 outputs of a panel, in float32 or as integers. */
typedef void take_sums(const void *what, long row, __m512i low, __m512i high);

struct norm {
    const float *weight, *bias;
};

/* Norms a row of numbers in place, given their sum, and rounds it; 32 rounded numbers lie `apart`
 * from those before. */
INLINE void norm_row(float *row, long hidden, __m512 sum, const struct norm *norm, float epsilon,
                     bf16 *out, long apart) {
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / hidden);
    __m512 low = _mm512_setzero_ps(), high = low;
    for (long j = 0; j < hidden; j += 32) {
        const __m512 l = _mm512_sub_ps(_mm512_load_ps(row + j), mean);
        const __m512 h = _mm512_sub_ps(_mm512_load_ps(row + j + 16), mean);
        low = _mm512_fmadd_ps(l, l, low);
        high = _mm512_fmadd_ps(h, h, high);
    }
    const float variance = _mm512_reduce_add_ps(_mm512_add_ps(low, high)) / hidden;
    const __m512 scale = _mm512_set1_ps(1 / sqrtf(variance + epsilon));
    for (long j = 0; j < hidden; j += 32, out += apart) {
        __m512 v[2];
        for (int i = 0; i < 2; i++) {
            const long at = j + 16 * i;
            v[i] = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(row + at), mean), scale);
            v[i] = _mm512_fmadd_ps(v[i], _mm512_loadu_ps(norm->weight + at),
                                   _mm512_loadu_ps(norm->bias + at));
            _mm512_store_ps(row + at, v[i]);
        }
        store(out, v[0], v[1]);
    }
}

#endif
