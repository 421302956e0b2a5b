/* Stands in for the AMX instructions, so that the sources for them run on any CPU with AVX512.
 *
 * Given to the compiler by `-include`, ahead of the sources. Each thread has eight tiles in memory.
 * Products are summed in another order than by the hardware, in float32 likewise. A tile that is
 * used outside of begin_tiles() and end_tiles(), where the hardware faults, ends the process. Tiles
 * start as NaN, which the hardware has as zeros, so that nothing can rely on either.
 */

#ifndef BGE_TILE_EMULATION_H
#define BGE_TILE_EMULATION_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BGE_TILES_EMULATED

static _Thread_local struct {
    int ready;
    uint8_t tiles[8][16][64] __attribute__((aligned(64)));
} emulated;

static inline void emulated_configure(void) {
    emulated.ready = 1;
    memset(emulated.tiles, 0xff, sizeof emulated.tiles);
}

static inline void emulated_release(void) { emulated.ready = 0; }

static inline void emulated_check(void) {
    if (!emulated.ready) abort();
}

static inline void emulated_zero(int tile) {
    emulated_check();
    memset(emulated.tiles[tile], 0, sizeof emulated.tiles[tile]);
}

static inline void emulated_load(int tile, const void *from, long stride) {
    emulated_check();
    for (int row = 0; row < 16; row++)
        memcpy(emulated.tiles[tile][row], (const char *)from + row * stride, 64);
}

static inline void emulated_store(int tile, void *to, long stride) {
    emulated_check();
    for (int row = 0; row < 16; row++)
        memcpy((char *)to + row * stride, emulated.tiles[tile][row], 64);
}

/* The numbers in the upper or lower halves of 16 pairs. */
#define EMULATED_HALF(pairs, upper)                                                      \
    _mm512_castsi512_ps((upper) ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) \
                                : _mm512_slli_epi32(pairs, 16))

__attribute__((target("avx512f"))) static inline void emulated_bfloat16(int sums, int left,
                                                                        int right) {
    emulated_check();
    for (int row = 0; row < 16; row++) {
        __m512 sum = _mm512_load_ps(emulated.tiles[sums][row]);
        for (int k = 0; k < 16; k++) {
            int32_t pair;
            memcpy(&pair, emulated.tiles[left][row] + 4 * k, 4);
            const __m512i states = _mm512_set1_epi32(pair);
            const __m512i weights = _mm512_load_si512(emulated.tiles[right][k]);
            sum = _mm512_fmadd_ps(EMULATED_HALF(states, 0), EMULATED_HALF(weights, 0), sum);
            sum = _mm512_fmadd_ps(EMULATED_HALF(states, 1), EMULATED_HALF(weights, 1), sum);
        }
        _mm512_store_ps(emulated.tiles[sums][row], sum);
    }
}

/* Unsigned states, signed weights: as pairs of 16 bits, whose products fit 32. */
__attribute__((target("avx512f,avx512bw"))) static inline void emulated_integers(int sums, int left,
                                                                                 int right) {
    emulated_check();
    const __m512i low = _mm512_set1_epi16(0xff);
    for (int row = 0; row < 16; row++) {
        __m512i sum = _mm512_load_si512(emulated.tiles[sums][row]);
        for (int k = 0; k < 16; k++) {
            int32_t four;
            memcpy(&four, emulated.tiles[left][row] + 4 * k, 4);
            const __m512i states = _mm512_set1_epi32(four);
            const __m512i weights = _mm512_load_si512(emulated.tiles[right][k]);
            const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(weights, 8), 8);
            const __m512i odd = _mm512_srai_epi16(weights, 8);
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_and_si512(states, low), even));
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_srli_epi16(states, 8), odd));
        }
        _mm512_store_si512(emulated.tiles[sums][row], sum);
    }
}

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadd emulated_load
#define _tile_stream_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_zero emulated_zero
#define _tile_dpbf16ps emulated_bfloat16
#define _tile_dpbusd emulated_integers
#define _tile_release emulated_release
#define LOAD_TILE_CONFIG(config) ((void)(config), emulated_configure())

#endif
