# The SIMD levels of each processor, lowest first, and what level.cpp is compiled with for each of them. Read by
# CMakeLists.txt and, line by line, by the tests: one plain set() a line.
set(SIMD_LEVELS_x86_64 baseline avx2 avx512 avx512_bf16)
set(SIMD_LEVELS_aarch64 baseline neon_bf16)

set(SIMD_FLAGS_ALL -ffp-contract=off)
set(SIMD_FLAGS_baseline)
set(SIMD_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(SIMD_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c)
set(SIMD_FLAGS_avx512_bf16 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mavx512bf16)
set(SIMD_FLAGS_neon_bf16 -march=armv8.2-a+bf16)
