// The loops that all time goes into are compiled once for every instruction set, each time in a namespace of its own,
// and the machine picks one.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CONVT3D_WITH_AVX2

namespace convt3d::direct {

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace convt3d::direct
#endif
