/* What all kernels share: how states and weights are laid out, and the memory of a thread.
 *
 * What is kept between two products is laid out by tiles of 16 rows of 64 bytes, of 32 numbers in
 * bfloat16 or 64 of 8 bits, as AMX reads them:
 *
 * - states, as left operand: [rows / 16][inputs / K][16 rows][K inputs], K numbers to 64 bytes;
 * - weights, as right operand: [outputs / 32][inputs / K][2][16][16 outputs][4 bytes of inputs].
 *   One entry of the first axis is a panel; it gives 32 outputs.
 *
 * AVX512-VNNI reads the same: 64 bytes of a panel are 4 inputs of 16 outputs. Both operands are
 * measured in pieces of 2 bytes, of which a tile has 512, whatever is in them. Sums of a panel lie
 * in blocks of 32 rows by 32 outputs. Rows are filled up to 32; nothing that a row gives depends on
 * another one.
 */

#ifndef BGE_SHARED_H
#define BGE_SHARED_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint16_t bf16;

enum {
    TILE = 512,      /* pieces of 2 bytes in a tile */
    BLOCK = 32 * 32, /* sums in a block */
    PART_ROWS = 384, /* rows whose states nearly fit the second-level cache beside their sums */
};

/* In what states and weights are: the sums are float32, or 32-bit integers of unsigned states and
 * signed weights. */
enum kind { BFLOAT16, INTEGERS };

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
    if (rows < 1) return 32;
    const long parts = (rows + most - 1) / most;
    return ((rows + parts - 1) / parts + 31) / 32 * 32;
}

/* The row `r` of a left operand of `width` tiles side by side; its next 64 bytes are a tile on. */
static inline bf16 *left_row(bf16 *tiles, long width, long r) {
    return tiles + r / 16 * width * TILE + r % 16 * 32;
}

/* Where outputs go, by slices of `width`: to shape (outputs / width, rows, width). */
struct slices {
    bf16 *out;
    long rows, width;
};

/* Where the first row's output `n` goes. */
static inline bf16 *slice_at(const struct slices *to, long n) {
    return to->out + n / to->width * to->rows * to->width + n % to->width;
}

/* Where the sums of row `r` begin, for `panels` panels; those of the next panel are a block on. */
static inline long sums_row(long panels, long r) { return r / 32 * panels * BLOCK + r % 32 * 32; }

#endif
