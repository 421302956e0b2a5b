/* Products by AMX.
 *
 * One instruction multiplies 16 rows of states with the weights of 16 outputs and adds to 16 by 16
 * sums of 32 bits, in 16 cycles; see "Intel Architecture Instruction Set Extensions", chapter on
 * AMX. So sums are cheap, and the time goes into bringing tiles from the second-level cache (of
 * 2 MB) and weights from the third, and into storing sums.
 *
 * So a panel's weights stay in the first level (of 48 KB) for all rows. States, and what of a panel
 * does not fit, are loaded past it. Sums stay in tiles over all inputs where there are not too
 * many. What else is to be done with sums is done beside the next products, by the core's other
 * units.
 */

#ifndef BGE_TILES_H
#define BGE_TILES_H

#include <string.h>

#include "avx512.h"

enum {
    NEAR = 18, /* pairs of a panel's tiles that stay in the first level, where sums are in tiles */
    MOST = 24, /* pairs, up to which sums are kept in tiles over all of them */
    STEP = 16, /* pairs of a part, of those that are divided */
};

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

/* The instruction wants to be told its registers, by number, as it is compiled. */
#define MULTIPLY_TILES(kind, sums, left, right) \
    do {                                        \
        if ((kind) == BFLOAT16)                 \
            _tile_dpbf16ps(sums, left, right);  \
        else                                    \
            _tile_dpbusd(sums, left, right);    \
    } while (0)

/* Loads a tile so that it stays in the first-level cache, or past that. */
#define LOAD_TILE(tile, from, stays)            \
    do {                                        \
        if (stays)                              \
            _tile_loadd(tile, from, 64);        \
        else                                    \
            _tile_stream_loadd(tile, from, 64); \
    } while (0)

/* Rows whose sums are complete, and still to be taken. */
struct rest {
    const void *what;
    const int32_t *sums;
    long from, count;
};

/* Takes the rows of the rest from `begin` to `end`. */
INLINE void take_rows(const struct rest *rest, long begin, long end, take_sums *take) {
    for (long r = begin; r < end; r++)
        take(rest->what, rest->from + r, _mm512_load_si512(rest->sums + r * 32),
             _mm512_load_si512(rest->sums + r * 32 + 16));
}

/* Takes what is left after the last panel. */
INLINE void take_rest(const struct rest *rest, take_sums *take) {
    take_rows(rest, 0, rest->count, take);
}

/* A product of 32 rows with a part of a panel, of `depth` pairs of tiles. */
struct product {
    const bf16 *upper, *lower; /* 16 rows each */
    int states_stay;           /* in the first-level cache */
    const bf16 *panel;
    long depth, near; /* pairs, and those of them that stay in the first-level cache */
    void *sums;
    long stride; /* of a row's sums */
    int more;    /* whether the sums are added to what is there */
    const char *next;
    long lines; /* cache lines from `next` on that are brought near with each pair */
};

/* Multiplies, and takes the rest meanwhile. */
INLINE void multiply(enum kind kind, const struct product *by, const struct rest *rest,
                     take_sums *take) {
    float *sums = by->sums;
    const char *next = by->next;
    const long share = take ? (rest->count + by->depth - 1) / by->depth : 0;
    /* GCC 12 does not know that loading a tile reads memory, which has to be written by now. */
    __asm__ volatile("" ::: "memory");
    if (by->more) {
        _tile_loadd(0, sums, by->stride * 4);
        _tile_loadd(1, sums + 16, by->stride * 4);
        _tile_loadd(2, sums + 16 * by->stride, by->stride * 4);
        _tile_loadd(3, sums + 16 * by->stride + 16, by->stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < by->depth; k++) {
        LOAD_TILE(6, by->panel + 2 * k * TILE, k < by->near);
        LOAD_TILE(4, by->upper + k * TILE, by->states_stay);
        MULTIPLY_TILES(kind, 0, 4, 6);
        LOAD_TILE(7, by->panel + (2 * k + 1) * TILE, k < by->near);
        MULTIPLY_TILES(kind, 1, 4, 7);
        LOAD_TILE(5, by->lower + k * TILE, by->states_stay);
        MULTIPLY_TILES(kind, 2, 5, 6);
        for (long line = 0; line < by->lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        MULTIPLY_TILES(kind, 3, 5, 7);
        if (!take) continue;
        const long begin = k * share, end = begin + share;
        take_rows(rest, begin, end < rest->count ? end : rest->count, take);
    }
    _tile_stored(0, sums, by->stride * 4);
    _tile_stored(1, sums + 16, by->stride * 4);
    _tile_stored(2, sums + 16 * by->stride, by->stride * 4);
    _tile_stored(3, sums + 16 * by->stride + 16, by->stride * 4);
}

/* Multiplies `count` rows of states with the first `depth` pairs of tiles of a panel.
 *
 * `width` is the states' number of tiles side by side, and `next` the panel that comes after this
 * one. With `take`, each row's sums are given to it: those of the last 32 rows beside the next
 * panel's products, or by take_rest(). Without, they are left in blocks that lie `apart`, added to
 * what is there if there is `more`. */
INLINE void multiply_panel(enum kind kind, const bf16 *states, long width, long count,
                           const bf16 *panel, long depth, void *sums, long apart, int more,
                           const bf16 *next, struct rest *rest, take_sums *take, const void *what) {
    const long blocks = (count + 31) / 32, parts = depth <= MOST ? 1 : (depth + STEP - 1) / STEP;
    const long step = (depth + parts - 1) / parts;
    struct product by = {.near = NEAR, .stride = 32, .next = (const char *)next};
    by.lines = (32 + blocks - 1) / blocks;
    for (long k = 0; k < depth; k += step) {
        by.panel = panel + 2 * k * TILE;
        by.depth = depth - k < step ? depth - k : step;
        by.more = more || k > 0;
        for (long i = 0; i < blocks; i++, by.next += by.depth * by.lines * 64) {
            by.upper = states + (2 * i * width + k) * TILE;
            by.lower = by.upper + width * TILE;
            /* Sums that nothing is added to any more can all take the same place. */
            by.sums = (float *)sums + (take && parts == 1 ? 0 : i * apart);
            multiply(kind, &by, rest, take);
            if (!take) continue;
            const long left = k + step < depth ? 0 : count - 32 * i;
            *rest = (struct rest){what, by.sums, 32 * i, left < 32 ? left : 32};
        }
    }
}

#endif
