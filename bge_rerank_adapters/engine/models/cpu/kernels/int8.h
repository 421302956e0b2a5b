/* Layers in 8 bits, for every instruction set that multiplies them.
 *
 * A source that includes this has defined:
 *
 * - multiply_int8(), which multiplies coded rows with a panel and gives each row's sums to a
 *   function. It may put them into memory, 32 of each row, up to the next multiple of 32 rows.
 *   `next` is the panel that comes after this one;
 * - struct rest, of zeros at first: the rows whose sums the next panel's products give to the
 *   function, and take_rest(), which does so after the last panel;
 * - INT8_LINEAR and INT8_AFTER_ATTENTION, the names of what is exported;
 * - BEGIN() and END(), around all products of a call.
 */

#include "int8_rows.h"

struct int8_linear {
    const bf16 *packed;
    const float *step; /* of the weights of each output */
    const float *sums; /* of these weights; one row of them for each chunk of inputs */
    const float *bias;
    const float *factor; /* of each input, or NULL */
};

/* What goes with 32 outputs of a layer. */
struct outputs {
    __m512 step[2], sums[2], bias[2];
};

INLINE struct outputs outputs_of(const struct int8_linear *layer, const float *sums, long from) {
    struct outputs out;
    for (int i = 0; i < 2; i++) {
        out.step[i] = _mm512_loadu_ps(layer->step + from + 16 * i);
        out.sums[i] = _mm512_loadu_ps(sums + from + 16 * i);
        out.bias[i] = _mm512_loadu_ps(layer->bias + from + 16 * i);
    }
    return out;
}

/* Where those of a panel go; those of a row lie `apart` from those of the row before. */
struct linear_panel {
    struct outputs outputs;
    const struct steps *steps;
    bf16 *out;
    long apart;
};

INLINE void take_linear(const void *what, long r, __m512i low, __m512i high) {
    const struct linear_panel *to = what;
    const struct outputs *by = &to->outputs;
    store(to->out + r * to->apart, decode(low, to->steps[r], by->step[0], by->sums[0], by->bias[0]),
          decode(high, to->steps[r], by->step[1], by->sums[1], by->bias[1]));
}

/* The outputs from `begin` to `end` of coded rows. */
KERNEL static void linear_panels(const struct int8_linear *linear, const struct codes *codes,
                                 long begin, long end, int32_t *sums, const struct slices *to) {
    const long size = codes->width * 2 * TILE;
    struct linear_panel panels[2]; /* the rest is still of the one before */
    struct rest rest = {0};
    for (long n = begin; n < end; n += 32) {
        const bf16 *packed = linear->packed + n / 32 * size;
        struct linear_panel *panel = &panels[n / 32 % 2];
        *panel = (struct linear_panel){outputs_of(linear, linear->sums, n), codes->steps,
                                       slice_at(to, n), to->width};
        multiply_int8(codes, packed, sums, packed + size, &rest, take_linear, panel);
    }
    take_rest(&rest, take_linear);
}

/* As bge_amx_linear. */
EXPORT KERNEL int INT8_LINEAR(const struct int8_linear *layer, const bf16 *states, int64_t rows,
                              int64_t begin, int64_t end, int64_t inputs, int64_t outputs,
                              bf16 *out, int64_t slice) {
    const long part = part_of(end - begin, PART_ROWS);
    char *at = take_room(part * (inputs + 32 * sizeof(int32_t) + sizeof(struct steps)) +
                         inputs * sizeof(float));
    if (!at) return -1;
    struct codes codes;
    codes.width = inputs / 64;
    codes.left = cut(&at, part * inputs, 1);
    int32_t *sums = cut(&at, part * 32, sizeof(int32_t));
    float *row = cut(&at, inputs, sizeof(float));
    codes.steps = cut(&at, part, sizeof(struct steps));
    BEGIN();
    for (long start = begin; start < end; start += part) {
        codes.count = end - start < part ? end - start : part;
        encode_rows(states + start * inputs, inputs, 0, codes.count, inputs, layer->factor, row,
                    codes.left, codes.steps);
        const struct slices to = {out + start * slice, rows, slice};
        linear_panels(layer, &codes, 0, outputs, sums, &to);
    }
    END();
    return 0;
}

/* What comes after attention in a layer. The feed-forward block's inner numbers are made `chunk` at
 * a time. */
struct int8_layer {
    int64_t hidden, intermediate, chunk;
    struct int8_linear output, up, down;
    struct norm attention_norm, output_norm;
    float epsilon;
};

/* Some rows on their way through it. */
struct work {
    long stride;        /* of inner numbers */
    struct codes given; /* of what a product is given */
    struct codes inner_given;
    bf16 *middle, *inner; /* what the feed-forward block is given, and its inner numbers */
    float *total, *row;
    int32_t *sums;
};

/* Where what 32 outputs come to goes, in float32. */
struct total_panel {
    struct outputs outputs;
    const struct steps *steps;
    float *total;
    long hidden;
    const bf16 *states; /* the layer's input, for the output projection alone */
    int more;           /* whether it is added to what is there, and not to a bias */
};

INLINE void take_output(const void *what, long r, __m512i low, __m512i high) {
    const struct total_panel *to = what;
    const struct outputs *by = &to->outputs;
    const struct steps steps = to->steps[r];
    float *total = to->total + sums_row(to->hidden / 32, r);
    __m512 l, h;
    load(to->states + r * to->hidden, &l, &h);
    l = decode(low, steps, by->step[0], by->sums[0], _mm512_add_ps(l, by->bias[0]));
    h = decode(high, steps, by->step[1], by->sums[1], _mm512_add_ps(h, by->bias[1]));
    _mm512_store_ps(total, l);
    _mm512_store_ps(total + 16, h);
}

/* What the output projection and the layer's input come to in the panels from `begin` to `end`;
 * `after` is the panel that is needed next. */
KERNEL static void output_panels(const struct int8_layer *layer, const struct work *work,
                                 long begin, long end, const bf16 *states, const bf16 *after) {
    const struct int8_linear *linear = &layer->output;
    const long size = work->given.width * 2 * TILE;
    struct total_panel panels[2]; /* the rest is still of the one before */
    struct rest rest = {0};
    for (long n = begin; n < end; n++) {
        const bf16 *packed = linear->packed + n * size;
        struct total_panel *panel = &panels[n % 2];
        *panel = (struct total_panel){outputs_of(linear, linear->sums, n * 32),
                                      work->given.steps,
                                      work->total + n * BLOCK,
                                      layer->hidden,
                                      states + n * 32,
                                      0};
        multiply_int8(&work->given, packed, work->sums, n + 1 < end ? packed + size : after, &rest,
                      take_output, panel);
    }
    take_rest(&rest, take_output);
}

/* Collects a row's numbers, with a residual if there is one, and returns what they add up to. */
INLINE __m512 collect(const struct work *work, long hidden, long r, const bf16 *residual) {
    const float *from = work->total + sums_row(hidden / 32, r);
    __m512 all_low = _mm512_setzero_ps(), all_high = all_low;
    for (long j = 0; j < hidden; j += 32, from += BLOCK) {
        __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + 16);
        if (residual) {
            __m512 l, h;
            load(residual + j, &l, &h);
            low = _mm512_add_ps(l, low);
            high = _mm512_add_ps(h, high);
        }
        _mm512_store_ps(work->row + j, low);
        _mm512_store_ps(work->row + j + 16, high);
        all_low = _mm512_add_ps(all_low, low);
        all_high = _mm512_add_ps(all_high, high);
    }
    return _mm512_add_ps(all_low, all_high);
}

/* From this to what the feed-forward block is given, and its codes. */
KERNEL static void norm_middle(const struct int8_layer *layer, const struct work *work, long begin,
                               long end) {
    const long hidden = layer->hidden;
    for (long r = begin; r < end; r++) {
        const __m512 sum = collect(work, hidden, r, NULL);
        norm_row(work->row, hidden, sum, &layer->attention_norm, layer->epsilon,
                 work->middle + r * hidden, 32);
        struct range range = no_range();
        for (long j = 0; j < hidden; j += 32)
            for (int half = 0; half < 2; half++) {
                float *v = work->row + j + 16 * half;
                _mm512_store_ps(v, widen(&range, half, _mm512_load_ps(v),
                                         layer->up.factor ? layer->up.factor + j : NULL));
            }
        work->given.steps[r] =
            encode(&range, work->row, hidden, left_row(work->given.left, work->given.width, r));
    }
}

INLINE void take_up(const void *what, long r, __m512i low, __m512i high) {
    const struct linear_panel *to = what;
    const struct outputs *by = &to->outputs;
    store(to->out + r * to->apart,
          gelu(decode(low, to->steps[r], by->step[0], by->sums[0], by->bias[0])),
          gelu(decode(high, to->steps[r], by->step[1], by->sums[1], by->bias[1])));
}

/* The block's inner numbers from `begin` to `end`, of a chunk that begins at `from`; `after` is the
 * panel that is needed next. */
KERNEL static void up_panels(const struct int8_layer *layer, const struct work *work, long from,
                             long begin, long end, const bf16 *after) {
    const long size = work->given.width * 2 * TILE;
    struct linear_panel panels[2]; /* the rest is still of the one before */
    struct rest rest = {0};
    for (long n = begin; n < end; n += 32) {
        const bf16 *packed = layer->up.packed + n / 32 * size;
        struct linear_panel *panel = &panels[n / 32 % 2];
        *panel = (struct linear_panel){outputs_of(&layer->up, layer->up.sums, n), work->given.steps,
                                       work->inner + n - from, work->stride};
        multiply_int8(&work->given, packed, work->sums, n + 32 < end ? packed + size : after, &rest,
                      take_up, panel);
    }
    take_rest(&rest, take_up);
}

INLINE void take_down(const void *what, long r, __m512i low, __m512i high) {
    const struct total_panel *to = what;
    const struct outputs *by = &to->outputs;
    const struct steps steps = to->steps[r];
    float *total = to->total + sums_row(to->hidden / 32, r);
    __m512 l = by->bias[0], h = by->bias[1];
    if (to->more) {
        l = _mm512_load_ps(total);
        h = _mm512_load_ps(total + 16);
    }
    _mm512_store_ps(total, decode(low, steps, by->step[0], by->sums[0], l));
    _mm512_store_ps(total + 16, decode(high, steps, by->step[1], by->sums[1], h));
}

/* What a chunk of inner numbers that begins at `from` comes to in the panels from `begin` to `end`,
 * added to what the ones before do; `after` is the panel that is needed next. */
KERNEL static void down_panels(const struct int8_layer *layer, const struct work *work, long from,
                               long begin, long end, const bf16 *after) {
    const struct int8_linear *linear = &layer->down;
    const float *chunk_sums = linear->sums + from / layer->chunk * layer->hidden;
    const long size = layer->intermediate / 64 * 2 * TILE;
    struct total_panel panels[2]; /* the rest is still of the one before */
    struct rest rest = {0};
    for (long n = begin; n < end; n++) {
        const bf16 *packed = linear->packed + n * size + from / 64 * 2 * TILE;
        struct total_panel *panel = &panels[n % 2];
        *panel = (struct total_panel){outputs_of(linear, chunk_sums, n * 32),
                                      work->inner_given.steps,
                                      work->total + n * BLOCK,
                                      layer->hidden,
                                      NULL,
                                      from > 0};
        multiply_int8(&work->inner_given, packed, work->sums, n + 1 < end ? packed + size : after,
                      &rest, take_down, panel);
    }
    take_rest(&rest, take_down);
}

/* The layer's output, from the sums of all inner numbers. */
KERNEL static void finish(const struct int8_layer *layer, const struct work *work, long begin,
                          long end, bf16 *out) {
    const long hidden = layer->hidden;
    for (long r = begin; r < end; r++) {
        const __m512 sum = collect(work, hidden, r, work->middle + r * hidden);
        norm_row(work->row, hidden, sum, &layer->output_norm, layer->epsilon, out + r * hidden, 32);
    }
}

/* Takes the memory for parts of so many rows. Returns 0, or -1 where it is short. */
static int take_work(const struct int8_layer *layer, long part, struct work *work) {
    const long hidden = layer->hidden, chunk = layer->chunk;
    const long longest = hidden > chunk ? hidden : chunk;
    /* A little longer than a chunk, so that rows do not fall on the same place of the cache. */
    work->stride = chunk + 32;
    char *at = take_room(part * (hidden + chunk + (hidden + work->stride) * sizeof(bf16) +
                                 (hidden + 32) * sizeof(float) + 2 * sizeof(struct steps)) +
                         longest * sizeof(float));
    if (!at) return -1;
    work->given.width = hidden / 64;
    work->given.left = cut(&at, part * hidden, 1);
    work->inner_given.left = cut(&at, part * chunk, 1);
    work->given.steps = cut(&at, part, sizeof(struct steps));
    work->inner_given.steps = cut(&at, part, sizeof(struct steps));
    work->middle = cut(&at, part * hidden, sizeof(bf16));
    work->inner = cut(&at, part * work->stride, sizeof(bf16));
    work->total = cut(&at, part * hidden, sizeof(float));
    work->row = cut(&at, longest, sizeof(float));
    work->sums = cut(&at, part * 32, sizeof(int32_t));
    return 0;
}

/* All that comes after attention, for `work->given.count` rows. */
KERNEL static void after_attention(const struct int8_layer *layer, struct work *work,
                                   const bf16 *states, const bf16 *attended, bf16 *out) {
    const long hidden = layer->hidden, count = work->given.count, chunk = layer->chunk;
    const long panels = hidden / 32, inner = layer->intermediate;
    encode_rows(attended, hidden, 0, count, hidden, layer->output.factor, work->row,
                work->given.left, work->given.steps);
    output_panels(layer, work, 0, panels, states, layer->up.packed);
    norm_middle(layer, work, 0, count);
    for (long from = 0; from < inner; from += chunk) {
        const long to = from + chunk < inner ? from + chunk : inner;
        up_panels(layer, work, from, from, to, layer->down.packed + from * 16);
        work->inner_given.count = count;
        work->inner_given.width = (to - from) / 64;
        encode_rows(work->inner, work->stride, 0, count, to - from, NULL, work->row,
                    work->inner_given.left, work->inner_given.steps);
        down_panels(layer, work, from, 0, panels, layer->up.packed + to * hidden / 2);
    }
    finish(layer, work, 0, count, out);
}

/* As bge_amx_after_attention. */
EXPORT KERNEL int INT8_AFTER_ATTENTION(const struct int8_layer *layer, const bf16 *states,
                                       const bf16 *attended, int64_t rows, bf16 *out) {
    const long hidden = layer->hidden, part = part_of(rows, PART_ROWS);
    struct work work;
    if (take_work(layer, part, &work)) return -1;
    BEGIN();
    for (long start = 0; start < rows; start += part) {
        work.given.count = rows - start < part ? rows - start : part;
        after_attention(layer, &work, states + start * hidden, attended + start * hidden,
                        out + start * hidden);
    }
    END();
    return 0;
}
