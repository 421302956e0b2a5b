/* Products by AVX512-VNNI and AVX512-BF16, which read operands as tiles are laid out. */

#ifndef BGE_PRODUCTS_H
#define BGE_PRODUCTS_H

#include <string.h>

#include "avx512.h"

enum {
    ROWS = 8 /* that are multiplied at a time: their sums and a panel's weights fit registers */
};

/* Adds products of 4 bytes of states and of weights to each of 16 sums. Not by the intrinsics, for
 * which GCC 12 copies the sums. */
INLINE __m512i add_products(enum kind kind, __m512i sums, __m512i states, __m512i weights) {
    if (kind == BFLOAT16)
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(states), "v"(weights));
    else
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(states), "v"(weights));
    return sums;
}

/* Multiplies 8 rows of a left operand with a panel's part; the sums stay in registers. */
INLINE void multiply_rows(enum kind kind, const bf16 *states, const bf16 *panel, long depth,
                          __m512i sums[ROWS][2]) {
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (long k = 0; k < depth; k++, states += TILE, panel += 2 * TILE)
        for (int part = 0; part < 16; part++) {
            const __m512i low = _mm512_load_si512(panel + part * 32);
            const __m512i high = _mm512_load_si512(panel + TILE + part * 32);
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, states + r * 32 + part * 2, sizeof four);
                const __m512i given = _mm512_set1_epi32(four);
                sums[r][0] = add_products(kind, sums[r][0], given, low);
                sums[r][1] = add_products(kind, sums[r][1], given, high);
            }
        }
}

#endif
