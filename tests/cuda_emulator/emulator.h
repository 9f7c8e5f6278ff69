// Runs CUDA C++ on a CPU, one thread of a block after another, each on a stack of its own.
//
// Enough of CUDA for generated kernels: indices, shared memory, barriers, shuffles, tensor-core products with the
// layouts of fragments that the PTX ISA documents. Results are those of a GPU up to the order of additions.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#define MMOPT_EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDART_INF_F (std::numeric_limits<float>::infinity())
#define CUDART_NAN_F (std::numeric_limits<float>::quiet_NaN())
#define CUDART_INF (std::numeric_limits<double>::infinity())
#define CUDART_NAN (std::numeric_limits<double>::quiet_NaN())

using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;

// ---- narrow floats: stored narrow, computed in float ---------------------------------------------------------------

struct nv_bfloat16 {
  uint16_t bits = 0;
  nv_bfloat16() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  nv_bfloat16(T value) {
    float f = static_cast<float>(value);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = f != f ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const {
    uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};
using __nv_bfloat16 = nv_bfloat16;

struct half {
  _Float16 value = 0;
  half() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  half(T v) : value(static_cast<_Float16>(v)) {}
  operator float() const { return static_cast<float>(value); }
};
using __half = half;

#define MMOPT_NARROW(T)                                                                          \
  inline T operator+(T a, T b) { return T(float(a) + float(b)); }                                \
  inline T operator-(T a, T b) { return T(float(a) - float(b)); }                                \
  inline T operator*(T a, T b) { return T(float(a) * float(b)); }                                \
  inline T operator/(T a, T b) { return T(float(a) / float(b)); }                                \
  inline T operator-(T a) { return T(-float(a)); }                                               \
  inline bool operator<(T a, T b) { return float(a) < float(b); }                                \
  inline bool operator>(T a, T b) { return float(a) > float(b); }                                \
  inline bool operator<=(T a, T b) { return float(a) <= float(b); }                              \
  inline bool operator>=(T a, T b) { return float(a) >= float(b); }                              \
  inline bool operator==(T a, T b) { return float(a) == float(b); }                              \
  inline bool operator!=(T a, T b) { return float(a) != float(b); }                              \
  inline T hexp(T a) { return T(std::exp(float(a))); }                                           \
  inline T hlog(T a) { return T(std::log(float(a))); }                                           \
  inline T hsqrt(T a) { return T(std::sqrt(float(a))); }                                         \
  inline T hsin(T a) { return T(std::sin(float(a))); }                                           \
  inline T hcos(T a) { return T(std::cos(float(a))); }                                           \
  inline T htanh(T a) { return T(std::tanh(float(a))); }                                         \
  inline T hfloor(T a) { return T(std::floor(float(a))); }                                       \
  inline T hceil(T a) { return T(std::ceil(float(a))); }                                         \
  inline T htrunc(T a) { return T(std::trunc(float(a))); }                                       \
  inline T hrint(T a) { return T(std::rint(float(a))); }                                         \
  inline T __habs(T a) { return T(std::fabs(float(a))); }                                        \
  inline T hpow(T a, T b) { return T(std::pow(float(a), float(b))); }                            \
  inline T herf(T a) { return T(std::erf(float(a))); }
MMOPT_NARROW(half)
MMOPT_NARROW(nv_bfloat16)
#undef MMOPT_NARROW

inline half __float2half_rn(float v) { return half(v); }
inline half __float2half(float v) { return half(v); }
inline float __half2float(half v) { return float(v); }
inline nv_bfloat16 __float2bfloat16_rn(float v) { return nv_bfloat16(v); }
inline nv_bfloat16 __float2bfloat16(float v) { return nv_bfloat16(v); }
inline float __bfloat162float(nv_bfloat16 v) { return float(v); }

template <typename A, typename B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}
template <typename A, typename B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
inline half max(half a, half b) { return a < b ? b : a; }
inline half min(half a, half b) { return b < a ? b : a; }
inline half __hmax(half a, half b) { return max(a, b); }
inline half __hmin(half a, half b) { return min(a, b); }
inline nv_bfloat16 max(nv_bfloat16 a, nv_bfloat16 b) { return a < b ? b : a; }
inline nv_bfloat16 min(nv_bfloat16 a, nv_bfloat16 b) { return b < a ? b : a; }
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __int_as_float(int v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline int __float_as_int(float v) {
  int i;
  std::memcpy(&i, &v, 4);
  return i;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(v) : 64; }

// ---- threads -------------------------------------------------------------------------------------------------------

namespace emulator {

struct Index {
  unsigned x, y, z;
};

constexpr int kMostThreads = 1024, kWarp = 32, kSlot = 64;
constexpr size_t kStack = 64 << 10;

struct Thread {
  void* stack_pointer;
  char* stack;
  bool done;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct State {
  Index thread, block, threads, blocks;
  int count = 0, running = 0, alive = 0;
  Thread fibers[kMostThreads] = {};
  void* scheduler = nullptr;
  Barrier whole, warps[kMostThreads / kWarp];
  alignas(64) unsigned char slots[kMostThreads][kSlot];
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  bool progressed = false;
};

inline State state;

#if defined(__x86_64__)
extern "C" void mmopt_switch(void** from, void* to);
asm(R"(
.text
.weak mmopt_switch
mmopt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the emulator switches stacks on x86-64 only"
#endif

inline void yield() {
  Thread& own = state.fibers[state.running];
  int number = state.running;
  mmopt_switch(&own.stack_pointer, state.scheduler);
  state.running = number;
  state.thread = {static_cast<unsigned>(number), 0, 0};
}

inline void enter() {
  state.body(state.arguments);
  state.fibers[state.running].done = true;
  --state.alive;
  state.progressed = true;
  mmopt_switch(&state.fibers[state.running].stack_pointer, state.scheduler);
  std::abort();
}

inline void wait(Barrier& barrier, int expected) {
  state.progressed = true;
  unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void wait_warp() {
  int warp = state.running / kWarp;
  wait(state.warps[warp], std::min(kWarp, state.count - warp * kWarp));
}

inline void run_block(int count) {
  state.count = state.alive = count;
  for (int n = 0; n < count; ++n) {
    Thread& fiber = state.fibers[n];
    if (!fiber.stack) fiber.stack = static_cast<char*>(std::aligned_alloc(64, kStack));
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
    *--top = nullptr;  // what enter would return to; keeps the stack aligned as behind a call
    *--top = reinterpret_cast<void*>(&enter);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    fiber.stack_pointer = top;
    fiber.done = false;
  }
  while (state.alive) {
    state.progressed = false;
    for (int n = 0; n < count; ++n) {
      if (state.fibers[n].done) continue;
      state.running = n;
      state.thread = {static_cast<unsigned>(n), 0, 0};
      mmopt_switch(&state.scheduler, state.fibers[n].stack_pointer);
    }
    if (!state.progressed) {
      std::fprintf(stderr, "emulator: threads of a block wait for each other at different places\n");
      std::abort();
    }
  }
}

template <typename Body>
void launch(Index blocks, int threads, bool cooperative, Body body) {
  state.blocks = blocks;
  state.threads = {static_cast<unsigned>(threads), 1, 1};
  state.body = [](void* p) { (*static_cast<Body*>(p))(); };
  state.arguments = &body;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        state.block = {x, y, z};
        if (cooperative) {
          run_block(threads);
          continue;
        }
        for (int n = 0; n < threads; ++n) {
          state.thread = {static_cast<unsigned>(n), 0, 0};
          body();
        }
      }
}

template <typename T>
T& slot(int lane) {
  static_assert(sizeof(T) <= kSlot);
  return *reinterpret_cast<T*>(state.slots[state.running / kWarp * kWarp + lane]);
}

template <typename T>
T exchange(T value, int from) {
  int lane = state.running % kWarp;
  slot<T>(lane) = value;
  wait_warp();
  T taken = slot<T>(from);
  wait_warp();
  return taken;
}

}  // namespace emulator

#define threadIdx (emulator::state.thread)
#define blockIdx (emulator::state.block)
#define blockDim (emulator::state.threads)
#define gridDim (emulator::state.blocks)

inline void __syncthreads() { emulator::wait(emulator::state.whole, emulator::state.count); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::wait_warp(); }

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int step) {
  return emulator::exchange(value, (emulator::state.running % emulator::kWarp) ^ step);
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value, lane);
}

// ---- calls from the host -------------------------------------------------------------------------------------------

struct Argument {  // TVMFFIAny
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    double real;
    void* pointer;
  };
};

template <typename T>
inline T argument(const Argument& given) {
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(given.pointer);
  else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(given.real);
  else return static_cast<T>(given.integer);
}

// ---- tensor cores: what products.cuh expects of the hardware -------------------------------------------------------

inline void mmopt_load_matrices(unsigned (&r)[4], const void* row) {
  using emulator::slot;
  const int lane = emulator::state.running % emulator::kWarp;
  slot<const void*>(lane) = row;
  emulator::wait_warp();
  for (int m = 0; m < 4; ++m)
    std::memcpy(&r[m], static_cast<const char*>(slot<const void*>(m * 8 + lane / 4)) + lane % 4 * 4, 4);
  emulator::wait_warp();
}

inline void mmopt_copy(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || reinterpret_cast<uintptr_t>(shared) % 16) {
    std::fprintf(stderr, "emulator: a copy of 16 bytes that is not aligned\n");
    std::abort();
  }
  std::memcpy(shared, global, 16);
}
inline void mmopt_commit() {}
template <int Left>
inline void mmopt_wait() {}

namespace emulator {

struct Fragments {
  unsigned a[4], b[2];
};

// d += A B, where A is 16 rows and B 8 columns of 32 bytes: rows (and columns) lie in groups of four lanes.
template <typename Element, typename Sum, typename Widen, typename Right = Element>
void multiply(Sum* d, const unsigned* a, const unsigned* b, Widen widen) {
  constexpr int per = 4 / sizeof(Element);
  const int lane = state.running % kWarp;
  Fragments own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  slot<Fragments>(lane) = own;
  wait_warp();
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    Sum total = d[e];
    for (int half = 0; half < 2; ++half)
      for (int quad = 0; quad < 4; ++quad) {
        Element x[per];
        Right y[per];
        std::memcpy(x, &slot<Fragments>(row % 8 * 4 + quad).a[half * 2 + row / 8], 4);
        std::memcpy(y, &slot<Fragments>(column * 4 + quad).b[half], 4);
        for (int n = 0; n < per; ++n) total += widen(x[n]) * widen(y[n]);
      }
    d[e] = total;
  }
  wait_warp();
}

inline float truncated(unsigned bits) { return __int_as_float(static_cast<int>(bits & 0xffffe000u)); }

}  // namespace emulator

inline void mmopt_mma_f16(float* d, const unsigned* a, const unsigned* b) {
  emulator::multiply<_Float16>(d, a, b, [](_Float16 v) { return static_cast<float>(v); });
}
inline void mmopt_mma_bf16(float* d, const unsigned* a, const unsigned* b) {
  emulator::multiply<nv_bfloat16>(d, a, b, [](nv_bfloat16 v) { return static_cast<float>(v); });
}
inline void mmopt_mma_tf32(float* d, const unsigned* a, const unsigned* b) {
  emulator::multiply<unsigned>(d, a, b, [](unsigned v) { return emulator::truncated(v); });
}
inline void mmopt_mma_s8(int* d, const unsigned* a, const unsigned* b) {
  emulator::multiply<int8_t>(d, a, b, [](int8_t v) { return static_cast<int>(v); });
}
inline void mmopt_mma_u8(int* d, const unsigned* a, const unsigned* b) {
  auto widen = [](auto v) { return static_cast<int>(v); };
  emulator::multiply<uint8_t, int, decltype(widen), int8_t>(d, a, b, widen);
}
inline void mmopt_mma_s8u8(int* d, const unsigned* a, const unsigned* b) {
  auto widen = [](auto v) { return static_cast<int>(v); };
  emulator::multiply<int8_t, int, decltype(widen), uint8_t>(d, a, b, widen);
}
inline unsigned mmopt_pack_f16(float low, float high) {
  _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  unsigned r;
  std::memcpy(&r, pair, 4);
  return r;
}
inline unsigned mmopt_pack_bf16(float low, float high) {
  return nv_bfloat16(low).bits | static_cast<unsigned>(nv_bfloat16(high).bits) << 16;
}
inline float mmopt_from_f16(unsigned short bits) {
  _Float16 v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}
inline unsigned mmopt_to_tf32(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return (u + 0x1000u) & 0xffffe000u;
}
