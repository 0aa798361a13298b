/* Which of the compiled instruction levels this processor can run.
 *
 * Every other source in this folder is compiled once per level (setup.py) and its symbols carry the level as a suffix:
 * doctor_scan_bf16_avx2. The caller asks here once and looks up the symbols of that level; this file alone is compiled
 * for the base level only. The order is that of setup.py's LEVELS.
 */

/* 0 = base, 1 = avx2, 2 = avx512. */
int doctor_cpu_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")
        || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 1;
    return 2;
#else
    return 0;
#endif
}
