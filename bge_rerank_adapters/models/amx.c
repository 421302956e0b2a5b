/* An encoder's layers in bfloat16 on a processor with AMX, each function in one thread.
 *
 * A tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 inputs with
 * 32 inputs of 16 outputs and adds to 16 by 16 sums in float32, in 16 cycles; see "Intel
 * Architecture Instruction Set Extensions", chapter on AMX. So the sums are cheap, and the time
 * goes into bringing tiles from the second-level cache (of 2 MB) and weights from the third.
 * What is kept there between two products is therefore laid out tile by tile, in "tiles":
 *
 * - states, as left operand: [rows / 16][inputs / 32][16 rows][32 inputs];
 * - weights, as right operand: [outputs / 32][inputs / 32][2][16 pairs of inputs][16 outputs][2].
 *   One entry of the first axis is a panel; it gives 32 outputs.
 *
 * Sums of a panel lie in blocks of 32 rows by 32 outputs. Rows are filled up to 32; nothing that
 * a row gives depends on another one.
 */

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define KERNEL                                                                                     \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define INLINE KERNEL static inline __attribute__((always_inline))

typedef uint16_t bf16;

enum {
    TILE = 512,           /* bfloat16 numbers in a tile */
    BLOCK = 32 * 32,      /* sums in a block */
    STEP = 8,             /* pairs of a panel's tiles that stay in the first-level cache */
    PROJECTED_ROWS = 512, /* rows whose states fit the second-level cache beside a panel */
    LAYER_ROWS = 384,     /* ... and beside sums and what is inside a feed-forward block */
    INNER = 1024,         /* a feed-forward block's inner numbers that are made at a time */
    HUGE_PAGE = 1 << 21,  /* bytes */
};

/* To be raised with each change of what another function takes, here and in amx.py. */
EXPORT int bge_amx_version(void) { return 1; }

/* 1 if this processor has what the functions use and the system lets this process use it. */
EXPORT int bge_amx_supported(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 24) || !(d & 1u << 22)) return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 0;
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* ---- memory of a thread, which is kept from call to call, since new pages are slow ---- */

struct room {
    char *at;
    size_t size;
};

static pthread_key_t room_key;
static pthread_once_t room_once = PTHREAD_ONCE_INIT;

static void leave_room(void *room) {
    free(((struct room *)room)->at);
    free(room);
}

static void make_room_key(void) { pthread_key_create(&room_key, leave_room); }

/* Returns so many bytes, whatever is in them, or NULL. */
static char *take_room(size_t size) {
    pthread_once(&room_once, make_room_key);
    struct room *room = pthread_getspecific(room_key);
    if (!room) {
        if (!(room = calloc(1, sizeof *room))) return NULL;
        if (pthread_setspecific(room_key, room)) {
            free(room);
            return NULL;
        }
    }
    if (room->size < size) {
        free(room->at);
        room->size = 0;
        size = (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        if (!(room->at = aligned_alloc(HUGE_PAGE, size))) return NULL;
        madvise(room->at, size, MADV_HUGEPAGE);
        room->size = size;
    }
    return room->at;
}

/* Cuts off the next `count` items of `size` bytes, on a cache line of their own. */
static void *cut(char **at, size_t count, size_t size) {
    void *start = *at;
    *at += (count * size + 63) / 64 * 64;
    return start;
}

/* ---- tiles ---- */

struct tile_config {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

KERNEL static void begin_tiles(void) {
    struct tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

KERNEL static void end_tiles(void) { _tile_release(); }

INLINE void fetch_tile(const bf16 *tile) {
    for (int i = 0; i < 16; i++) _mm_prefetch((const char *)tile + 64 * i, _MM_HINT_T0);
}

/* Multiplies 32 rows with a panel's part: sums[32][stride] = or += over `depth` pairs of tiles.
 * On the way it brings `lines` cache lines for each of these from `next` to the second level. */
INLINE void multiply(const bf16 *upper, const bf16 *lower, const bf16 *panel, long depth,
                     float *sums, long stride, int more, const char *next, long lines) {
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
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + (2 * k + 1) * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + k * TILE, 64);
        fetch_tile(lower + (k + 1) * TILE);
        _tile_dpbf16ps(2, 5, 6);
        for (long line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + 16, stride * 4);
    _tile_stored(2, sums + 16 * stride, stride * 4);
    _tile_stored(3, sums + 16 * stride + 16, stride * 4);
}

/* Multiplies states, `blocks` times 32 rows, with the first `depth` pairs of tiles of a panel.
 * `width` is the states' number of tiles side by side, `apart` the distance of their sums, and
 * `next` the panel that comes after this one. */
KERNEL static void multiply_panel(const bf16 *states, long width, long blocks, const bf16 *panel,
                                  long depth, float *sums, long apart, int more,
                                  const bf16 *next) {
    const long lines = (32 + blocks - 1) / blocks;
    const char *ahead = (const char *)next;
    for (long k = 0; k < depth; k += STEP) {
        const long part = depth - k < STEP ? depth - k : STEP;
        for (long i = 0; i < blocks; i++, ahead += part * lines * 64) {
            const bf16 *upper = states + (2 * i * width + k) * TILE;
            multiply(upper, upper + width * TILE, panel + 2 * k * TILE, part, sums + i * apart, 32,
                     more || k > 0, ahead, lines);
        }
    }
}

/* Lays out rows of states as a left operand of `width` tiles side by side; rows up to the next
 * multiple of 32 become zeros. */
KERNEL static void to_left(const bf16 *states, long stride, long rows, long width, bf16 *tiles) {
    const long filled = (rows + 31) / 32 * 32;
    for (long r = 0; r < filled; r++) {
        bf16 *out = tiles + r / 16 * width * TILE + r % 16 * 32;
        for (long k = 0; k < width; k++)
            _mm512_store_si512(out + k * TILE, r < rows
                                                   ? _mm512_loadu_si512(states + r * stride + k * 32)
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
KERNEL static void to_right(const bf16 *from, long stride, long rows, long width, bf16 *tiles) {
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

/* Lays out a weight of shape (outputs, inputs) as a right operand of as many numbers. */
EXPORT void bge_amx_pack(const bf16 *weight, int64_t outputs, int64_t inputs, bf16 *packed) {
    const uintptr_t page = 4096, begin = ((uintptr_t)packed + page - 1) / page * page;
    const uintptr_t end = (uintptr_t)(packed + outputs * inputs) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
    to_right(weight, inputs, outputs, inputs / 32, packed);
}

/* ---- what stands between products ---- */

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
        0.15690529346466064f,  -0.07718338817358017f, 0.054671913385391235f,  -0.04029560461640358f,
        0.028623398393392563f, -0.01815963350236416f, 0.010141915641725063f,  -0.00668290164321661f,
        0.004654256161302328f, -0.0015652513829991221f,
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
        0.9999992847442627f, 0.6931214332580566f, 0.24024729430675507f,
        0.05591969192028046f, 0.00957094132900238f,
    };
    __m512 p = _mm512_set1_ps(factors[4]);
    for (int i = 3; i >= 0; i--) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(p, whole);
}

struct norm {
    const float *weight, *bias;
};

/* Adds up one row's sums, a bias and a residual, and norms it. Numbers lie 32 by 32: of sums they
 * are a block apart, of residual and output as many as told. `row` has room for all of them. */
INLINE void add_and_norm(const float *sums, const float *bias, const bf16 *residual, long apart,
                         const struct norm *norm, float epsilon, long hidden, float *row, bf16 *out,
                         long out_apart) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (long j = 0; j < hidden / 32; j++) {
        __m512 l, h;
        load(residual + j * apart, &l, &h);
        l = _mm512_add_ps(l, _mm512_loadu_ps(bias + j * 32));
        h = _mm512_add_ps(h, _mm512_loadu_ps(bias + j * 32 + 16));
        l = _mm512_add_ps(l, _mm512_load_ps(sums + j * BLOCK));
        h = _mm512_add_ps(h, _mm512_load_ps(sums + j * BLOCK + 16));
        low = _mm512_add_ps(low, l);
        high = _mm512_add_ps(high, h);
        _mm512_store_ps(row + j * 32, l);
        _mm512_store_ps(row + j * 32 + 16, h);
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
    for (long j = 0; j < hidden; j += 32) {
        __m512 v[2];
        for (int i = 0; i < 2; i++) {
            v[i] = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(row + j + 16 * i), mean), scale);
            v[i] = _mm512_fmadd_ps(v[i], _mm512_loadu_ps(norm->weight + j + 16 * i),
                                   _mm512_loadu_ps(norm->bias + j + 16 * i));
        }
        store(out + j / 32 * out_apart, v[0], v[1]);
    }
}

/* Splits rows into equal parts of at most `most`, each a multiple of 32. */
static long part_of(long rows, long most) {
    const long parts = (rows + most - 1) / most;
    return ((rows + parts - 1) / parts + 31) / 32 * 32;
}

/* ---- a layer ---- */

/* states @ weight.T + bias for the rows from `begin` to `end`, by slices of outputs: the output has
 * shape (outputs / slice, rows, slice). Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_linear(const bf16 *states, int64_t rows, int64_t begin, int64_t end,
                                 int64_t inputs, int64_t outputs, const bf16 *packed,
                                 const float *bias, bf16 *out, int64_t slice) {
    const long width = inputs / 32, part = part_of(end - begin, PROJECTED_ROWS);
    char *at = take_room(part * (inputs * sizeof(bf16) + 32 * sizeof(float)));
    if (!at) return -1;
    bf16 *left = cut(&at, part * inputs, sizeof(bf16));
    float *sums = cut(&at, part * 32, sizeof(float));
    begin_tiles();
    for (long start = begin; start < end; start += part) {
        const long count = end - start < part ? end - start : part;
        to_left(states + start * inputs, inputs, count, width, left);
        for (long n = 0; n < outputs; n += 32) {
            const bf16 *panel = packed + n * inputs;
            multiply_panel(left, width, (count + 31) / 32, panel, width, sums, BLOCK, 0,
                           panel + 32 * inputs);
            const __m512 low = _mm512_loadu_ps(bias + n), high = _mm512_loadu_ps(bias + n + 16);
            bf16 *to = out + (n / slice * rows + start) * slice + n % slice;
            for (long r = 0; r < count; r++)
                store(to + r * slice, _mm512_add_ps(_mm512_load_ps(sums + r * 32), low),
                      _mm512_add_ps(_mm512_load_ps(sums + r * 32 + 16), high));
        }
    }
    end_tiles();
    return 0;
}

/* Lays out a pair's values, (keys, 32 * width), as a right operand whose inputs are the keys. */
KERNEL static void values_to_right(const bf16 *values, long keys, long width, bf16 *tiles) {
    const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                          8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
    const __m512i zero = _mm512_setzero_si512();
    const long depth = (keys + 31) / 32;
    for (long r = 0; r < depth * 32; r += 2)
        for (long w = 0; w < width; w++) {
            const bf16 *from = values + (r * width + w) * 32;
            const __m512i first = r < keys ? _mm512_loadu_si512(from) : zero;
            const __m512i second = r + 1 < keys ? _mm512_loadu_si512(from + width * 32) : zero;
            bf16 *out = tiles + (w * depth + r / 32) * 2 * TILE + r % 32 / 2 * 32;
            _mm512_store_si512(out, _mm512_permutex2var_epi16(first, even, second));
            _mm512_store_si512(out + TILE, _mm512_permutex2var_epi16(first, odd, second));
        }
}

/* Weighs one query's keys by softmax; returns what the weights, which become a row of a left
 * operand, add up to. */
INLINE float weigh(const float *scores, long keys, __m512 scale, bf16 *weights) {
    const long depth = (keys + 31) / 32, rest = keys - (depth - 1) * 32;
    const __mmask16 in_low = rest >= 16 ? 0xffff : (1u << rest) - 1;
    const __mmask16 in_high = rest <= 16 ? 0 : (1u << (rest - 16)) - 1;
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (long n = 0; n < depth - 1; n++) {
        const float *s = scores + n * 32;
        top = _mm512_max_ps(top, _mm512_max_ps(_mm512_load_ps(s), _mm512_load_ps(s + 16)));
    }
    const float *tail = scores + (depth - 1) * 32;
    top = _mm512_mask_max_ps(top, in_low, top, _mm512_load_ps(tail));
    top = _mm512_mask_max_ps(top, in_high, top, _mm512_load_ps(tail + 16));
    const __m512 shift = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(top)), scale);
    __m512 low = _mm512_setzero_ps(), high = low;
    for (long n = 0; n < depth; n++) {
        const float *s = scores + n * 32;
        __m512 l = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(s), scale, shift));
        __m512 h = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(s + 16), scale, shift));
        if (n == depth - 1) {
            l = _mm512_maskz_mov_ps(in_low, l);
            h = _mm512_maskz_mov_ps(in_high, h);
        }
        low = _mm512_add_ps(low, l);
        high = _mm512_add_ps(high, h);
        store(weights + n * TILE, l, h);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(low, high));
}

/* Lets each pair attend to itself. Query, key and value have shape (heads, rows, head); pair i has
 * the rows from bounds[i] to bounds[i + 1] of key and value, and of query as well or, if `single`,
 * row i alone. The output has shape (the query's rows, heads * head); that of the heads from
 * `begin` to `end` is made. Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_attention(const bf16 *query, const bf16 *key, const bf16 *value,
                                    const int32_t *bounds, int64_t pairs, int64_t heads,
                                    int64_t begin, int64_t end, int64_t head, int32_t single,
                                    bf16 *out) {
    const long rows = bounds[pairs], width = head / 32;
    long longest = 0;
    for (long i = 0; i < pairs; i++)
        if (bounds[i + 1] - bounds[i] > longest) longest = bounds[i + 1] - bounds[i];
    const long filled = (longest + 31) / 32 * 32;
    /* A little more than the keys, so that rows do not fall on the same place of the cache. */
    const long stride = filled + 16;
    char *at = take_room(sizeof(bf16) * (2 * filled * head + 32 * head + 32 * filled) +
                         sizeof(float) * (32 * stride + BLOCK));
    if (!at) return -1;
    bf16 *keys = cut(&at, filled * head, sizeof(bf16));
    bf16 *values = cut(&at, filled * head, sizeof(bf16));
    bf16 *asking = cut(&at, 32 * head, sizeof(bf16));
    bf16 *weights = cut(&at, 32 * filled, sizeof(bf16));
    float *scores = cut(&at, 32 * stride, sizeof(float));
    float *sums = cut(&at, BLOCK, sizeof(float));
    const __m512 scale = _mm512_set1_ps(1.4426950408889634f / sqrtf((float)head));
    begin_tiles();
    for (long pair = 0; pair < pairs; pair++) {
        const long start = bounds[pair], count = bounds[pair + 1] - start;
        const long depth = (count + 31) / 32;
        const long first = single ? pair : start, asked = single ? 1 : count;
        for (long h = begin; h < end; h++) {
            to_right(key + (h * rows + start) * head, head, count, width, keys);
            values_to_right(value + (h * rows + start) * head, count, width, values);
            for (long q = first; q < first + asked; q += 32) {
                const long taken = first + asked - q < 32 ? first + asked - q : 32;
                to_left(query + (h * (single ? pairs : rows) + q) * head, head, taken, width,
                        asking);
                for (long n = 0; n < depth; n++)
                    multiply(asking, asking + width * TILE, keys + n * width * 2 * TILE, width,
                             scores + n * 32, stride, 0, NULL, 0);
                float total[32];
                for (long r = 0; r < taken; r++)
                    total[r] = weigh(scores + r * stride, count, scale,
                                     weights + r / 16 * depth * TILE + r % 16 * 32);
                for (long w = 0; w < width; w++) {
                    multiply(weights, weights + depth * TILE, values + w * depth * 2 * TILE, depth,
                             sums, 32, 0, NULL, 0);
                    bf16 *to = out + q * heads * head + h * head + w * 32;
                    for (long r = 0; r < taken; r++) {
                        const __m512 share = _mm512_set1_ps(1 / total[r]);
                        store(to + r * heads * head,
                              _mm512_mul_ps(_mm512_load_ps(sums + r * 32), share),
                              _mm512_mul_ps(_mm512_load_ps(sums + r * 32 + 16), share));
                    }
                }
            }
        }
    }
    end_tiles();
    return 0;
}

/* What comes after attention: packed weights, and vectors in float32. */
struct rest {
    int64_t hidden, intermediate;
    const bf16 *output, *up, *down;
    const float *output_bias, *up_bias, *down_bias;
    struct norm attention_norm, output_norm;
    float epsilon;
};

/* One layer's rest for states and what their attention gave, all of shape (rows, hidden).
 * Returns 0, or -1 where memory is short. */
EXPORT KERNEL int bge_amx_rest(const struct rest *layer, const bf16 *states, const bf16 *attended,
                               int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, width = hidden / 32, part = part_of(rows, LAYER_ROWS);
    const long inner_all = layer->intermediate, inner_most = inner_all < INNER ? inner_all : INNER;
    const long inner_width = inner_most / 32;
    char *at = take_room(sizeof(bf16) * part * (hidden + inner_most) +
                         sizeof(float) * (part * (hidden + 32) + hidden));
    if (!at) return -1;
    bf16 *left = cut(&at, part * hidden, sizeof(bf16));
    bf16 *inner = cut(&at, part * inner_most, sizeof(bf16));
    float *sums = cut(&at, part * hidden, sizeof(float));
    float *few = cut(&at, part * 32, sizeof(float));
    float *row = cut(&at, hidden, sizeof(float));
    begin_tiles();
    for (long start = 0; start < rows; start += part) {
        const long count = rows - start < part ? rows - start : part, blocks = (count + 31) / 32;
        to_left(attended + start * hidden, hidden, count, width, left);
        for (long n = 0; n < width; n++) {
            const bf16 *panel = layer->output + n * width * 2 * TILE;
            multiply_panel(left, width, blocks, panel, width, sums + n * BLOCK, width * BLOCK, 0,
                           n + 1 < width ? panel + width * 2 * TILE : layer->up);
        }
        for (long r = 0; r < count; r++)
            add_and_norm(sums + r / 32 * width * BLOCK + r % 32 * 32, layer->output_bias,
                         states + (start + r) * hidden, 32, &layer->attention_norm, layer->epsilon,
                         hidden, row, left + r / 16 * width * TILE + r % 16 * 32, TILE);
        for (long from = 0; from < inner_all; from += INNER) {
            const long taken = (inner_all - from < INNER ? inner_all - from : INNER) / 32;
            const bf16 *down = layer->down + from / 32 * 2 * TILE;
            for (long n = 0; n < taken; n++) {
                const bf16 *panel = layer->up + (from / 32 + n) * width * 2 * TILE;
                multiply_panel(left, width, blocks, panel, width, few, BLOCK, 0,
                               n + 1 < taken ? panel + width * 2 * TILE : down);
                const float *bias = layer->up_bias + from + n * 32;
                const __m512 low = _mm512_loadu_ps(bias), high = _mm512_loadu_ps(bias + 16);
                for (long r = 0; r < blocks * 32; r++)
                    store(inner + (r / 16 * inner_width + n) * TILE + r % 16 * 32,
                          gelu(_mm512_add_ps(_mm512_load_ps(few + r * 32), low)),
                          gelu(_mm512_add_ps(_mm512_load_ps(few + r * 32 + 16), high)));
            }
            for (long n = 0; n < width; n++) {
                const bf16 *panel = down + n * (inner_all / 32) * 2 * TILE;
                const bf16 *further = layer->up + (from / 32 + taken) * width * 2 * TILE;
                multiply_panel(inner, inner_width, blocks, panel, taken, sums + n * BLOCK,
                               width * BLOCK, from > 0,
                               n + 1 < width ? panel + inner_all / 32 * 2 * TILE : further);
            }
        }
        for (long r = 0; r < count; r++)
            add_and_norm(sums + r / 32 * width * BLOCK + r % 32 * 32, layer->down_bias,
                         left + r / 16 * width * TILE + r % 16 * 32, TILE, &layer->output_norm,
                         layer->epsilon, hidden, row, out + (start + r) * hidden, 32);
    }
    end_tiles();
    return 0;
}
