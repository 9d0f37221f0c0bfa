/* Selective scan and its gradients on a CPU; selective_scan_native.py compiles and calls this.

   A task is one sequence and a group of its blocks of channels; a block is as wide as a vector register.
   A block walks all steps, or all steps of a chunk, before the next block begins, so its state, N vectors,
   stays in the first-level cache. Forward saves the state before every chunk. Backward takes the chunks
   from the last to the first, computes a chunk's states anew and walks them from their end. No sum depends
   on the order in which threads finish, so the result is the same on every run. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define CHUNK 16 /* _CHUNK in selective_scan_native.py; at 8 the saved states cost more than they spare */

typedef int64_t size;
typedef float vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4)));

static const float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

/* Elements from one sequence to the next and from one step to the next; rows are contiguous. */
typedef struct {
    size row, step;
} Strides;

/* All arguments, NULL for what is left out; `_Arguments` in selective_scan_native.py has the same fields.
   What has no strides is contiguous. */
typedef struct {
    size rows, L, E, N, groups, with_softplus;
    Strides u_strides, delta_strides, B_strides, C_strides, z_strides, dy_strides;
    const float *u, *delta, *z; /* (rows, L, E) */
    const float *B, *C;         /* (rows, L, N) */
    const float *A;             /* (E, N) */
    const float *D, *bias;      /* (E) */
    const float *state;         /* (rows, E, N) */
    float *y, *last;            /* (rows, L, E) and (rows, E, N) */
    float *saved;               /* (rows, blocks, chunks, N, WIDTH): the state before every chunk */
    const float *dy, *dlast;    /* gradients of y and of the last state */
    float *du, *ddelta, *dz;    /* (rows, L, E) */
    float *dB, *dC;             /* (groups, rows, L, N): sums over a group's channels */
    float *dA, *dstate;         /* (rows, E, N), dA a sum over the steps */
    float *dD, *dbias;          /* (rows, E): sums over the steps */
} Scan;

static size divide_up(size a, size b) { return (a + b - 1) / b; }

/* The first `count` numbers, at most WIDTH, and zeros. */
static inline vec load(const float *from, size count) {
    vec v = {0};
    if (count >= WIDTH) memcpy(&v, from, sizeof v);
    else memcpy(&v, from, count * sizeof(float));
    return v;
}

static inline vec load_or_zero(const float *from, size at, size count) {
    return from ? load(from + at, count) : (vec){0};
}

static inline void store(float *to, vec v, size count) {
    if (count >= WIDTH) memcpy(to, &v, sizeof v);
    else memcpy(to, &v, count * sizeof(float));
}

static inline float sum_lanes(vec v) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += v[i];
    return total;
}

/* 2^v to 1e-7 of its value: exactly 1 for 0; 0 below -127, so no denormals; infinite above 128; NaN for NaN
   and for infinite v, whose rest f is none.
   The sum with 1.5 * 2^23 has the nearest whole number in its last bits. That integer is limited and not v,
   because a limit of floats that keeps NaN takes two instructions. */
static inline vec exp2_of(vec v) {
    const int32_t zero = 0x4b400000; /* the bits of 1.5 * 2^23 */
    vec shifted = v + 12582912.0f, f = v - (shifted - 12582912.0f);
    ivec whole = (ivec)shifted;
    for (int i = 0; i < WIDTH; i++) whole[i] = whole[i] > zero + 128 ? zero + 128 : whole[i];
    for (int i = 0; i < WIDTH; i++) whole[i] = whole[i] < zero - 127 ? zero - 127 : whole[i];
    vec p = f * 1.3264726e-3f + 9.671513e-3f;
    p = f * p + 5.5507336e-2f;
    p = f * p + 2.4022242e-1f;
    p = f * p + 6.93147e-1f;
    p = f * p + 1.0f;
    return p * (vec)((whole << 23) + (127 << 23)); /* the shift leaves nothing of `zero` */
}

static inline vec sigmoid(vec v) { return 1.0f / (1.0f + exp2_of(v * -LOG2_E)); }

/* log(1 + exp(v)) = max(v, 0) + 2 artanh(s) by its series, exact for small steps too. */
static inline vec softplus(vec v) {
    vec absolute = (vec)((ivec)v & 0x7fffffff);
    vec p = exp2_of(absolute * -LOG2_E);
    vec s = p / (2.0f + p), q = s * s;
    vec series = q * (1.0f / 13) + 1.0f / 11;
    series = q * series + 1.0f / 9;
    series = q * series + 1.0f / 7;
    series = q * series + 1.0f / 5;
    series = q * series + 1.0f / 3;
    series = q * series + 1.0f;
    return 0.5f * v + 0.5f * absolute + 2.0f * s * series;
}

/* A block of channels of a matrix (E, N), as N vectors times `factor`; zeros for NULL. */
static void read_block(vec *block, const float *matrix, size N, size count, float factor) {
    memset(block, 0, N * sizeof(vec));
    if (!matrix) return;
    for (size i = 0; i < count && i < WIDTH; i++)
        for (size n = 0; n < N; n++) block[n][i] = matrix[i * N + n] * factor;
}

static void write_block(float *matrix, const vec *block, size N, size count) {
    for (size i = 0; i < count && i < WIDTH; i++)
        for (size n = 0; n < N; n++) matrix[i * N + n] = block[n][i];
}

static vec *allocate_vectors(size count) { return aligned_alloc(sizeof(vec), count * sizeof(vec)); }

static const float *at_step(const float *from, Strides strides, size b, size t) {
    return from + b * strides.row + t * strides.step;
}

static float *saved_state(const Scan *s, size b, size block, size chunk) {
    size blocks = divide_up(s->E, WIDTH), chunks = divide_up(s->L, CHUNK);
    return s->saved + ((b * blocks + block) * chunks + chunk) * s->N * WIDTH;
}

/* One block of channels of sequence b through all steps: h is its state, in and out. */
static void run_block(const Scan *s, size b, size block, const vec *restrict a, vec *restrict h) {
    size e = block * WIDTH, count = s->E - e, N = s->N;
    vec shift = load_or_zero(s->bias, e, count), skip = load_or_zero(s->D, e, count);
    for (size t = 0; t < s->L; t++) {
        if (s->saved && t % CHUNK == 0) memcpy(saved_state(s, b, block, t / CHUNK), h, N * sizeof(vec));
        vec x = load(at_step(s->u, s->u_strides, b, t) + e, count);
        vec step = load(at_step(s->delta, s->delta_strides, b, t) + e, count) + shift;
        if (s->with_softplus) step = softplus(step);
        vec added = step * x, out = skip * x;
        const float *B = at_step(s->B, s->B_strides, b, t), *C = at_step(s->C, s->C_strides, b, t);
        for (size n = 0; n < N; n++) {
            h[n] = exp2_of(step * a[n]) * h[n] + added * B[n];
            out += h[n] * C[n];
        }
        if (s->z) {
            vec gate = load(at_step(s->z, s->z_strides, b, t) + e, count);
            out *= gate * sigmoid(gate);
        }
        store(s->y + (b * s->L + t) * s->E + e, out, count);
    }
}

/* From u to y, last and, unless it is NULL, saved. Returns 1 if memory is missing, else 0. */
int scan_forward(const Scan *s) {
    size blocks = divide_up(s->E, WIDTH), N = s->N;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (size task = 0; task < s->rows * s->groups; task++) {
        size b = task / s->groups, group = task % s->groups;
        vec *a = allocate_vectors(2 * N), *h = a + N;
        if (!a) {
            failed = 1;
            continue;
        }
        for (size block = blocks * group / s->groups; block < blocks * (group + 1) / s->groups; block++) {
            size e = block * WIDTH, state = (b * s->E + e) * N;
            read_block(a, s->A + e * N, N, s->E - e, LOG2_E);
            read_block(h, s->state ? s->state + state : NULL, N, s->E - e, 1);
            run_block(s, b, block, a, h);
            write_block(s->last + state, h, N, s->E - e);
        }
        free(a);
    }
    return failed;
}

/* What backward keeps of a block of channels from chunk to chunk: a is A in units of log 2, g the gradient of
   the state, the others sums over the steps. */
typedef struct {
    vec *a, *g, *sum_A, *sum_D, *sum_bias;
} Block;

#define BLOCK_VECTORS(N) (3 * (N) + 2)

static Block get_block(vec *memory, size index, size N) {
    vec *own = memory + index * BLOCK_VECTORS(N);
    return (Block){own, own + N, own + 2 * N, own + 3 * N, own + 3 * N + 1};
}

/* What backward keeps of a block's chunk: by step one vector, or N for states (one more), decays and the
   chunk's shares of dB and dC, which all blocks of a group add to. */
typedef struct {
    vec x[CHUNK], raw[CHUNK], step[CHUNK], added[CHUNK], grad[CHUNK];
    vec *states, *decays, *sum_B, *sum_C;
} Chunk;

#define CHUNK_VECTORS(N) ((4 * CHUNK + 1) * (N))

/* Compute a chunk's states anew, and the gradients of the outputs before the gate. */
static void restore_chunk(const Scan *s, size b, size block, size chunk, const vec *restrict a, Chunk *c) {
    size e = block * WIDTH, count = s->E - e, N = s->N, start = chunk * CHUNK;
    vec shift = load_or_zero(s->bias, e, count), skip = load_or_zero(s->D, e, count);
    memcpy(c->states, saved_state(s, b, block, chunk), N * sizeof(vec));
    for (size j = 0, t = start; j < CHUNK && t < s->L; j++, t++) {
        vec x = load(at_step(s->u, s->u_strides, b, t) + e, count);
        vec raw = load(at_step(s->delta, s->delta_strides, b, t) + e, count) + shift;
        vec step = s->with_softplus ? softplus(raw) : raw, added = step * x, out = skip * x;
        const float *B = at_step(s->B, s->B_strides, b, t), *C = at_step(s->C, s->C_strides, b, t);
        vec *restrict before = c->states + j * N, *restrict after = before + N;
        vec *restrict decay = c->decays + j * N;
        for (size n = 0; n < N; n++) {
            decay[n] = exp2_of(step * a[n]);
            after[n] = decay[n] * before[n] + added * B[n];
            out += after[n] * C[n];
        }
        vec grad = load(at_step(s->dy, s->dy_strides, b, t) + e, count);
        if (s->z) {
            vec gate = load(at_step(s->z, s->z_strides, b, t) + e, count), open = sigmoid(gate);
            vec slope = open * (1.0f + gate * (1.0f - open));
            store(s->dz + (b * s->L + t) * s->E + e, grad * out * slope, count);
            grad *= gate * open;
        }
        c->x[j] = x, c->raw[j] = raw, c->step[j] = step, c->added[j] = added, c->grad[j] = grad;
    }
}

/* Walk a chunk's states from their end and collect all gradients. */
static void walk_back(const Scan *s, size b, size block, size chunk, Block own, Chunk *c) {
    size e = block * WIDTH, count = s->E - e, N = s->N, start = chunk * CHUNK;
    size steps = s->L - start < CHUNK ? s->L - start : CHUNK;
    vec skip = load_or_zero(s->D, e, count);
    vec *restrict a = own.a, *restrict g = own.g, *restrict sum_A = own.sum_A;
    for (size j = steps - 1; j >= 0; j--) {
        size t = start + j, place = (b * s->L + t) * s->E + e;
        vec grad = c->grad[j], added = c->added[j], step = c->step[j], dadded = {0}, dexponent = {0};
        const float *B = at_step(s->B, s->B_strides, b, t), *C = at_step(s->C, s->C_strides, b, t);
        vec *restrict before = c->states + j * N, *restrict after = before + N;
        vec *restrict decay = c->decays + j * N;
        vec *restrict sum_B = c->sum_B + j * N, *restrict sum_C = c->sum_C + j * N;
        for (size n = 0; n < N; n++) {
            vec dh = g[n] + grad * C[n];
            sum_C[n] += grad * after[n];
            sum_B[n] += added * dh;
            dadded += dh * B[n];
            g[n] = dh * decay[n];
            vec share = g[n] * before[n]; /* the gradient of step * A */
            sum_A[n] += share * step;
            dexponent += share * a[n];
        }
        vec dstep = dexponent * LN_2 + dadded * c->x[j];
        if (s->with_softplus) dstep *= sigmoid(c->raw[j]);
        store(s->du + place, dadded * step + skip * grad, count);
        store(s->ddelta + place, dstep, count);
        *own.sum_D += grad * c->x[j];
        *own.sum_bias += dstep;
    }
}

/* One group of blocks of sequence b through all chunks; memory for its blocks and for one chunk. */
static void run_group_back(const Scan *s, size b, size group, size first, size end, vec *memory) {
    size N = s->N;
    vec *rest = memory + (end - first) * BLOCK_VECTORS(N);
    Chunk c = {.states = rest, .decays = rest + (CHUNK + 1) * N};
    c.sum_B = c.decays + CHUNK * N, c.sum_C = c.sum_B + CHUNK * N;
    memset(memory, 0, (end - first) * BLOCK_VECTORS(N) * sizeof(vec));
    for (size block = first; block < end; block++) {
        size e = block * WIDTH;
        Block own = get_block(memory, block - first, N);
        read_block(own.a, s->A + e * N, N, s->E - e, LOG2_E);
        read_block(own.g, s->dlast ? s->dlast + (b * s->E + e) * N : NULL, N, s->E - e, 1);
    }
    for (size chunk = divide_up(s->L, CHUNK) - 1; chunk >= 0; chunk--) {
        size start = chunk * CHUNK, steps = s->L - start < CHUNK ? s->L - start : CHUNK;
        size place = ((group * s->rows + b) * s->L + start) * N;
        memset(c.sum_B, 0, 2 * CHUNK * N * sizeof(vec));
        for (size block = first; block < end; block++) {
            Block own = get_block(memory, block - first, N);
            restore_chunk(s, b, block, chunk, own.a, &c);
            walk_back(s, b, block, chunk, own, &c);
        }
        for (size i = 0; i < steps * N; i++) s->dB[place + i] = sum_lanes(c.sum_B[i]);
        for (size i = 0; i < steps * N; i++) s->dC[place + i] = sum_lanes(c.sum_C[i]);
    }
    for (size block = first; block < end; block++) {
        size e = block * WIDTH, count = s->E - e, state = (b * s->E + e) * N;
        Block own = get_block(memory, block - first, N);
        write_block(s->dstate + state, own.g, N, count);
        write_block(s->dA + state, own.sum_A, N, count);
        if (s->D) store(s->dD + b * s->E + e, *own.sum_D, count);
        if (s->bias) store(s->dbias + b * s->E + e, *own.sum_bias, count);
    }
}

/* From dy and dlast to the gradients of all arguments. Returns 1 if memory is missing, else 0. */
int scan_backward(const Scan *s) {
    size blocks = divide_up(s->E, WIDTH);
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (size task = 0; task < s->rows * s->groups; task++) {
        size b = task / s->groups, group = task % s->groups;
        size first = blocks * group / s->groups, end = blocks * (group + 1) / s->groups;
        vec *memory = allocate_vectors((end - first) * BLOCK_VECTORS(s->N) + CHUNK_VECTORS(s->N));
        if (memory) run_group_back(s, b, group, first, end, memory);
        else failed = 1;
        free(memory);
    }
    return failed;
}
