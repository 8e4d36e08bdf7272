// The PTX instructions of the tensor-core kernels, one named function each. Nothing else in the project holds PTX.
//
// Fragments are those of mma.m16n8: lane l holds, of A's 16 rows by 32 bytes (8 tf32 or 16 half values), rows l / 4 and
// l / 4 + 8, bytes 4 * (l % 4) and 16 more; of B's 32 bytes by 8 columns, column l / 4, the same bytes; of the float
// sums d, (row l / 4, columns 2 * (l % 4) and the next) in d[0] and d[1], row l / 4 + 8 in d[2] and d[3].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// wgmma needs code for sm_90a, which no other architecture runs.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CONVT3D_HAS_WGMMA 1
#else
#define CONVT3D_HAS_WGMMA 0
#endif

// mma.sync on these types, and cp.async, are of sm_80 and later. Older architectures never run the kernels that use
// them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define CONVT3D_HAS_MMA 1
#else
#define CONVT3D_HAS_MMA 0
#endif

// Kernels that begin before the one before them has ended are of sm_90 and later.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CONVT3D_HAS_EARLY_LAUNCH 1
#else
#define CONVT3D_HAS_EARLY_LAUNCH 0
#endif

// Declares a kernel's dynamic shared memory. Not a function: nvcc makes other code of a pointer that one returns.
#define CONVT3D_DYNAMIC_SHARED(alignment, name) \
  extern __shared__ __align__(alignment)        \
  unsigned char name[]

namespace convt3d::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A predicated store each, where the compiler would branch around it: where any of `bits` is set, as tests of many are
// one instruction, or on a condition.
__device__ __forceinline__ void store_shared_if_any(uint32_t bits, uint32_t address, uint32_t value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.shared.b32 [%1], %2;\n}" ::"r"(bits), "r"(address),
               "r"(value)
               : "memory");
}
__device__ __forceinline__ void store_shared_if_any(uint32_t bits, uint32_t address, uint16_t value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.shared.b16 [%1], %2;\n}" ::"r"(bits), "r"(address),
               "h"(value)
               : "memory");
}
__device__ __forceinline__ void store_shared_if(bool condition, uint32_t address, uint32_t value) {
  store_shared_if_any(static_cast<uint32_t>(condition), address, value);
}
__device__ __forceinline__ void store_shared_if(bool condition, uint32_t address, uint16_t value) {
  store_shared_if_any(static_cast<uint32_t>(condition), address, value);
}
__device__ __forceinline__ void store_shared_if(bool condition, uint32_t address, uint4 values) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.shared.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   static_cast<int>(condition)),
               "r"(address), "r"(values.x), "r"(values.y), "r"(values.z), "r"(values.w)
               : "memory");
}

__device__ __forceinline__ void store_global_if(bool condition, void* to, uint32_t value) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"(static_cast<int>(condition)),
      "l"(__cvta_generic_to_global(to)), "r"(value)
      : "memory");
}
__device__ __forceinline__ void store_global_if(bool condition, void* to, uint16_t value) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.b16 [%1], %2;\n}" ::"r"(static_cast<int>(condition)),
      "l"(__cvta_generic_to_global(to)), "h"(value)
      : "memory");
}

// Four 8 x 16-byte matrices; lane l names row l % 8 of matrix l / 8, 16-byte aligned.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

// Two of them; lanes 0 to 15 name their rows.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row));
}

// The same with each 8 x 8 matrix of 2-byte elements transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row));
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}
// The same `Offset` bytes behind the address.
template <int Offset>
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(value) : "r"(address), "n"(Offset));
  return value;
}
// The way back: each lane has of four matrices what load_matrices would load.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&r)[4]) {
#if CONVT3D_HAS_WGMMA
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t (&r)[4]) {
#if CONVT3D_HAS_WGMMA
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// Of all lanes of a warp, for each of them.
__device__ __forceinline__ uint32_t or_of_warp(uint32_t bits) {
#if CONVT3D_HAS_MMA
  asm volatile("redux.sync.or.b32 %0, %0, 0xffffffff;" : "+r"(bits));
#else
  __trap();
#endif
  return bits;
}
__device__ __forceinline__ int32_t sum_of_warp(int32_t value) {
#if CONVT3D_HAS_MMA
  asm volatile("redux.sync.add.s32 %0, %0, 0xffffffff;" : "+r"(value));
#else
  __trap();
#endif
  return value;
}

// float32 rounded to tf32's ten bits of mantissa, nearest, ties away from zero.
__device__ __forceinline__ float round_to_tf32(float value) {
#if CONVT3D_HAS_MMA
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  __trap();
  return value;
#endif
}

// The same for a tensor core alone, which looks at no more than those bits: the ones below are left as they come.
// Half a unit of the last place that it keeps is added, 2^-11 of the power of two: two instructions, which leave what
// is not finite so.
__device__ __forceinline__ uint32_t rounded_for_tf32(uint32_t bits) {
  const float power = __uint_as_float(bits & 0xff800000u);
  return __float_as_uint(fmaf(power, 1.0f / 2048, __uint_as_float(bits)));
}

// The same at one instruction, of a float that has more than those bits: 0.72 of half a unit of the last place that is
// kept, on average a half, are added. What the bits hold stays so.
__device__ __forceinline__ uint32_t nearly_rounded_for_tf32(uint32_t bits) {
  return __float_as_uint(__uint_as_float(bits) * (1.0f + 0.7213f / 2048));
}

// d += a @ b on one warp: 16 x 8 sums over 32 bytes (float as tf32: 8 products, half types: 16).
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if CONVT3D_HAS_MMA
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if CONVT3D_HAS_MMA
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if CONVT3D_HAS_MMA
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Copies 16 bytes from global to shared memory behind the thread's back; zeros if not `valid`.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool valid) {
#if CONVT3D_HAS_MMA
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void commit_copies() {
#if CONVT3D_HAS_MMA
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until all but the newest `Pending` groups of this thread's copies have arrived. Where threads copy themselves, see
// copy_vector, they have.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
#if CONVT3D_HAS_MMA
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Makes this thread's writes to shared memory visible to wgmma and to bulk stores, which read through another proxy.
__device__ __forceinline__ void fence_shared_for_wgmma() {
#if CONVT3D_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Makes what this thread sees in global memory visible to its bulk copies, which read through another proxy too.
__device__ __forceinline__ void fence_global_for_bulk_copies() {
#if CONVT3D_HAS_WGMMA
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// Products run behind the threads' backs where they are wgmma: they begin once the registers they read are written,
// are committed as a group, and waited for.
__device__ __forceinline__ void begin_products() {
#if CONVT3D_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#if CONVT3D_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int Pending>
__device__ __forceinline__ void wait_for_products() {
#if CONVT3D_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// The lower word of a descriptor: columns of 16 bytes each, one behind the other, first the lower half of each then,
// `half_stride` bytes on, the upper. Adding to it moves it on by so many times 16 bytes. Eight columns follow each
// other; from these to the next eight it is `stride` times 16 bytes.
__device__ __forceinline__ uint32_t wgmma_columns(uint32_t address, uint32_t half_stride) {
  return address >> 4 | half_stride >> 4 << 16;
}
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t columns, uint32_t stride = 8) {
  return static_cast<uint64_t>(stride) << 32 | columns;
}

#if CONVT3D_HAS_WGMMA

// `run`: d += a @ b, `run_if`: d = a @ b unless it `keeps` d, on four warps, each with 16 rows of a in registers, as in
// mma above; d[4 * i + j] belongs to columns 8 * i and on. b is a descriptor of 32 bytes by N columns in shared memory,
// see wgmma_descriptor; so is a, of 64 rows, where it is in no registers.
template <class T, int N>
struct Wgmma;

// The same with the rows of b as the inner index: 8 columns of half types fill 16 bytes, the rows of such a block
// follow each other; 8 rows on, `half_stride` bytes lie between, 8 columns on, `column_stride`.
template <class T, int N>
struct WgmmaTransposed;

__device__ __forceinline__ uint64_t wgmma_rows(uint32_t address, uint32_t half_stride, uint32_t column_stride) {
  const uint32_t low = (address & 0x3ffffu) >> 4 | half_stride >> 4 << 16;
  return static_cast<uint64_t>(column_stride >> 4) << 32 | low;
}

// One type's instructions for 8 to 128 columns; `kind` is what their names end in, `scales` their last immediates,
// `shared_scales` these where a is in shared memory.
#define CONVT3D_SUMS_4(i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define CONVT3D_SUMS_8(i) CONVT3D_SUMS_4(i), CONVT3D_SUMS_4((i) + 4)
#define CONVT3D_SUMS_16(i) CONVT3D_SUMS_8(i), CONVT3D_SUMS_8((i) + 8)
#define CONVT3D_WGMMA_OF(Name, T, N, kind, scales, shared_scales, sum_names, operand_names, keep_name, shared_names,   \
                         ...)                                                                                          \
  template <>                                                                                                          \
  struct Name<T, N> {                                                                                                  \
    static __device__ __forceinline__ void run(float* d, const uint32_t (&a)[4], uint64_t b) {                         \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N kind " {" sum_names "}, " operand_names ", 1, " scales ";"   \
                   : __VA_ARGS__                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
    }                                                                                                                  \
    static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b) {                                     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N kind " {" sum_names "}, " shared_names ", 1, " shared_scales \
                   ";"                                                                                                 \
                   : __VA_ARGS__                                                                                       \
                   : "l"(a), "l"(b));                                                                                  \
    }                                                                                                                  \
    static __device__ __forceinline__ void run_if(bool keeps, float* d, const uint32_t (&a)[4], uint64_t b) {          \
      asm volatile("{ .reg .pred keeps; setp.ne.b32 keeps, " keep_name                                                 \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N kind " {" sum_names "}, " operand_names                 \
                   ", keeps, " scales "; }"                                                                            \
                   : __VA_ARGS__                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keeps ? 1 : 0));                          \
    }                                                                                                                  \
  };
#define CONVT3D_WGMMA(Name, T, kind, scales, shared_scales)                                                           \
  CONVT3D_WGMMA_OF(Name, T, 8, kind, scales, shared_scales, "%0, %1, %2, %3", "{%4, %5, %6, %7}, %8", "%9", "%4, %5", \
                   CONVT3D_SUMS_4(0))                                                                                 \
  CONVT3D_WGMMA_OF(Name, T, 16, kind, scales, shared_scales, "%0, %1, %2, %3, %4, %5, %6, %7",                        \
                   "{%8, %9, %10, %11}, %12", "%13", "%8, %9", CONVT3D_SUMS_8(0))                                     \
  CONVT3D_WGMMA_OF(Name, T, 24, kind, scales, shared_scales, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11",      \
                   "{%12, %13, %14, %15}, %16", "%17", "%12, %13", CONVT3D_SUMS_8(0), CONVT3D_SUMS_4(8))              \
  CONVT3D_WGMMA_OF(Name, T, 32, kind, scales, shared_scales,                                                          \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",                            \
                   "{%16, %17, %18, %19}, %20", "%21", "%16, %17", CONVT3D_SUMS_16(0))                                \
  CONVT3D_WGMMA_OF(Name, T, 48, kind, scales, shared_scales,                                                          \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
                   "%16, %17, %18, %19, %20, %21, %22, %23",                                                          \
                   "{%24, %25, %26, %27}, %28", "%29", "%24, %25", CONVT3D_SUMS_16(0), CONVT3D_SUMS_8(16))            \
  CONVT3D_WGMMA_OF(Name, T, 64, kind, scales, shared_scales,                                                          \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
                   "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",                  \
                   "{%32, %33, %34, %35}, %36", "%37", "%32, %33", CONVT3D_SUMS_16(0), CONVT3D_SUMS_16(16))           \
  CONVT3D_WGMMA_OF(Name, T, 128, kind, scales, shared_scales,                                                         \
                   "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
                   "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                 \
                   "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                 \
                   "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63",                  \
                   "{%64, %65, %66, %67}, %68", "%69", "%64, %65", CONVT3D_SUMS_16(0), CONVT3D_SUMS_16(16),           \
                   CONVT3D_SUMS_16(32), CONVT3D_SUMS_16(48))
CONVT3D_WGMMA(Wgmma, float, "k8.f32.tf32.tf32", "1, 1", "1, 1")
CONVT3D_WGMMA(Wgmma, __half, "k16.f32.f16.f16", "1, 1, 0", "1, 1, 0, 0")
CONVT3D_WGMMA(Wgmma, __nv_bfloat16, "k16.f32.bf16.bf16", "1, 1, 0", "1, 1, 0, 0")
CONVT3D_WGMMA(WgmmaTransposed, __half, "k16.f32.f16.f16", "1, 1, 1", "1, 1, 0, 1")
CONVT3D_WGMMA(WgmmaTransposed, __nv_bfloat16, "k16.f32.bf16.bf16", "1, 1, 1", "1, 1, 0, 1")
#undef CONVT3D_WGMMA
#undef CONVT3D_WGMMA_OF
#undef CONVT3D_SUMS_16
#undef CONVT3D_SUMS_8
#undef CONVT3D_SUMS_4

#endif

// Barrier `id` of the block, which `threads` threads reach in all: some that wait there, and some that do not.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Barriers of 8 bytes in shared memory. A phase of one ends when `arrivals` threads have arrived and all bytes that
// were announced have been copied; the parity of a barrier's first phase is 0.
__device__ __forceinline__ void make_barrier(uint32_t barrier, int arrivals) {
#if CONVT3D_HAS_WGMMA
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
#if CONVT3D_HAS_WGMMA
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
// Arrives, and announces that so many bytes will be copied.
__device__ __forceinline__ void arrive_announcing(uint32_t barrier, uint32_t bytes) {
#if CONVT3D_HAS_WGMMA
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
#if CONVT3D_HAS_WGMMA
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
#endif
}
// Whether it has.
__device__ __forceinline__ bool has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t done = 1;
#if CONVT3D_HAS_WGMMA
  asm volatile("{ .reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#endif
  return done != 0;
}
// Copies `bytes`, a multiple of 16, between places aligned to 16; `barrier` learns of their arrival.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
#if CONVT3D_HAS_WGMMA
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

// Copies the box of a tensor map that begins at these coordinates, the innermost first, to a place aligned to 128
// bytes; with zeros where it lies outside of the tensor.
__device__ __forceinline__ void copy_box(uint32_t shared, const void* map, const int (&at)[5], uint32_t barrier) {
#if CONVT3D_HAS_WGMMA
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
      "%6}], [%7];" ::"r"(shared),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "r"(barrier)
      : "memory");
#endif
}

// The same from shared to global memory, which the thread's writes before a fence_shared_for_wgmma are part of.
__device__ __forceinline__ void store_bulk(void* global, uint32_t shared, uint32_t bytes) {
#if CONVT3D_HAS_WGMMA
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void commit_bulk_stores() {
#if CONVT3D_HAS_WGMMA
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
// Until all but the newest `Pending` groups of this thread's bulk stores have read what they store.
template <int Pending>
__device__ __forceinline__ void wait_for_bulk_stores() {
#if CONVT3D_HAS_WGMMA
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
#endif
}

// Kernels that overlap, see Begins in cuda/launch.h. Until the kernel before this one has ended and its writes are
// visible; at once where this one began in turn.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if CONVT3D_HAS_EARLY_LAUNCH
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin early, once all blocks have come here or ended.
__device__ __forceinline__ void let_next_kernel_begin() {
#if CONVT3D_HAS_EARLY_LAUNCH
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Copies one element of 4 or 8 bytes, or a zero if not `valid`, behind the thread's back where the GPU can do that.
template <class T>
__device__ __forceinline__ void copy_element(T* shared, const T* global, bool valid) {
#if CONVT3D_HAS_MMA
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
               "n"(static_cast<int>(sizeof(T))), "r"(valid ? static_cast<int>(sizeof(T)) : 0)
               : "memory");
#else
  *shared = valid ? *global : T(0);
#endif
}
// The same for 16 bytes, which both pointers are aligned to.
template <class T>
__device__ __forceinline__ void copy_vector(T* shared, const T* global, bool valid) {
#if CONVT3D_HAS_MMA
  copy_async(shared_address(shared), global, valid);
#else
  *reinterpret_cast<uint4*>(shared) = valid ? *reinterpret_cast<const uint4*>(global) : uint4{};
#endif
}
// Until all of this thread's copies have arrived.
__device__ __forceinline__ void wait_for_all_copies() {
#if CONVT3D_HAS_MMA
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Registers of this warpgroup's threads from here on: fewer than the kernel was launched with, or more, which waits
// until others have given up as many. Only sm_90 has that.
template <int Registers>
__device__ __forceinline__ void give_up_registers() {
#if CONVT3D_HAS_WGMMA && defined(__CUDACC_VER_MAJOR__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void claim_registers() {
#if CONVT3D_HAS_WGMMA && defined(__CUDACC_VER_MAJOR__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// The same value, of whose making the compiler knows nothing. A product that it would widen and share, at several
// instructions for each sum, stays the one multiplication and addition that it was.
template <class T>
__device__ __forceinline__ T opaque(T value) {
#ifdef __CUDACC_VER_MAJOR__
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
  return value;
}

// The same of a pointer to global memory, which the compiler still knows to be one.
template <class T>
__device__ __forceinline__ T* opaque_global(T* pointer) {
  return static_cast<T*>(__cvta_global_to_generic(opaque(__cvta_generic_to_global(pointer))));
}

}  // namespace convt3d::ptx
