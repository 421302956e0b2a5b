/* Drives every kernel of an instruction set over odd sizes, and compares with float64; packs that
 * several threads run, with the same kernels one after the other.
 *
 * Built with sanitizers, and without room.c: memory of a thread is exactly as long as it was asked
 * for, begins as NaN and ends at a page that cannot be touched. So does whatever a kernel is given.
 */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "stack.h"

struct norm {
    const float *weight, *bias;
};
struct bf16_layer {
    int64_t hidden, intermediate;
    const bf16 *output, *up, *down;
    const float *output_bias, *up_bias, *down_bias;
    struct norm attention_norm, output_norm;
    float epsilon;
};
struct int8_linear {
    const bf16 *packed;
    const float *step, *sums, *bias, *factor;
};
struct int8_layer {
    int64_t hidden, intermediate, chunk;
    struct int8_linear output, up, down;
    struct norm attention_norm, output_norm;
    float epsilon;
};
struct bf16_stack_layer {
    struct {
        const bf16 *packed;
        const float *bias;
        int64_t outputs;
    } of_all, of_first;
    const struct bf16_layer *after;
};
struct int8_stack_layer {
    struct {
        struct int8_linear linear;
        int64_t outputs;
    } of_all, of_first;
    const struct int8_layer *after;
};

typedef int linear_kernel(const bf16 *, int64_t, int64_t, int64_t, int64_t, int64_t, const bf16 *,
                          const float *, bf16 *, int64_t);
typedef int int8_linear_kernel(const struct int8_linear *, const bf16 *, int64_t, int64_t, int64_t,
                               int64_t, int64_t, bf16 *, int64_t);
typedef int layer_kernel(const void *, const bf16 *, const bf16 *, int64_t, bf16 *);
typedef int64_t memory_kernel(const struct pack *);
typedef int stack_kernel(struct pack *);

extern linear_kernel bge_amx_linear;
extern int8_linear_kernel bge_amx_int8_linear, bge_avx512_vnni_int8_linear;
extern layer_kernel bge_amx_after_attention, bge_amx_int8_after_attention,
    bge_avx512_vnni_int8_after_attention;
extern attention_kernel bge_amx_attention, bge_avx512_vnni_attention, bge_avx512_bf16_attention;
extern memory_kernel bge_amx_stack_memory, bge_amx_int8_stack_memory,
    bge_avx512_vnni_int8_stack_memory;
extern stack_kernel bge_amx_stack_run, bge_amx_int8_stack_run, bge_avx512_vnni_int8_stack_run;
extern int bge_amx_lack(void), bge_avx512_vnni_lack(void), bge_avx512_bf16_lack(void);
extern void bge_pack(const bf16 *, int64_t, int64_t, bf16 *);

enum { LACKING = 77, CHUNK = 1024, MOST_BUFFERS = 4096, MOST_LAYERS = 3, MOST_THREADS = 5 };
static const uint16_t UNTOUCHED = 0x7fa5; /* not a number */

/* ---- memory ---- */

static struct {
    void *at;
    size_t size;
} mapped[MOST_BUFFERS];
static int buffers;
static pthread_mutex_t mapping = PTHREAD_MUTEX_INITIALIZER;
/* How many more pieces of memory kernels get, and what each thread has of its own. */
static long rooms = 1L << 62;
static _Thread_local struct {
    char *at;
    size_t size;
} own;

/* So many bytes, a multiple of 64, all of them ones, ahead of a page that cannot be touched. */
static void *guarded(size_t size) {
    const size_t page = sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page + page;
    pthread_mutex_lock(&mapping);
    char *at = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || buffers == MOST_BUFFERS) abort();
    if (mprotect(at + whole - page, page, PROT_NONE)) abort();
    mapped[buffers].at = at;
    mapped[buffers++].size = whole;
    pthread_mutex_unlock(&mapping);
    memset(at, 0xff, whole - page);
    return at + whole - page - (size + 63) / 64 * 64;
}

static void free_all(void) {
    own.size = 0;
    while (buffers) {
        buffers--;
        munmap(mapped[buffers].at, mapped[buffers].size);
    }
}

char *take_room(size_t size) {
    if (size % 64) abort();
    if (__atomic_sub_fetch(&rooms, 1, __ATOMIC_RELAXED) < 0) return NULL;
    /* As in room.c it is what the thread had before, if that is long enough. Here it has to be
     * exactly as long, so that it ends at the page that cannot be touched. */
    if (own.size != size) own.at = guarded(size);
    own.size = size;
    memset(own.at, 0xff, size);
    return own.at;
}

/* ---- numbers ---- */

static uint32_t seed = 1;

/* About normal: mean 0, variance 1. */
static float normal(void) {
    float sum = 0;
    for (int i = 0; i < 12; i++) {
        seed = seed * 1664525u + 1013904223u;
        sum += (float)(seed >> 8) / (1 << 24);
    }
    return sum - 6;
}

static bf16 to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static double from_bf16(bf16 value) {
    const uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static bf16 *states_of(long count) {
    bf16 *out = guarded(count * sizeof *out);
    for (long i = 0; i < count; i++) out[i] = to_bf16(normal());
    return out;
}

static float *vector_of(long count, float mean) {
    float *out = guarded(count * sizeof *out);
    for (long i = 0; i < count; i++) out[i] = mean + normal() / 4;
    return out;
}

static double *wide(long count) {
    double *out = calloc(count ? count : 1, sizeof *out);
    if (!out) abort();
    return out;
}

/* ---- layers ---- */

/* A weight as the kernels have it, and in float64. */
struct weight {
    long outputs, inputs;
    double *exact;
    bf16 *packed;
    float *bias, *step, *sums, *factor;
};

static struct weight bf16_weight(long outputs, long inputs) {
    struct weight w = {outputs, inputs, wide(outputs * inputs), NULL, NULL, NULL, NULL, NULL};
    bf16 *rounded = guarded(outputs * inputs * sizeof *rounded);
    for (long i = 0; i < outputs * inputs; i++) {
        rounded[i] = to_bf16(normal() / sqrtf(inputs));
        w.exact[i] = from_bf16(rounded[i]);
    }
    w.packed = guarded(outputs * inputs * sizeof *w.packed);
    bge_pack(rounded, outputs, inputs, w.packed);
    w.bias = vector_of(outputs, 0);
    return w;
}

static struct weight int8_weight(long outputs, long inputs, long chunk, int divided) {
    struct weight w = {outputs, inputs, wide(outputs * inputs), NULL, NULL, NULL, NULL, NULL};
    int8_t *codes = guarded(outputs * inputs);
    w.step = guarded(outputs * sizeof(float));
    w.sums = guarded((inputs + chunk - 1) / chunk * outputs * sizeof(float));
    w.factor = divided ? vector_of(inputs, 1) : NULL;
    for (long n = 0; n < outputs; n++) {
        w.step[n] = 4 / sqrtf(inputs) / 127;
        for (long i = 0; i < inputs; i += chunk) w.sums[i / chunk * outputs + n] = 0;
        for (long i = 0; i < inputs; i++) {
            const double code = fmax(-127, fmin(127, rint(normal() / sqrtf(inputs) / w.step[n])));
            codes[n * inputs + i] = code;
            w.exact[n * inputs + i] = code * w.step[n];
            w.sums[i / chunk * outputs + n] += code * w.step[n];
        }
    }
    w.packed = guarded(outputs * inputs);
    bge_pack((bf16 *)codes, outputs, inputs / 2, w.packed);
    w.bias = vector_of(outputs, 0);
    return w;
}

static void apply(const struct weight *w, const double *in, double *out) {
    for (long n = 0; n < w->outputs; n++) {
        out[n] = w->bias[n];
        for (long i = 0; i < w->inputs; i++)
            out[n] += in[i] * (w->factor ? w->factor[i] : 1) * w->exact[n * w->inputs + i];
    }
}

static void apply_norm(struct norm norm, long count, double *row) {
    double mean = 0, variance = 0;
    for (long i = 0; i < count; i++) mean += row[i] / count;
    for (long i = 0; i < count; i++) variance += (row[i] - mean) * (row[i] - mean) / count;
    for (long i = 0; i < count; i++)
        row[i] = (row[i] - mean) / sqrt(variance + 1e-5) * norm.weight[i] + norm.bias[i];
}

/* ---- checks ---- */

static long checked, failed;
static char what[200];

static void expect(int holds, const char *claim, double found) {
    checked++;
    if (holds) return;
    failed++;
    printf("%s: not %s: %g\n", what, claim, found);
}

/* Compares rows of `count` numbers, `apart` from each other, with what they should be. */
static void compare(const bf16 *found, const double *exact, long rows, long count, double most) {
    double off = 0, size = 0;
    for (long i = 0; i < rows * count; i++) {
        const double difference = from_bf16(found[i]) - exact[i];
        off += difference * difference;
        size += exact[i] * exact[i];
    }
    if (rows) expect(sqrt(off) <= most * sqrt(size), "near the reference", sqrt(off / size));
}

static void expect_untouched(const bf16 *out, long count) {
    for (long i = 0; i < count; i++)
        if (out[i] != UNTOUCHED) {
            expect(0, "left alone beyond what was asked for", from_bf16(out[i]));
            return;
        }
    checked++;
}

static bf16 *untouched(long count) {
    bf16 *out = guarded(count * sizeof *out);
    for (long i = 0; i < count; i++) out[i] = UNTOUCHED;
    return out;
}

/* ---- every kernel over its sizes ---- */

/* Everything that depends on an instruction set and on what the numbers are in. */
struct kernels {
    int int8;
    linear_kernel *linear;
    int8_linear_kernel *int8_linear;
    layer_kernel *after_attention;
    attention_kernel *attention;
    memory_kernel *memory;
    stack_kernel *run;
};

static void drive_linear(linear_kernel *bf16_kernel, int8_linear_kernel *int8_kernel, long rows,
                         long begin, long end, long inputs, long outputs, long slice) {
    const int divided = rows % 2;
    struct weight w =
        bf16_kernel ? bf16_weight(outputs, inputs) : int8_weight(outputs, inputs, inputs, divided);
    bf16 *states = states_of(rows * inputs), *out = untouched(rows * outputs);
    const struct int8_linear layer = {w.packed, w.step, w.sums, w.bias, w.factor};
    const int status =
        bf16_kernel
            ? bf16_kernel(states, rows, begin, end, inputs, outputs, w.packed, w.bias, out, slice)
            : int8_kernel(&layer, states, rows, begin, end, inputs, outputs, out, slice);
    expect(status == 0, "done", status);
    double *in = wide(inputs), *exact = wide(outputs);
    for (long r = begin; r < end; r++) {
        for (long i = 0; i < inputs; i++) in[i] = from_bf16(states[r * inputs + i]);
        apply(&w, in, exact);
        bf16 *row = guarded(outputs * sizeof *row);
        for (long n = 0; n < outputs; n++) row[n] = out[(n / slice * rows + r) * slice + n % slice];
        compare(row, exact, 1, outputs, bf16_kernel ? 0.004 : 0.02);
        buffers--;
        munmap(mapped[buffers].at, mapped[buffers].size);
    }
    for (long n = 0; n < outputs; n += slice) {
        expect_untouched(out + n * rows, begin * slice);
        expect_untouched(out + n * rows + end * slice, (rows - end) * slice);
    }
    free(in);
    free(exact);
    free(w.exact);
    free_all();
}

static void drive_layer(layer_kernel *kernel, int int8, long rows, long hidden, long inner) {
    struct weight output, up, down;
    if (int8) {
        output = int8_weight(hidden, hidden, hidden, 0);
        up = int8_weight(inner, hidden, hidden, 1);
        down = int8_weight(hidden, inner, inner < CHUNK ? inner : CHUNK, 0);
    } else {
        output = bf16_weight(hidden, hidden);
        up = bf16_weight(inner, hidden);
        down = bf16_weight(hidden, inner);
    }
    const struct norm first = {vector_of(hidden, 1), vector_of(hidden, 0)};
    const struct norm second = {vector_of(hidden, 1), vector_of(hidden, 0)};
    const struct bf16_layer in_bf16 = {hidden,      inner,       output.packed, up.packed,
                                       down.packed, output.bias, up.bias,       down.bias,
                                       first,       second,      1e-5f};
    const struct int8_layer in_int8 = {
        hidden,
        inner,
        inner < CHUNK ? inner : CHUNK,
        {output.packed, output.step, output.sums, output.bias, output.factor},
        {up.packed, up.step, up.sums, up.bias, up.factor},
        {down.packed, down.step, down.sums, down.bias, down.factor},
        first,
        second,
        1e-5f};
    bf16 *states = states_of(rows * hidden), *attended = states_of(rows * hidden);
    bf16 *out = untouched(rows * hidden);
    const int status =
        kernel(int8 ? (const void *)&in_int8 : &in_bf16, states, attended, rows, out);
    expect(status == 0, "done", status);
    double *exact = wide(rows * hidden), *row = wide(hidden), *middle = wide(hidden);
    double *wider = wide(inner);
    for (long r = 0; r < rows; r++) {
        for (long i = 0; i < hidden; i++) row[i] = from_bf16(attended[r * hidden + i]);
        apply(&output, row, middle);
        for (long i = 0; i < hidden; i++) middle[i] += from_bf16(states[r * hidden + i]);
        apply_norm(first, hidden, middle);
        apply(&up, middle, wider);
        for (long i = 0; i < inner; i++) wider[i] *= (1 + erf(wider[i] / sqrt(2))) / 2;
        apply(&down, wider, exact + r * hidden);
        for (long i = 0; i < hidden; i++) exact[r * hidden + i] += middle[i];
        apply_norm(second, hidden, exact + r * hidden);
    }
    compare(out, exact, rows, hidden, int8 ? 0.015 : 0.006);
    free(exact);
    free(row);
    free(middle);
    free(wider);
    free(output.exact);
    free(up.exact);
    free(down.exact);
    free_all();
}

/* What one query of a pair attends to. */
static void attend(const bf16 *query, const bf16 *key, const bf16 *value, long keys, long head,
                   double *out) {
    double *weights = wide(keys), top = -INFINITY, total = 0;
    for (long k = 0; k < keys; k++) {
        for (long i = 0; i < head; i++)
            weights[k] += from_bf16(query[i]) * from_bf16(key[k * head + i]) / sqrt(head);
        top = fmax(top, weights[k]);
    }
    for (long k = 0; k < keys; k++) total += weights[k] = exp(weights[k] - top);
    for (long i = 0; i < head; i++) out[i] = 0;
    for (long k = 0; k < keys; k++)
        for (long i = 0; i < head; i++)
            out[i] += weights[k] / total * from_bf16(value[k * head + i]);
    free(weights);
}

static void drive_attention(attention_kernel *kernel, const long *lengths, long pairs, long heads,
                            long begin, long end, long head, int single) {
    int32_t *bounds = (int32_t *)((char *)guarded((pairs + 1) * sizeof *bounds) +
                                  (64 - (pairs + 1) * sizeof *bounds % 64) % 64);
    bounds[0] = 0;
    for (long i = 0; i < pairs; i++) bounds[i + 1] = bounds[i] + lengths[i];
    const long rows = bounds[pairs], asked = single ? pairs : rows;
    bf16 *query = states_of(heads * asked * head), *key = states_of(heads * rows * head);
    bf16 *value = states_of(heads * rows * head), *out = untouched(asked * heads * head);
    const int status =
        kernel(query, key, value, bounds, pairs, heads, begin, end, head, single, out);
    expect(status == 0, "done", status);
    double *exact = wide(head);
    for (long pair = 0; pair < pairs; pair++)
        for (long q = single ? pair : bounds[pair]; q < (single ? pair + 1 : bounds[pair + 1]);
             q++) {
            const bf16 *row = out + q * heads * head;
            for (long h = begin; h < end; h++) {
                const long start = (h * rows + bounds[pair]) * head;
                attend(query + (h * asked + q) * head, key + start, value + start, lengths[pair],
                       head, exact);
                compare(row + h * head, exact, 1, head, 0.015);
            }
            expect_untouched(row, begin * head);
            expect_untouched(row + end * head, (heads - end) * head);
        }
    free(exact);
    free_all();
}

static void drive_linears(linear_kernel *bf16_kernel, int8_linear_kernel *int8_kernel) {
    static const long ranges[][3] = {{0, 0, 0},   {1, 0, 1},   {2, 1, 2},    {7, 3, 3},
                                     {31, 0, 31}, {33, 5, 33}, {45, 13, 14}, {600, 70, 590}};
    static const long sizes[][3] = {{64, 32, 32}, {320, 96, 32}, {128, 192, 64}, {1664, 32, 32}};
    for (unsigned i = 0; i < sizeof ranges / sizeof *ranges; i++)
        for (unsigned j = 0; j < sizeof sizes / sizeof *sizes; j++) {
            const long *r = ranges[i], *s = sizes[j];
            sprintf(what, "%s linear of %ld rows, %ld to %ld, %ld inputs, %ld outputs",
                    bf16_kernel ? "bfloat16" : "int8", r[0], r[1], r[2], s[0], s[1]);
            drive_linear(bf16_kernel, int8_kernel, r[0], r[1], r[2], s[0], s[1], s[2]);
        }
}

static void drive_layers(layer_kernel *kernel, int int8) {
    static const long rows[] = {0, 1, 2, 31, 32, 33, 45, 385}, least = 32;
    static const long sizes[][2] = {{64, 64}, {128, 192}, {64, 1088}};
    for (unsigned i = 0; i < sizeof rows / sizeof *rows; i++)
        for (unsigned j = 0; j < sizeof sizes / sizeof *sizes; j++) {
            /* Tiles of bfloat16 are filled by 32 numbers, those of 8 bits by 64. */
            const long less = int8 ? 0 : least, hidden = sizes[j][0] + less;
            sprintf(what, "%s layer of %ld rows, %ld wide, %ld inside", int8 ? "int8" : "bfloat16",
                    rows[i], hidden, sizes[j][1] + less);
            drive_layer(kernel, int8, rows[i], hidden, sizes[j][1] + less);
        }
}

static void drive_attentions(attention_kernel *kernel) {
    static const long lengths[] = {7, 33, 1, 64, 65, 15, 16, 31, 32, 2, 100};
    static const long counts[] = {0, 1, 3, sizeof lengths / sizeof *lengths};
    for (unsigned i = 0; i < sizeof counts / sizeof *counts; i++)
        for (long head = 32; head <= 96; head += 32)
            for (int single = 0; single < 2; single++) {
                sprintf(what, "attention of %ld pairs, heads of %ld%s", counts[i], head,
                        single ? ", first tokens alone" : "");
                drive_attention(kernel, lengths, counts[i], 3, 1, 3, head, single);
                drive_attention(kernel, lengths, counts[i], 1, 0, 1, head, single);
                drive_attention(kernel, lengths, counts[i], 2, 1, 1, head, single);
            }
}

/* A model's layers, as their kernels have them. */
struct model {
    long layers, hidden, inner, heads;
    struct weight of_all[MOST_LAYERS], of_first, output, up, down;
    struct norm first, second;
    struct bf16_layer bf16_after;
    struct int8_layer int8_after;
    struct bf16_stack_layer bf16[MOST_LAYERS];
    struct int8_stack_layer int8[MOST_LAYERS];
};

static struct int8_linear int8_linear_of(struct weight w) {
    return (struct int8_linear){w.packed, w.step, w.sums, w.bias, w.factor};
}

static struct weight weight_of(int int8, long outputs, long inputs, long chunk) {
    struct weight w = int8 ? int8_weight(outputs, inputs, chunk, outputs % 64 == 0)
                           : bf16_weight(outputs, inputs);
    free(w.exact);
    return w;
}

/* All layers have the same weights after attention. */
static struct model *model_of(int int8, long layers, long hidden, long inner, long heads) {
    struct model *m = guarded((sizeof *m + 63) / 64 * 64);
    const long chunk = inner < CHUNK ? inner : CHUNK;
    memset(m, 0, sizeof *m);
    m->layers = layers, m->hidden = hidden, m->inner = inner, m->heads = heads;
    m->of_first = weight_of(int8, hidden, hidden, hidden);
    m->output = weight_of(int8, hidden, hidden, hidden);
    m->up = weight_of(int8, inner, hidden, hidden);
    m->down = weight_of(int8, hidden, inner, chunk);
    m->first = (struct norm){vector_of(hidden, 1), vector_of(hidden, 0)};
    m->second = (struct norm){vector_of(hidden, 1), vector_of(hidden, 0)};
    m->bf16_after = (struct bf16_layer){
        hidden,     inner,        m->output.packed, m->up.packed, m->down.packed, m->output.bias,
        m->up.bias, m->down.bias, m->first,         m->second,    1e-5f};
    m->int8_after = (struct int8_layer){hidden,
                                        inner,
                                        chunk,
                                        int8_linear_of(m->output),
                                        int8_linear_of(m->up),
                                        int8_linear_of(m->down),
                                        m->first,
                                        m->second,
                                        1e-5f};
    for (long i = 0; i < layers; i++) {
        const int last = i + 1 == layers;
        const long outputs = (last ? 2 : 3) * hidden;
        const struct weight w = m->of_all[i] = weight_of(int8, outputs, hidden, hidden);
        m->bf16[i].of_all.packed = w.packed;
        m->bf16[i].of_all.bias = w.bias;
        m->int8[i].of_all.linear = int8_linear_of(w);
        m->bf16[i].of_all.outputs = m->int8[i].of_all.outputs = outputs;
        if (last) {
            m->bf16[i].of_first.packed = m->of_first.packed;
            m->bf16[i].of_first.bias = m->of_first.bias;
            m->int8[i].of_first.linear = int8_linear_of(m->of_first);
            m->bf16[i].of_first.outputs = m->int8[i].of_first.outputs = hidden;
        }
        m->bf16[i].after = &m->bf16_after;
        m->int8[i].after = &m->int8_after;
    }
    return m;
}

static void apply_linear(const struct kernels *by, const struct weight *w, const bf16 *states,
                         long rows, long head, bf16 *out) {
    const struct int8_linear linear = int8_linear_of(*w);
    if (by->int8)
        by->int8_linear(&linear, states, rows, 0, rows, w->inputs, w->outputs, out, head);
    else
        by->linear(states, rows, 0, rows, w->inputs, w->outputs, w->packed, w->bias, out, head);
}

/* What a pack comes to layer by layer, in one thread. */
static void run_apart(const struct kernels *by, const struct model *m, const struct pack *pack,
                      bf16 *states, bf16 *first) {
    const long rows = pack->rows, pairs = pack->pairs, hidden = m->hidden, head = hidden / m->heads;
    const void *after = by->int8 ? (const void *)&m->int8_after : &m->bf16_after;
    bf16 *query = guarded(rows * hidden * sizeof(bf16));
    bf16 *three = guarded(rows * 3 * hidden * sizeof(bf16));
    bf16 *attended = guarded(rows * hidden * sizeof(bf16));
    for (long i = 0; i < m->layers; i++) {
        const int last = i + 1 == m->layers;
        for (long pair = 0; last && pair < pairs; pair++)
            memcpy(first + pair * hidden, states + pack->bounds[pair] * hidden,
                   hidden * sizeof(bf16));
        apply_linear(by, &m->of_all[i], states, rows, head, three);
        if (last) apply_linear(by, &m->of_first, first, pairs, head, query);
        const bf16 *key = last ? three : three + rows * hidden;
        by->attention(last ? query : three, key, key + rows * hidden, pack->bounds, pairs, m->heads,
                      0, m->heads, head, last, attended);
        bf16 *out = last ? first : states;
        by->after_attention(after, out, attended, last ? pairs : rows, out);
    }
}

struct member {
    stack_kernel *run;
    struct pack *pack;
    int status;
};

static void *run_member(void *given) {
    struct member *member = given;
    member->status = member->run(member->pack);
    own.size = 0; /* it ends with the thread */
    return NULL;
}

/* Runs a pack in so many threads, of which each is told whether memory was short. */
static int run_together(const struct kernels *by, struct pack *pack, long threads) {
    pthread_t ids[MOST_THREADS];
    struct member members[MOST_THREADS];
    memset(&pack->progress, 0, sizeof pack->progress);
    pack->threads = threads;
    for (long i = 0; i < threads; i++) {
        members[i] = (struct member){by->run, pack, 1};
        if (pthread_create(ids + i, NULL, run_member, members + i)) abort();
    }
    int status = 0;
    for (long i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        if (i && members[i].status != status) expect(0, "the same for all threads", status);
        status = members[i].status;
    }
    return status;
}

static void drive_pack(const struct kernels *by, const long *lengths, long pairs, long layers,
                       long hidden, long inner, long heads) {
    const struct model *m = model_of(by->int8, layers, hidden, inner, heads);
    int32_t *bounds = (int32_t *)((char *)guarded((pairs + 1) * sizeof *bounds) +
                                  (64 - (pairs + 1) * sizeof *bounds % 64) % 64);
    bounds[0] = 0;
    for (long i = 0; i < pairs; i++) bounds[i + 1] = bounds[i] + lengths[i];
    const long rows = bounds[pairs], size = rows * hidden * sizeof(bf16);
    bf16 *given = states_of(rows * hidden), *states = guarded(size);
    bf16 *expected = untouched(pairs * hidden), *found = untouched(pairs * hidden);
    const void *layer = by->int8 ? (const void *)m->int8 : m->bf16;
    struct pack pack = {rows,  pairs,  heads,         hidden, inner, layers, 0,
                        layer, bounds, by->attention, states, found, NULL,   {0}};
    pack.memory = guarded(by->memory(&pack));
    memcpy(states, given, size);
    run_apart(by, m, &pack, states, expected);
    for (long threads = 1; threads <= MOST_THREADS; threads += 2) {
        memcpy(states, given, size);
        expect(run_together(by, &pack, threads) == 0, "done", threads);
        expect(!memcmp(expected, found, pairs * hidden * sizeof(bf16)), "equal", threads);
        /* Wherever memory is short, all threads come to the end and say so. */
        for (long least = 0; least < 12; least += 4) {
            memcpy(states, given, size);
            __atomic_store_n(&rooms, least, __ATOMIC_RELAXED);
            expect(run_together(by, &pack, threads) == -1, "refused", threads);
            __atomic_store_n(&rooms, 1L << 62, __ATOMIC_RELAXED);
        }
    }
    free_all();
}

static void drive_packs(struct kernels by) {
    static const long lengths[] = {7, 33, 1, 64, 2};
    static const long sizes[][3] = {{64, 64, 2}, {128, 192, 2}, {64, 1088, 1}};
    for (long pairs = 1; pairs <= 5; pairs += 2)
        for (unsigned j = 0; j < sizeof sizes / sizeof *sizes; j++)
            for (long layers = 1; layers <= MOST_LAYERS; layers += 2) {
                const long *s = sizes[j];
                sprintf(what, "%s pack of %ld pairs, %ld layers, %ld wide, %ld inside",
                        by.int8 ? "int8" : "bfloat16", pairs, layers, s[0], s[1]);
                drive_pack(&by, lengths, pairs, layers, s[0], s[1], s[2]);
            }
}

/* `packs` leaves out all that runs in one thread. */
int main(int count, char **arguments) {
    if (count < 2 || count > 3 || (count == 3 && strcmp(arguments[2], "packs"))) return 2;
    const int all = count == 2;
    if (!strcmp(arguments[1], "amx")) {
        if (bge_amx_lack()) return LACKING;
        if (all) {
            drive_linears(bge_amx_linear, NULL);
            drive_linears(NULL, bge_amx_int8_linear);
            drive_layers(bge_amx_after_attention, 0);
            drive_layers(bge_amx_int8_after_attention, 1);
            drive_attentions(bge_amx_attention);
        }
        drive_packs((struct kernels){0, bge_amx_linear, NULL, bge_amx_after_attention,
                                     bge_amx_attention, bge_amx_stack_memory, bge_amx_stack_run});
        drive_packs((struct kernels){1, NULL, bge_amx_int8_linear, bge_amx_int8_after_attention,
                                     bge_amx_attention, bge_amx_int8_stack_memory,
                                     bge_amx_int8_stack_run});
    } else if (!strcmp(arguments[1], "avx512_vnni")) {
        if (bge_avx512_vnni_lack()) return LACKING;
        if (all) {
            drive_linears(NULL, bge_avx512_vnni_int8_linear);
            drive_layers(bge_avx512_vnni_int8_after_attention, 1);
            drive_attentions(bge_avx512_vnni_attention);
        }
        drive_packs((struct kernels){1, NULL, bge_avx512_vnni_int8_linear,
                                     bge_avx512_vnni_int8_after_attention,
                                     bge_avx512_vnni_attention, bge_avx512_vnni_int8_stack_memory,
                                     bge_avx512_vnni_int8_stack_run});
    } else if (!strcmp(arguments[1], "avx512_bf16")) {
        if (bge_avx512_bf16_lack()) return LACKING;
        if (all) drive_attentions(bge_avx512_bf16_attention);
    } else {
        return 2;
    }
    printf("%ld checks, %ld failed\n", checked, failed);
    return failed > 0;
}
