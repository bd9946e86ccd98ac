// Twelve chains of fused multiply-adds on the widest vectors that the compiler was told of, and on half as wide ones:
// what a core can do at most. benchmarks/fma_peak.py compiles and times it.
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
enum { CHAINS = 12 };

#define LOOP(name, bytes)                                                              \
  float name(long steps) {                                                             \
    typedef float vec __attribute__((vector_size(bytes)));                             \
    vec a[CHAINS], x = {}, y = {}, sum = {};                                           \
    for (int i = 0; i < CHAINS; i++) a[i] = x + (float)i;                              \
    x += 0.999f, y += 0.001f;                                                          \
    __asm__ volatile("" : "+x"(x), "+x"(y));                                           \
    for (long s = 0; s < steps; s++)                                                   \
      for (int i = 0; i < CHAINS; i++) a[i] = a[i] * x + y;                            \
    for (int i = 0; i < CHAINS; i++) sum += a[i];                                      \
    return sum[0];                                                                     \
  }

LOOP(wide, BYTES)
LOOP(half, BYTES / 2)
long flops(int is_wide) { return 2 * CHAINS * (is_wide ? BYTES : BYTES / 2) / (long)sizeof(float); }
