/* The scan of one element type; scan.c defines TYPE, CODE, KEY, UKEY and the limits, and includes this once per type. */

#define OF_TYPE(name) JOIN(name, TYPE)
#define SIGN ((UKEY)((UKEY)1 << (8 * sizeof(KEY) - 1)))
#define LARGEST ((KEY)(SIGN - 1))
#define MAGNITUDE(code) ((KEY)((code) & (UKEY)LARGEST))

/* Negative codes bit-flipped below the sign, so that keys order as the values do; ~key is a negative's magnitude. */
static inline KEY OF_TYPE(key_of)(UKEY code)
{
    return (KEY)(code ^ (UKEY)(((KEY)code >> (8 * sizeof(KEY) - 1)) & LARGEST));
}

static inline double OF_TYPE(value_of_key)(KEY key)
{
    return VALUE(OF_TYPE(key_of)((UKEY)key)) + 0.0; /* the map is its own inverse; + 0.0 makes -0 a 0 */
}

typedef struct {
    KEY signed_max, least_magnitude;
    UKEY unsigned_max;
} OF_TYPE(bounds);

static OF_TYPE(bounds) OF_TYPE(bound)(const CODE *x, size_t n)
{
    KEY signed_max = (KEY)SIGN, least = LARGEST;
    UKEY unsigned_max = 0;
#pragma omp simd reduction(max : signed_max, unsigned_max) reduction(min : least)
    for (size_t i = 0; i < n; i++) {
        UKEY code = x[i];
        KEY magnitude = MAGNITUDE(code);
        signed_max = (KEY)code > signed_max ? (KEY)code : signed_max;
        unsigned_max = code > unsigned_max ? code : unsigned_max;
        least = magnitude < least ? magnitude : least;
    }
    return (OF_TYPE(bounds)){signed_max, least, unsigned_max};
}

/* Least and largest key of the finite values of x[n]; low > high if there are none. */
static void OF_TYPE(bound_finite)(const CODE *x, size_t n, KEY *low, KEY *high)
{
    KEY lo = LARGEST, hi = (KEY)SIGN;
#pragma omp simd reduction(max : hi) reduction(min : lo)
    for (size_t i = 0; i < n; i++) {
        KEY key = OF_TYPE(key_of)(x[i]), magnitude = MAGNITUDE(x[i]);
        KEY key_low = magnitude < INF ? key : LARGEST, key_high = magnitude < INF ? key : (KEY)SIGN;
        hi = key_high > hi ? key_high : hi;
        lo = key_low < lo ? key_low : lo;
    }
    *low = lo;
    *high = hi;
}

/* The counters are KEYs, so that they share the lanes of the codes: n is at most BLOCK_BYTES / sizeof(KEY). */
static void OF_TYPE(count_small)(const CODE *x, size_t n, scan_result *out)
{
    KEY zero = 0, below_normal = 0, underflow = 0;
#pragma omp simd reduction(+ : zero, below_normal, underflow)
    for (size_t i = 0; i < n; i++) {
        KEY magnitude = MAGNITUDE(x[i]);
        zero += (KEY)(magnitude == 0);
        below_normal += (KEY)(magnitude < NORMAL);
        underflow += (KEY)(UNDERFLOW && magnitude <= UNDERFLOW);
    }
    out->n_zero += zero;
    out->n_subnormal += below_normal - zero;
    out->n_fp16_underflow += UNDERFLOW ? underflow - zero : 0;
}

static void OF_TYPE(count_large)(const CODE *x, size_t n, scan_result *out)
{
    KEY nan = 0, nonfinite = 0, overflow = 0;
#pragma omp simd reduction(+ : nan, nonfinite, overflow)
    for (size_t i = 0; i < n; i++) {
        KEY magnitude = MAGNITUDE(x[i]);
        nan += (KEY)(magnitude > INF);
        nonfinite += (KEY)(magnitude >= INF);
        overflow += (KEY)(magnitude >= OVERFLOW);
    }
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

#ifdef LOAD4
/* Sums of x[n], n a multiple of SUM_RUN. Four accumulators, for one alone would wait for each of its additions; they
 * go to float64 after SUM_RUN values, at most 64 additions in a row (measured worst relative error 1e-6). */
static void OF_TYPE(sum_fast)(const CODE *x, size_t n, double *sum, double *sumsq)
{
    wide all = {0}, all_squared = {0};
    for (size_t start = 0; start < n; start += SUM_RUN) {
        lanes s[4] = {{0}}, q[4] = {{0}};
        for (int i = 0; i < SUM_RUN; i += 4 * LANES) {
            lanes v[4];
            LOAD4(x + start + i, v);
            for (int c = 0; c < 4; c++) {
                s[c] += v[c];
                q[c] += v[c] * v[c];
            }
        }
        all += __builtin_convertvector((s[0] + s[1]) + (s[2] + s[3]), wide);
        all_squared += __builtin_convertvector((q[0] + q[1]) + (q[2] + q[3]), wide);
    }
    for (int lane = 0; lane < LANES; lane++) {
        *sum += all[lane];
        *sumsq += all_squared[lane];
    }
}
#endif

static void OF_TYPE(sum_block)(const CODE *x, size_t n, KEY absmax, scan_result *out)
{
    size_t done = 0;
#ifdef LOAD4
    if (absmax >= SUM_FLOOR && absmax < OVERFLOW) {
        done = n - n % SUM_RUN;
        OF_TYPE(sum_fast)(x, done, &out->sum, &out->sumsq);
    }
#endif
    if (absmax > 0 && done < n)
        OF_TYPE(sum_carefully)(x + done, n - done, &out->sum, &out->sumsq);
}

/* One block: counters and sums into `out`, and the keys of its least and largest finite value. */
static void OF_TYPE(scan_block)(const CODE *x, size_t n, KEY *low, KEY *high, scan_result *out)
{
    const KEY small = UNDERFLOW > NORMAL - 1 ? UNDERFLOW : NORMAL - 1;
    OF_TYPE(bounds) b = OF_TYPE(bound)(x, n);
    int has_negative = b.unsigned_max >= SIGN, has_positive = b.signed_max >= 0;
    KEY negative = has_negative ? MAGNITUDE(b.unsigned_max) : 0, positive = has_positive ? b.signed_max : 0;
    KEY absmax = negative > positive ? negative : positive;
    if (b.least_magnitude <= small)
        OF_TYPE(count_small)(x, n, out);
    if (absmax >= OVERFLOW)
        OF_TYPE(count_large)(x, n, out);
    if (has_negative && has_positive && absmax < INF) {
        *low = (KEY)~negative;
        *high = positive;
    } else {
        OF_TYPE(bound_finite)(x, n, low, high);
    }
    OF_TYPE(sum_block)(x, n, absmax, out);
}

/* The blocks of x[n], of which the first is at `at` in the buffer, into out and the keys so far. */
static void OF_TYPE(scan_run)(const CODE *x, size_t n, size_t at, KEY *lowest, KEY *highest, scan_result *out)
{
    const size_t block = BLOCK_BYTES / sizeof(CODE);
    for (size_t start = 0; start < n; start += block) {
        size_t length = n - start < block ? n - start : block;
        KEY low, high;
        OF_TYPE(scan_block)(x + start, length, &low, &high, out);
        *lowest = low < *lowest ? low : *lowest;
        *highest = high > *highest ? high : *highest;
        if (out->first_nonfinite < 0 && out->n_nan + out->n_inf) {
            size_t i = start;
            while (MAGNITUDE(x[i]) < INF)
                i++;
            out->first_nonfinite = (int64_t)(at + i);
        }
    }
}

static void OF_TYPE(put_bounds)(KEY lowest, KEY highest, scan_result *out)
{
    if (lowest > highest)
        return;
    out->min = OF_TYPE(value_of_key)(lowest);
    out->max = OF_TYPE(value_of_key)(highest);
    out->absmax = -out->min > out->max ? -out->min : out->max;
}

/* Statistics of x[n]. `out` is written, never read. */
void EXPORT(OF_TYPE(doctor_scan))(const void *data, int64_t n, scan_result *out)
{
    KEY lowest = LARGEST, highest = (KEY)SIGN;
    *out = (scan_result){.first_nonfinite = -1};
    OF_TYPE(scan_run)(data, (size_t)n, 0, &lowest, &highest, out);
    OF_TYPE(put_bounds)(lowest, highest, out);
}

/* The same of n elements at `offset` of a file, which also go into data[n]: each piece is counted while the second-level cache still
 * holds it. Returns the bytes that were read, fewer than asked for only at the end of the file, or -errno. */
int64_t EXPORT(OF_TYPE(doctor_read_scan))(int fd, int64_t offset, void *data, int64_t n, scan_result *out)
{
    KEY lowest = LARGEST, highest = (KEY)SIGN;
    const size_t size = (size_t)n * sizeof(CODE);
    size_t done = 0;
    *out = (scan_result){.first_nonfinite = -1};
    while (done < size) {
        size_t piece = size - done < PIECE_BYTES ? size - done : PIECE_BYTES;
        int64_t got = read_fully(fd, (u8 *)data + done, piece, offset + (int64_t)done);
        if (got < 0)
            return got;
        if ((size_t)got < piece)
            return (int64_t)done + got;
        OF_TYPE(scan_run)((const CODE *)((u8 *)data + done), piece / sizeof(CODE), done / sizeof(CODE), &lowest, &highest, out);
        done += piece;
    }
    OF_TYPE(put_bounds)(lowest, highest, out);
    return (int64_t)done;
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

/* Largest magnitude code of each row of x[rows, k] into by_row[rows], and of each column into by_column[k]; NaN counts
 * as Inf, so that a row of NaN is never taken for a row of zeros. */
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
            magnitude = magnitude < INF ? magnitude : INF;
            largest = magnitude > largest ? magnitude : largest;
            by_column[j] = magnitude > by_column[j] ? magnitude : by_column[j];
        }
        by_row[row] = largest;
    }
}

#undef OF_TYPE
#undef MAGNITUDE
#undef SIGN
#undef LARGEST
#undef TYPE
#undef CODE
#undef KEY
#undef UKEY
#undef INF
#undef OVERFLOW
#undef UNDERFLOW
#undef NORMAL
#undef SUM_FLOOR
#undef LOAD4
#undef VALUE
