// Products with weights of 8 or 4 bits, which become floats on their way to the tensor cores, and products with few rows,
// which take as long as reading the weights. Included behind products.cuh and attention.cuh.
//
// Weights lie in rows of whole chunks of 16 bytes with the summed axis along them: bytes with signs, or two numbers from 0
// to 15 in a byte, the lower half first. A weight is (number - zero) * scale, with both for each `Group` numbers of a row
// (0: for the whole row). Zero points are all the same unless there is a pointer to them.

#ifndef MMOPT_WEIGHTS
#define MMOPT_WEIGHTS

struct alignas(8) mmopt_half_chunk { unsigned word[2]; };

struct mmopt_scales {
  const float* scales;
  const float* zeros;  // or null
  float zero;
  int groups;  // of a row

  template <int Group>
  __device__ __forceinline__ int at(int row, int k) const { return row * groups + (Group ? k / (Group ? Group : 1) : 0); }
  __device__ __forceinline__ float zero_at(int at) const { return zeros ? zeros[at] : zero; }
};

// Number `e` of some that begin with the lowest bits of `words`.
template <int Bits>
__device__ __forceinline__ float mmopt_number(const unsigned* words, int e) {
  if constexpr (Bits == 8) return static_cast<float>(static_cast<signed char>(words[e / 4] >> (e % 4 * 8) & 0xff));
  else return static_cast<float>(words[e / 8] >> (e % 8 * 4) & 0xf);
}

// A source of tiles, see products.cuh: chunks of floats of `Kind`.
template <int Kind, int Bits, int Group>
struct mmopt_dequantized {
  static constexpr bool direct = false, along_rows = false;
  const unsigned char* data;
  long long stride;  // bytes
  mmopt_scales scales;
  int rows, depth;

  __device__ __forceinline__ mmopt_chunk get(int r, int k) const {
    constexpr int size = mmopt_kind<Kind>::bytes, count = MMOPT_CHUNK / size, bytes = count * Bits / 8;
    mmopt_chunk chunk{};
    const int first = k / size;
    if (r >= rows || first >= depth) return chunk;
    const unsigned char* from = data + r * stride + first * Bits / 8;
    unsigned words[2] = {};
    if constexpr (bytes == 8) {
      const auto both = *reinterpret_cast<const mmopt_half_chunk*>(from);
      words[0] = both.word[0], words[1] = both.word[1];
    } else if constexpr (bytes == 4) words[0] = *reinterpret_cast<const unsigned*>(from);
    else words[0] = *reinterpret_cast<const unsigned short*>(from);
    const int group = scales.template at<Group>(r, first);
    const float scale = scales.scales[group], zero = scales.zero_at(group);
    float value[count];
#pragma unroll
    for (int e = 0; e < count; ++e) value[e] = (mmopt_number<Bits>(words, e) - zero) * scale;
#pragma unroll
    for (int n = 0; n < MMOPT_CHUNK / 4; ++n) {
      if constexpr (Kind == MMOPT_F32) chunk.word[n] = __float_as_int(value[n]);
      else if constexpr (Kind == MMOPT_F16) chunk.word[n] = mmopt_pack_f16(value[2 * n], value[2 * n + 1]);
      else chunk.word[n] = mmopt_pack_bf16(value[2 * n], value[2 * n + 1]);
    }
    return chunk;
  }
};

template <int Kind, int WM, int WN, int MT, int NT, int Stages, int Bits, int Group>
__device__ __forceinline__ void mmopt_rows_by_numbers(float* sum, unsigned char* shared, const void* a, const void* b, const void* scales,
                                                      const void* zeros, long long a_stride, long long b_stride, float zero, int groups,
                                                      int rows, int columns, int depth) {
  constexpr int size = mmopt_kind<Kind>::bytes;
  mmopt_rows left{static_cast<const unsigned char*>(a), a_stride * size, rows, depth * size};
  mmopt_dequantized<Kind, Bits, Group> right{
      static_cast<const unsigned char*>(b), b_stride,
      {static_cast<const float*>(scales), static_cast<const float*>(zeros), zero, groups}, columns, depth};
  mmopt_product<Kind, WM, WN, MT, NT, Stages>(sum, shared, left, right, depth * size);
}

template <int Kind, int WM, int WN, int MT, int NT, int Stages, int Bits, int Group>
__device__ __forceinline__ void mmopt_any_by_numbers(float* sum, unsigned char* shared, const void* a, const void* b, const void* scales,
                                                     const void* zeros, long long a_row, long long a_k, long long b_stride, float zero,
                                                     int groups, int rows, int columns, int depth) {
  constexpr int size = mmopt_kind<Kind>::bytes;
  mmopt_gathered<mmopt_strided<size>, size> left{{static_cast<const unsigned char*>(a), a_row, a_k, rows, depth}};
  mmopt_dequantized<Kind, Bits, Group> right{
      static_cast<const unsigned char*>(b), b_stride,
      {static_cast<const float*>(scales), static_cast<const float*>(zeros), zero, groups}, columns, depth};
  mmopt_product<Kind, WM, WN, MT, NT, Stages>(sum, shared, left, right, depth * size);
}

// ---- few rows ----

template <int Kind>
__device__ __forceinline__ float mmopt_float_of(const unsigned* words, int e) {
  if constexpr (Kind == MMOPT_F32) return __int_as_float(words[e]);
  else {
    const unsigned short bits = words[e / 2] >> (e % 2 * 16) & 0xffff;
    if constexpr (Kind == MMOPT_F16) return mmopt_from_f16(bits);
    else return __int_as_float(static_cast<unsigned>(bits) << 16);
  }
}

// Four neighbours, which start at a multiple of their size.
template <int Kind>
__device__ __forceinline__ void mmopt_four(float (&out)[4], const unsigned char* from) {
  unsigned words[4] = {};
  if constexpr (Kind == MMOPT_F32) {
    const auto chunk = *reinterpret_cast<const mmopt_chunk*>(from);
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = chunk.word[n];
  } else {
    const auto chunk = *reinterpret_cast<const mmopt_half_chunk*>(from);
    words[0] = chunk.word[0], words[1] = chunk.word[1];
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = mmopt_float_of<Kind>(words, e);
}

// As they are when they have been rounded to `Kind`.
template <int Kind>
__device__ __forceinline__ void mmopt_round(float (&value)[4]) {
#pragma unroll
  for (int e = 0; e < 4 && Kind != MMOPT_F32; e += 2) {
    const unsigned pair = Kind == MMOPT_F16 ? mmopt_pack_f16(value[e], value[e + 1]) : mmopt_pack_bf16(value[e], value[e + 1]);
    value[e] = mmopt_float_of<Kind>(&pair, 0), value[e + 1] = mmopt_float_of<Kind>(&pair, 1);
  }
}

// Rows x 4 · Columns results by a block of four warps, each of which sums `Columns` columns; Bits 0: weights are of `Kind`.
template <int Kind, int Rows, int Columns, int Bits, int Group>
__device__ __forceinline__ void mmopt_few_rows(unsigned char* shared, const void* a, const void* b, const void* scales, const void* zeros,
                                               long long a_stride, long long b_stride, float zero, int groups, int columns, int depth) {
  constexpr int size = mmopt_kind<Kind>::bytes, bits = Bits ? Bits : size * 8, each = MMOPT_CHUNK * 8 / bits;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * Columns;
  const mmopt_scales given{static_cast<const float*>(scales), static_cast<const float*>(zeros), zero, groups};
  const auto* x = static_cast<const unsigned char*>(a);
  const unsigned char* row[Columns];
  float sum[Rows][Columns] = {};
#pragma unroll
  for (int c = 0; c < Columns; ++c) row[c] = static_cast<const unsigned char*>(b) + (first + c < columns ? first + c : 0) * b_stride;
  for (int k = lane * each; k < depth; k += 32 * each) {
    mmopt_chunk weight[Columns];
    float part[Rows][Columns] = {}, zero_of[Columns], scale[Columns];
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
      weight[c] = *reinterpret_cast<const mmopt_chunk*>(row[c] + static_cast<long long>(k) * bits / 8);
      scale[c] = 1.0f;
      if constexpr (Bits != 0) {
        const int group = given.at<Group>(first + c < columns ? first + c : 0, k);
        zero_of[c] = given.zero_at(group), scale[c] = given.scales[group];
      }
    }
#pragma unroll
    for (int four = 0; four < each / 4; ++four) {
      if (k + four * 4 >= depth) break;
      float value[Columns][4];
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (Bits == 0) value[c][e] = mmopt_float_of<Kind>(weight[c].word, four * 4 + e);
          else value[c][e] = (mmopt_number<Bits>(weight[c].word, four * 4 + e) - zero_of[c]) * (Kind == MMOPT_F32 ? 1.0f : scale[c]);
        }
        if constexpr (Bits != 0) mmopt_round<Kind>(value[c]);
      }
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float input[4];
        mmopt_four<Kind>(input, x + (r * a_stride + k + four * 4) * size);
#pragma unroll
        for (int c = 0; c < Columns; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) part[r][c] += input[e] * value[c][e];
      }
    }
#pragma unroll
    for (int c = 0; c < Columns; ++c)
#pragma unroll
      for (int r = 0; r < Rows; ++r) sum[r][c] += part[r][c] * (Kind == MMOPT_F32 ? scale[c] : 1.0f);
  }
  float* out = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < Rows; ++r)
#pragma unroll
    for (int c = 0; c < Columns; ++c) {
#pragma unroll
      for (int step = 16; step; step /= 2) sum[r][c] += __shfl_xor_sync(0xffffffffu, sum[r][c], step);
      if (lane == 0) out[r * 4 * Columns + first + c] = sum[r][c];
    }
  __syncthreads();
}

#endif
