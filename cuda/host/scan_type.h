/* The scan of one element type; scan.c defines TYPE, CODE, KEY and the limits, and includes this once per type. */

#define OF_TYPE(name) JOIN(name, TYPE)
#define MAGNITUDE(code) ((KEY)((code) & ~((CODE)1 << (8 * sizeof(KEY) - 1))))
#define LARGEST ((KEY)(((CODE)1 << (8 * sizeof(KEY) - 1)) - 1))

/* Negative codes bit-flipped below the sign: signed order of keys = order of values; ~key is a negative's magnitude. */
static inline KEY OF_TYPE(key_of)(CODE code)
{
    return (KEY)((KEY)code ^ (((KEY)code >> (8 * sizeof(KEY) - 1)) & LARGEST));
}

static inline double OF_TYPE(value_of_key)(KEY key)
{
    return VALUE((CODE)OF_TYPE(key_of)((CODE)key)) + 0.0; /* the map is its own inverse; + 0.0 makes -0 a 0 */
}

/* Largest and smallest key of x[n], and how many magnitudes lie at or below `small`. n fits in KEY's unsigned range. */
static void OF_TYPE(bounds)(const CODE *x, size_t n, KEY *low, KEY *high, int64_t *n_small)
{
    const KEY small = UNDERFLOW > NORMAL - 1 ? UNDERFLOW : NORMAL - 1;
    KEY lo = LARGEST, hi = (KEY)~LARGEST, count = 0;
#pragma omp simd reduction(max : hi) reduction(min : lo) reduction(+ : count)
    for (size_t i = 0; i < n; i++) {
        KEY key = OF_TYPE(key_of)(x[i]);
        hi = key > hi ? key : hi;
        lo = key < lo ? key : lo;
        count += (KEY)(MAGNITUDE(x[i]) <= small);
    }
    *low = lo;
    *high = hi;
    *n_small = count;
}

static void OF_TYPE(count_small)(const CODE *x, size_t n, scan_result *out)
{
    KEY zero = 0, below_normal = 0, underflow = 0;
#pragma omp simd reduction(+ : zero, below_normal, underflow)
    for (size_t i = 0; i < n; i++) {
        KEY magnitude = MAGNITUDE(x[i]);
        zero += (KEY)(magnitude == 0);
        below_normal += (KEY)(magnitude < NORMAL);
        underflow += (KEY)(magnitude <= UNDERFLOW);
    }
    out->n_zero += zero;
    out->n_subnormal += below_normal - zero;
    out->n_fp16_underflow += underflow - zero;
}

/* Counts NaN, Inf and fp16 overflow, and gives the bounds again over finite values. */
static void OF_TYPE(count_large)(const CODE *x, size_t n, KEY *low, KEY *high, scan_result *out)
{
    KEY lo = LARGEST, hi = (KEY)~LARGEST, nan = 0, nonfinite = 0, overflow = 0;
#pragma omp simd reduction(max : hi) reduction(min : lo) reduction(+ : nan, nonfinite, overflow)
    for (size_t i = 0; i < n; i++) {
        KEY magnitude = MAGNITUDE(x[i]), key = OF_TYPE(key_of)(x[i]);
        KEY key_low = magnitude < INF ? key : LARGEST, key_high = magnitude < INF ? key : (KEY)~LARGEST;
        hi = key_high > hi ? key_high : hi;
        lo = key_low < lo ? key_low : lo;
        nan += (KEY)(magnitude > INF);
        nonfinite += (KEY)(magnitude >= INF);
        overflow += (KEY)(magnitude >= OVERFLOW);
    }
    *low = lo;
    *high = hi;
    out->n_nan += nan;
    out->n_inf += nonfinite - nan;
    out->n_fp16_overflow += overflow - nonfinite;
}

/* Sums of the finite values of x[n] in float64. */
static void OF_TYPE(sum_carefully)(const CODE *x, size_t n, double *sum, double *sumsq)
{
    double s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
    for (size_t i = 0; i < n; i++) {
        CODE code = MAGNITUDE(x[i]) < INF ? x[i] : 0;
        double value = VALUE(code);
        s += value;
        q += value * value;
    }
    *sum += s;
    *sumsq += q;
}

static void OF_TYPE(sum_block)(const CODE *x, size_t n, KEY absmax, scan_result *out)
{
    size_t done = 0;
#ifdef RUN
    if (absmax >= SUM_FLOOR && absmax < OVERFLOW)
        for (; done + SUM_RUN <= n; done += SUM_RUN)
            RUN(x + done, &out->sum, &out->sumsq);
#endif
    if (absmax > 0 && done < n)
        OF_TYPE(sum_carefully)(x + done, n - done, &out->sum, &out->sumsq);
}

/* Statistics of x[n]. `out` is written, never read. */
void EXPORT(OF_TYPE(doctor_scan))(const void *data, int64_t n, scan_result *out)
{
    const CODE *x = data;
    const size_t block = BLOCK_BYTES / sizeof(CODE), numel = (size_t)n;
    KEY lowest = LARGEST, highest = (KEY)~LARGEST;
    *out = (scan_result){.first_nonfinite = -1};
    for (size_t start = 0; start < numel; start += block) {
        const CODE *part = x + start;
        size_t length = numel - start < block ? numel - start : block;
        KEY low, high;
        int64_t n_small;
        OF_TYPE(bounds)(part, length, &low, &high, &n_small);
        KEY absmax = (KEY)~low > high ? (KEY)~low : high;
        if (n_small)
            OF_TYPE(count_small)(part, length, out);
        if (absmax >= OVERFLOW)
            OF_TYPE(count_large)(part, length, &low, &high, out);
        if (absmax >= INF && out->first_nonfinite < 0) {
            size_t i = 0;
            while (MAGNITUDE(part[i]) < INF)
                i++;
            out->first_nonfinite = (int64_t)(start + i);
        }
        OF_TYPE(sum_block)(part, length, absmax, out);
        lowest = low < lowest ? low : lowest;
        highest = high > highest ? high : highest;
    }
    if (lowest <= highest) {
        out->min = OF_TYPE(value_of_key)(lowest);
        out->max = OF_TYPE(value_of_key)(highest);
        out->absmax = -out->min > out->max ? -out->min : out->max;
    }
}

/* Groups of a chunk of whole rows x[rows, k], `group` columns each, the last of a row shorter where group does not
 * divide k. out i64[3]: groups whose values are all 0, those all 0 only after a cast to fp16, and the index
 * (row * groups in a row + group in the row) of the first of either, -1 if none. */
void EXPORT(OF_TYPE(doctor_group_zeros))(const void *data, int64_t rows, int64_t k, int64_t group, int64_t *out)
{
    const CODE *x = data;
    int64_t index = 0;
    out[0] = out[1] = 0;
    out[2] = -1;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t start = 0; start < k; start += group, index++) {
            const CODE *part = x + row * k + start;
            int64_t length = k - start < group ? k - start : group;
            KEY largest = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < length; i++) {
                KEY magnitude = MAGNITUDE(part[i]);
                largest = magnitude > largest ? magnitude : largest;
            }
            if (largest > UNDERFLOW)
                continue;
            out[largest != 0]++;
            if (out[2] < 0)
                out[2] = index;
        }
    }
}

/* Largest finite magnitude code of each row of x[rows, k] into by_row[rows], and of each column into by_column[k]. */
void EXPORT(OF_TYPE(doctor_absmax))(const void *data, int64_t rows, int64_t k, KEY *restrict by_row,
                                    KEY *restrict by_column)
{
    const CODE *x = data;
    for (int64_t j = 0; j < k; j++)
        by_column[j] = 0;
    for (int64_t row = 0; row < rows; row++) {
        KEY largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < k; j++) {
            KEY magnitude = MAGNITUDE(x[row * k + j]);
            magnitude = magnitude < INF ? magnitude : 0;
            largest = magnitude > largest ? magnitude : largest;
            by_column[j] = magnitude > by_column[j] ? magnitude : by_column[j];
        }
        by_row[row] = largest;
    }
}

#undef OF_TYPE
#undef MAGNITUDE
#undef LARGEST
#undef TYPE
#undef CODE
#undef KEY
#undef INF
#undef OVERFLOW
#undef UNDERFLOW
#undef NORMAL
#undef SUM_FLOOR
#undef RUN
#undef VALUE
