// Attention of 64 queries by one block: scores, softmax and products with the values, key tile after key tile, with
// the running maximum and sum of each row in registers (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018; Dao et al., "FlashAttention", 2022). Included behind products.cuh.

#ifndef MMOPT_ATTENTION
#define MMOPT_ATTENTION

#define MMOPT_INFINITY __int_as_float(0x7f800000)

enum { MMOPT_NO_MASK, MMOPT_BOOL_MASK, MMOPT_F32_MASK, MMOPT_F16_MASK };

#ifndef MMOPT_EMULATED
__device__ __forceinline__ unsigned mmopt_pack_f16(float low, float high) {
  unsigned r;
  asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(r) : "f"(low), "f"(high));
  return r;
}

__device__ __forceinline__ unsigned mmopt_pack_bf16(float low, float high) {
  unsigned r = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}

__device__ __forceinline__ float mmopt_from_f16(unsigned short bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
#endif  // MMOPT_EMULATED

// Values with the keys last. Floats: of every eight keys the even ones come first, as scores lie in registers.
template <int Bytes>
struct mmopt_values {
  const unsigned char* data;
  long long key_stride, size_stride;
  int size, keys;

  __device__ __forceinline__ const unsigned char* row(int r) const {
    return r < size ? data + r * size_stride * Bytes : nullptr;
  }
  __device__ __forceinline__ const unsigned char* at(const unsigned char* row, int k) const {
    const int key = Bytes == 4 ? (k & ~7) + (k & 3) * 2 + (k >> 2 & 1) : k;
    return row && key < keys ? row + key * key_stride * Bytes : nullptr;
  }
};

template <typename Source, int Rows, int Panels, int Threads>
__device__ __forceinline__ void mmopt_bring(const Source& source, unsigned char* to, int thread) {
#pragma unroll
  for (int p = 0; p < Panels; ++p) {
    mmopt_tile<Source, Rows, Threads> tile;
    tile.start(source, to + p * Rows * MMOPT_ROW, p * MMOPT_ROW, thread);
    tile.finish(to + p * Rows * MMOPT_ROW, thread);
  }
}

// Four results of 16 x 8 scores (two with floats) as the left operand of a step.
template <int Kind>
__device__ __forceinline__ void mmopt_as_operand(unsigned (&a)[1][4], const float* low, const float* high) {
  if constexpr (Kind == MMOPT_F32) {
    a[0][0] = __float_as_int(low[0]), a[0][1] = __float_as_int(low[2]);
    a[0][2] = __float_as_int(low[1]), a[0][3] = __float_as_int(low[3]);
  } else if constexpr (Kind == MMOPT_F16) {
    a[0][0] = mmopt_pack_f16(low[0], low[1]), a[0][1] = mmopt_pack_f16(low[2], low[3]);
    a[0][2] = mmopt_pack_f16(high[0], high[1]), a[0][3] = mmopt_pack_f16(high[2], high[3]);
  } else {
    a[0][0] = mmopt_pack_bf16(low[0], low[1]), a[0][1] = mmopt_pack_bf16(low[2], low[3]);
    a[0][2] = mmopt_pack_bf16(high[0], high[1]), a[0][3] = mmopt_pack_bf16(high[2], high[3]);
  }
}

template <int Mask>
__device__ __forceinline__ float mmopt_masked(float score, const void* mask, long long at) {
  if constexpr (Mask == MMOPT_BOOL_MASK) return static_cast<const unsigned char*>(mask)[at] ? score : -MMOPT_INFINITY;
  if constexpr (Mask == MMOPT_F32_MASK) return score + static_cast<const float*>(mask)[at] * 1.4426950408889634f;
  if constexpr (Mask == MMOPT_F16_MASK) return score + mmopt_from_f16(static_cast<const unsigned short*>(mask)[at]) * 1.4426950408889634f;
  return score;
}

// total = softmax(q k^T · scale + mask) v for queries first..first+63. q: rows x size, k: keys x size, v: keys x values.
// QPanels: 64-byte pieces of a query; NT: values / 8, even; Keys: keys of a tile. `scale` holds log2(e). Key c counts for
// query r when c <= r + reach. The sums lie as those of mmopt_product with 4 x 1 warps and 1 x NT products.
template <int Kind, bool Direct, int QPanels, int NT, int Keys, int Mask>
__device__ __forceinline__ void mmopt_attention(float* total, unsigned char* shared, const void* q, const void* k, const void* v, const void* mask,
                                                long long q_row, long long q_size, long long k_row, long long k_size, long long v_row, long long v_size,
                                                long long mask_row, long long mask_key, int first, int rows, int keys, int size, int values, int reach, float scale) {
  constexpr int Bytes = mmopt_kind<Kind>::bytes, Threads = 128, VPanels = Keys * Bytes / MMOPT_ROW, PerStep = 32 / Bytes;
  using Any = mmopt_gathered<mmopt_strided<Bytes>, Bytes>;
  unsigned char *q_tile = shared, *k_tile = q_tile + QPanels * 64 * MMOPT_ROW, *v_tile = k_tile + QPanels * Keys * MMOPT_ROW;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const unsigned char *queries = static_cast<const unsigned char*>(q) + first * q_row * Bytes, *values_ = static_cast<const unsigned char*>(v);
  float most[2] = {-MMOPT_INFINITY, -MMOPT_INFINITY}, sum[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < NT * 4; ++n) total[n] = 0;
  if constexpr (Direct) mmopt_bring<mmopt_rows, 64, QPanels, Threads>(mmopt_rows{queries, q_row * Bytes, rows - first, size * Bytes}, q_tile, thread);
  else mmopt_bring<Any, 64, QPanels, Threads>(Any{{queries, q_row, q_size, rows - first, size}}, q_tile, thread);
  const int end = min(keys, first + 64 + reach);
#pragma unroll 1
  for (int begin = 0; begin < end; begin += Keys) {
    const unsigned char* here = static_cast<const unsigned char*>(k) + begin * k_row * Bytes;
    __syncthreads();
    if constexpr (Direct) mmopt_bring<mmopt_rows, Keys, QPanels, Threads>(mmopt_rows{here, k_row * Bytes, keys - begin, size * Bytes}, k_tile, thread);
    else mmopt_bring<Any, Keys, QPanels, Threads>(Any{{here, k_row, k_size, keys - begin, size}}, k_tile, thread);
    mmopt_commit();
    using Values = mmopt_gathered<mmopt_values<Bytes>, Bytes>;
    mmopt_bring<Values, NT * 8, VPanels, Threads>(Values{{values_ + begin * v_row * Bytes, v_row, v_size, values, keys - begin}}, v_tile, thread);
    mmopt_wait<0>();
    __syncthreads();

    float scores[Keys / 2];
#pragma unroll
    for (int n = 0; n < Keys / 2; ++n) scores[n] = 0;
#pragma unroll
    for (int p = 0; p < QPanels; ++p)
      mmopt_multiply<Kind, 1, Keys / 8>(scores, q_tile + p * 64 * MMOPT_ROW, k_tile + p * Keys * MMOPT_ROW, warp * 16, 0, lane);

    float next[2] = {most[0], most[1]};
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first + warp * 16 + lane / 4 + e / 2 * 8, key = begin + n * 8 + lane % 4 * 2 + e % 2;
        float score = -MMOPT_INFINITY;
        if (row < rows && key < keys && key <= row + reach) score = mmopt_masked<Mask>(scores[n * 4 + e] * scale, mask, row * mask_row + key * mask_key);
        scores[n * 4 + e] = score;
        next[e / 2] = fmaxf(next[e / 2], score);
      }
    float keep[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      next[h] = fmaxf(next[h], __shfl_xor_sync(0xffffffffu, next[h], 1));
      next[h] = fmaxf(next[h], __shfl_xor_sync(0xffffffffu, next[h], 2));
      const float base = next[h] == -MMOPT_INFINITY ? 0.0f : next[h];
      keep[h] = exp2f(most[h] - base);
      most[h] = next[h];
      sum[h] *= keep[h];
      next[h] = base;
    }
#pragma unroll
    for (int n = 0; n < Keys / 2; ++n) {
      scores[n] = exp2f(scores[n] - next[n / 2 % 2]);
      sum[n / 2 % 2] += scores[n];
    }
#pragma unroll
    for (int n = 0; n < NT * 4; ++n) total[n] *= keep[n / 2 % 2];
#pragma unroll
    for (int step = 0; step < Keys / PerStep; ++step) {
      unsigned a[1][4], b[NT][2];
      if constexpr (Kind == MMOPT_F32) mmopt_as_operand<Kind>(a, scores + step * 4, nullptr);
      else mmopt_as_operand<Kind>(a, scores + step * 8, scores + step * 8 + 4);
      const unsigned char* panel = v_tile + step / 2 * NT * 8 * MMOPT_ROW;
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        unsigned two[4];
        mmopt_load_matrices(two, panel + mmopt_place(n * 8 + lane % 8 + lane / 16 * 8, step % 2 * 2 + lane / 8 % 2));
        b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
      }
      mmopt_step<Kind, 1, NT>(total, a, b);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    sum[h] = 1.0f / sum[h];
  }
#pragma unroll
  for (int n = 0; n < NT * 4; ++n) total[n] *= sum[n / 2 % 2];
}

#endif
