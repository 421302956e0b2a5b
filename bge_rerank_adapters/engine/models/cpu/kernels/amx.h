/* What the kernels for processors with AMX share.
 *
 * A tile register holds 16 rows of 64 bytes: 32 numbers in bfloat16 or 64 of 8 bits. One
 * instruction multiplies 16 rows of states with the weights of 16 outputs and adds to 16 by 16 sums
 * of 32 bits, in 16 cycles; see "Intel Architecture Instruction Set Extensions", chapter on AMX. So
 * sums are cheap, and the time goes into bringing tiles from the second-level cache (of 2 MB) and
 * weights from the third. What is kept there between two products is therefore laid out by tiles:
 *
 * - states, as left operand: [rows / 16][inputs / K][16 rows][K inputs], K numbers to 64 bytes;
 * - weights, as right operand: [outputs / 32][inputs / K][2][16][16 outputs][4 bytes of inputs].
 *   One entry of the first axis is a panel; it gives 32 outputs.
 *
 * Both are measured in pieces of 2 bytes, of which a tile has 512, whatever is in them. Sums of a
 * panel lie in blocks of 32 rows by 32 outputs. Rows are filled up to 32; nothing that a row gives
 * depends on another one.
 */

#ifndef BGE_AMX_H
#define BGE_AMX_H

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define KERNEL                                                                  \
    __attribute__((                                                             \
        target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl," \
               "avx512bf16,fma")))
#define INLINE KERNEL static inline __attribute__((always_inline))

typedef uint16_t bf16;

enum {
    TILE = 512,           /* pieces of 2 bytes in a tile */
    BLOCK = 32 * 32,      /* sums in a block */
    STEP = 8,             /* pairs of a panel's tiles that stay in the first-level cache */
    PROJECTED_ROWS = 512, /* rows whose states fit the second-level cache beside a panel */
    LAYER_ROWS = 384,     /* ... and, nearly, beside their sums and inner numbers */
};

/* Returns memory of this thread, so many bytes, with whatever is in it; NULL where it is short. */
char *take_room(size_t size);

/* Cuts off the next `count` items of `size` bytes, on a cache line of their own. */
static inline void *cut(char **at, size_t count, size_t size) {
    void *start = *at;
    *at += (count * size + 63) / 64 * 64;
    return start;
}

/* Splits rows into equal parts of at most `most`, each a multiple of 32. */
static inline long part_of(long rows, long most) {
    const long parts = (rows + most - 1) / most;
    return ((rows + parts - 1) / parts + 31) / 32 * 32;
}

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
    /* Not by the intrinsic, whose operand GCC 12 takes for eight bytes long. */
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

KERNEL static inline void end_tiles(void) { _tile_release(); }

INLINE void fetch_tile(const bf16 *tile) {
    for (int i = 0; i < 16; i++) _mm_prefetch((const char *)tile + 64 * i, _MM_HINT_T0);
}

/* In what states and weights are: the sums are float32, or 32-bit integers of unsigned states and
 * signed weights. */
enum kind { BFLOAT16, INTEGERS };

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

/* Lays out rows of states as a left operand of `width` tiles side by side; rows up to the next
 * multiple of 32 become zeros. */
KERNEL static inline void to_left(const bf16 *states, long stride, long rows, long width,
                                  bf16 *tiles) {
    const long filled = (rows + 31) / 32 * 32;
    for (long r = 0; r < filled; r++) {
        bf16 *out = tiles + r / 16 * width * TILE + r % 16 * 32;
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
KERNEL static inline void to_right(const bf16 *from, long stride, long rows, long width,
                                   bf16 *tiles) {
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

INLINE void store(bf16 *to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
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
    const __m512 whole = _mm512_roundscale_ps(x, 8), rest = _mm512_sub_ps(x, whole);
    static const float factors[] = {
        0.9999992847442627f,  0.6931214332580566f,  0.24024729430675507f,
        0.05591969192028046f, 0.00957094132900238f,
    };
    __m512 p = _mm512_set1_ps(factors[4]);
    for (int i = 3; i >= 0; i--) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(p, whole);
}

struct norm {
    const float *weight, *bias;
};

/* Norms a row of numbers in place. */
INLINE void norm_row(float *row, long hidden, const struct norm *norm, float epsilon) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (long j = 0; j < hidden; j += 32) {
        low = _mm512_add_ps(low, _mm512_load_ps(row + j));
        high = _mm512_add_ps(high, _mm512_load_ps(row + j + 16));
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(low, high)) / hidden);
    low = high = _mm512_setzero_ps();
    for (long j = 0; j < hidden; j += 32) {
        const __m512 l = _mm512_sub_ps(_mm512_load_ps(row + j), mean);
        const __m512 h = _mm512_sub_ps(_mm512_load_ps(row + j + 16), mean);
        low = _mm512_fmadd_ps(l, l, low);
        high = _mm512_fmadd_ps(h, h, high);
    }
    const float variance = _mm512_reduce_add_ps(_mm512_add_ps(low, high)) / hidden;
    const __m512 scale = _mm512_set1_ps(1 / sqrtf(variance + epsilon));
    for (long j = 0; j < hidden; j += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(row + j), mean), scale);
        _mm512_store_ps(row + j, _mm512_fmadd_ps(v, _mm512_loadu_ps(norm->weight + j),
                                                 _mm512_loadu_ps(norm->bias + j)));
    }
}

/* Rounds a row; each 32 numbers lie `apart` from those before. */
INLINE void store_row(const float *row, long hidden, bf16 *out, long apart) {
    for (long j = 0; j < hidden; j += 32)
        store(out + j / 32 * apart, _mm512_load_ps(row + j), _mm512_load_ps(row + j + 16));
}

#endif
