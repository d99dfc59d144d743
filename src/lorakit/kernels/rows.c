/* y_i += U_i^T (D_i x_i) for each row i: `rows` of grouped.py, in one pass over the factors.
 *
 * x (n, in), y (n, out); D (n, rank, in) and U (n, rank, out), whose matrices are `down_step` and `up_step` apart.
 * Every factor is read once and used at once, so it takes as long as memory takes to bring the factors.
 */
void lorakit_rows(long n, long rank, long in, long out, const float *x, const float *down, long down_step,
                  const float *up, long up_step, float *y, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long i = 0; i < n; i++) {
        const float *given = x + i * in, *d = down + i * down_step, *u = up + i * up_step;
        float *made = y + i * out;
        for (long r = 0; r < rank; r += 4) {
            long width = rank - r < 4 ? rank - r : 4;
            float thin[4] = {0, 0, 0, 0};
            for (long k = 0; k < width; k++) {
                const float *line = d + (r + k) * in;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (long j = 0; j < in; j++)
                    sum += given[j] * line[j];
                thin[k] = sum;
            }
            if (width == 4) {
                const float *a = u + r * out, *b = a + out, *c = b + out, *e = c + out;
#pragma omp simd
                for (long j = 0; j < out; j++)
                    made[j] += thin[0] * a[j] + thin[1] * b[j] + thin[2] * c[j] + thin[3] * e[j];
            } else {
                for (long k = 0; k < width; k++) {
                    const float *line = u + (r + k) * out;
#pragma omp simd
                    for (long j = 0; j < out; j++)
                        made[j] += thin[k] * line[j];
                }
            }
        }
    }
}
