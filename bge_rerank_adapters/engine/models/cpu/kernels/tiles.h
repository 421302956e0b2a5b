/* Products by AMX.
 *
 * One instruction multiplies 16 rows of states with the weights of 16 outputs and adds to 16 by 16
 * sums of 32 bits, in 16 cycles; see "Intel Architecture Instruction Set Extensions", chapter on
 * AMX. So sums are cheap, and the time goes into bringing tiles from the second-level cache (of
 * 2 MB) and weights from the third.
 */

#ifndef BGE_TILES_H
#define BGE_TILES_H

#include <string.h>

#include "avx512.h"

enum { STEP = 8 /* pairs of a panel's tiles that stay in the first-level cache */ };

#ifndef LOAD_TILE_CONFIG /* tests run on CPUs without tiles, and put functions of their own here \
                          */
/* Not by the intrinsic, whose operand GCC 12 takes for eight bytes long. */
#define LOAD_TILE_CONFIG(config) __asm__ volatile("ldtilecfg %0" ::"m"(config))
#endif

struct tile_config {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

KERNEL static inline void begin_tiles(void) {
    struct tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    LOAD_TILE_CONFIG(config);
}

KERNEL static inline void end_tiles(void) { _tile_release(); }

INLINE void fetch_tile(const bf16 *tile) {
    for (int i = 0; i < 16; i++) _mm_prefetch((const char *)tile + 64 * i, _MM_HINT_T0);
}

/* The instruction wants to be told its registers, by number, as it is compiled. */
#define MULTIPLY_TILES(kind, sums, left, right) \
    do {                                        \
        if ((kind) == BFLOAT16)                 \
            _tile_dpbf16ps(sums, left, right);  \
        else                                    \
            _tile_dpbusd(sums, left, right);    \
    } while (0)

/* Multiplies 32 rows with a panel's part: sums[32][stride] = or += over `depth` pairs of tiles.
 * On the way it brings `lines` cache lines for each of these from `next` to the second level. */
INLINE void multiply(enum kind kind, const bf16 *upper, const bf16 *lower, const bf16 *panel,
                     long depth, void *out, long stride, int more, const char *next, long lines) {
    float *sums = out;
    /* GCC 12 does not know that loading a tile reads memory, which has to be written by now. */
    __asm__ volatile("" ::: "memory");
    if (more) {
        _tile_loadd(0, sums, stride * 4);
        _tile_loadd(1, sums + 16, stride * 4);
        _tile_loadd(2, sums + 16 * stride, stride * 4);
        _tile_loadd(3, sums + 16 * stride + 16, stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < depth; k++) {
        _tile_loadd(6, panel + 2 * k * TILE, 64);
        _tile_loadd(4, upper + k * TILE, 64);
        fetch_tile(upper + (k + 1) * TILE);
        MULTIPLY_TILES(kind, 0, 4, 6);
        _tile_loadd(7, panel + (2 * k + 1) * TILE, 64);
        MULTIPLY_TILES(kind, 1, 4, 7);
        _tile_loadd(5, lower + k * TILE, 64);
        fetch_tile(lower + (k + 1) * TILE);
        MULTIPLY_TILES(kind, 2, 5, 6);
        for (long line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        MULTIPLY_TILES(kind, 3, 5, 7);
    }
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + 16, stride * 4);
    _tile_stored(2, sums + 16 * stride, stride * 4);
    _tile_stored(3, sums + 16 * stride + 16, stride * 4);
}

/* Multiplies states, `blocks` times 32 rows, with the first `depth` pairs of tiles of a panel.
 * `width` is the states' number of tiles side by side, `apart` the distance of their sums, and
 * `next` the panel that comes after this one. */
INLINE void multiply_panel(enum kind kind, const bf16 *states, long width, long blocks,
                           const bf16 *panel, long depth, void *out, long apart, int more,
                           const bf16 *next) {
    const long lines = (32 + blocks - 1) / blocks;
    const char *ahead = (const char *)next;
    float *sums = out;
    for (long k = 0; k < depth; k += STEP) {
        const long part = depth - k < STEP ? depth - k : STEP;
        for (long i = 0; i < blocks; i++, ahead += part * lines * 64) {
            const bf16 *upper = states + (2 * i * width + k) * TILE;
            multiply(kind, upper, upper + width * TILE, panel + 2 * k * TILE, part,
                     sums + i * apart, 32, more || k > 0, ahead, lines);
        }
    }
}

#endif
