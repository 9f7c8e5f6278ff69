// Products of tiles on tensor cores. Included in front of generated kernels that use them.
//
// A block computes BM x BN results. Both operands lie in shared memory with 64 bytes of the summed axis in a row, in
// chunks of 16 bytes that change places with the row so that neither storing nor loading them meets in a bank. One
// step multiplies 32 bytes: 16 halves, 8 floats, or 32 bytes of integers. What a step's registers hold is the same
// bytes for every kind of number (PTX ISA, "Matrix fragments for mma"), so one code serves all.

#ifndef MMOPT_PRODUCTS
#define MMOPT_PRODUCTS

enum { MMOPT_F16, MMOPT_BF16, MMOPT_F32, MMOPT_S8, MMOPT_U8, MMOPT_S8U8 };

constexpr int MMOPT_ROW = 64, MMOPT_CHUNK = 16;

#ifndef MMOPT_EMULATED
__device__ __forceinline__ unsigned mmopt_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void mmopt_load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(mmopt_address(row)));
}

__device__ __forceinline__ void mmopt_copy(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(mmopt_address(shared)), "l"(global));
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

__device__ __forceinline__ void mmopt_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

template <int Left>
__device__ __forceinline__ void mmopt_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Left));
#endif
}

__device__ __forceinline__ void mmopt_mma_f16(float* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

__device__ __forceinline__ void mmopt_mma_bf16(float* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mmopt_mma_tf32(float* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mmopt_mma_s8(int* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int part = 0; part < 4; ++part)  // rows g and g + 8, first and second half of the sum
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(d[part % 2 * 2]), "+r"(d[part % 2 * 2 + 1])
                 : "r"(a[part]), "r"(b[part / 2]));
#endif
}

// The first operand without signs.
__device__ __forceinline__ void mmopt_mma_u8(int* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int part = 0; part < 4; ++part)  // rows g and g + 8, first and second half of the sum
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(d[part % 2 * 2]), "+r"(d[part % 2 * 2 + 1])
                 : "r"(a[part]), "r"(b[part / 2]));
#endif
}

// The second operand without signs.
__device__ __forceinline__ void mmopt_mma_s8u8(int* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int part = 0; part < 4; ++part)  // rows g and g + 8, first and second half of the sum
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(d[part % 2 * 2]), "+r"(d[part % 2 * 2 + 1])
                 : "r"(a[part]), "r"(b[part / 2]));
#endif
}

__device__ __forceinline__ unsigned mmopt_to_tf32(float x) {
  unsigned r = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
#endif
  return r;
}
#endif  // MMOPT_EMULATED

template <int Kind> struct mmopt_kind { using Sum = float; static constexpr int bytes = Kind == MMOPT_F32 ? 4 : 2; };
template <> struct mmopt_kind<MMOPT_S8> { using Sum = int; static constexpr int bytes = 1; };
template <> struct mmopt_kind<MMOPT_U8> { using Sum = int; static constexpr int bytes = 1; };
template <> struct mmopt_kind<MMOPT_S8U8> { using Sum = int; static constexpr int bytes = 1; };

// In words: of an array of bytes every byte would get a register of its own.
struct alignas(16) mmopt_chunk { unsigned word[MMOPT_CHUNK / 4]; };

// Where chunk `c` of row `r` lies in a tile.
__device__ __forceinline__ int mmopt_place(int r, int c) { return r * MMOPT_ROW + ((c ^ (r >> 1 & 3)) * MMOPT_CHUNK); }

// Rows of a matrix whose summed axis is contiguous, starts at multiples of 16 bytes and has a multiple of 16 bytes.
struct mmopt_rows {
  static constexpr bool direct = true, along_rows = false;
  const unsigned char* data;
  long long stride;  // bytes
  int rows, bytes;   // what there is, from the first row and column of the tile on

  __device__ __forceinline__ void put(unsigned char* tile, int r, int k) const {
    if (r < rows && k < bytes) mmopt_copy(tile, data + r * stride + k);
    else *reinterpret_cast<mmopt_chunk*>(tile) = mmopt_chunk{};
  }
};

// Elements anywhere: of what the gatherer knows of a row it gives the address at k, or null for `fill`. Rows are
// neighbours in memory.
template <typename Gather, int Bytes>
struct mmopt_gathered {
  static constexpr bool direct = false, along_rows = true;
  Gather gather;
  unsigned char fill = 0;  // of integers; floats are filled with zeros

  __device__ __forceinline__ mmopt_chunk get(int r, int k) const {
    mmopt_chunk chunk;
    const auto row = gather.row(r);
#pragma unroll
    for (int n = 0; n < MMOPT_CHUNK / 4; ++n) {
      unsigned word = 0;
#pragma unroll
      for (int e = 0; e < 4 / Bytes; ++e) {
        const unsigned char* from = gather.at(row, k / Bytes + n * (4 / Bytes) + e);
        unsigned element = Bytes == 1 ? fill : 0;
        if (from) {
          if constexpr (Bytes == 4) element = *reinterpret_cast<const unsigned*>(from);
          else if constexpr (Bytes == 2) element = *reinterpret_cast<const unsigned short*>(from);
          else element = *from;
        }
        word |= element << (e * Bytes * 8);
      }
      chunk.word[n] = word;
    }
    return chunk;
  }
};

// A matrix with any strides.
template <int Bytes>
struct mmopt_strided {
  const unsigned char* data;
  long long row_stride, k_stride;  // elements
  int rows, depth;

  __device__ __forceinline__ const unsigned char* row(int r) const {
    return r < rows ? data + r * row_stride * Bytes : nullptr;
  }
  __device__ __forceinline__ const unsigned char* at(const unsigned char* row, int k) const {
    return row && k < depth ? row + k * k_stride * Bytes : nullptr;
  }
};

// Windows of [N, C, H, W]: row = output pixel, k = (channel, tap along H, tap along W).
template <int Bytes, int KH, int KW>
struct mmopt_windows {
  const unsigned char* data;  // of the first channel
  long long image_stride;     // elements
  int first, pixels, depth;
  int height, width, out_height, out_width, stride_h, stride_w, dilation_h, dilation_w, before_h, before_w;

  struct Row {
    const unsigned char* image;  // null beyond the last pixel
    int h, w;                    // where the window begins
  };

  __device__ __forceinline__ Row row(int r) const {
    const int pixel = first + r, rest = pixel / out_width, n = rest / out_height;
    const unsigned char* image = pixel < pixels ? data + n * image_stride * Bytes : nullptr;
    return {image, rest % out_height * stride_h - before_h, pixel % out_width * stride_w - before_w};
  }

  __device__ __forceinline__ const unsigned char* at(const Row& row, int k) const {
    const int c = k / (KH * KW), tap = k - c * (KH * KW);
    const int h = row.h + tap / KW * dilation_h, w = row.w + tap % KW * dilation_w;
    const bool inside = row.image && k < depth && h >= 0 && h < height && w >= 0 && w < width;
    return inside ? row.image + ((static_cast<long long>(c) * height + h) * width + w) * Bytes : nullptr;
  }
};

// Brings a tile of `Rows` rows into shared memory. What has to pass through registers is stored by `finish`.
template <typename Source, int Rows, int Threads>
struct mmopt_tile {
  static constexpr int chunks = Rows * (MMOPT_ROW / MMOPT_CHUNK), each = (chunks + Threads - 1) / Threads;
  mmopt_chunk held[Source::direct ? 1 : each];

  static __device__ __forceinline__ void split(int n, int& r, int& c) {
    if constexpr (Source::along_rows) { r = n % Rows; c = n / Rows; }
    else { r = n / (MMOPT_ROW / MMOPT_CHUNK); c = n % (MMOPT_ROW / MMOPT_CHUNK); }
  }

  __device__ __forceinline__ void start(const Source& source, unsigned char* tile, int k, int thread) {
#pragma unroll
    for (int n = 0; n < each; ++n) {
      int number = n * Threads + thread, r, c;
      if (chunks % Threads && number >= chunks) break;
      split(number, r, c);
      if constexpr (Source::direct) source.put(tile + mmopt_place(r, c), r, k + c * MMOPT_CHUNK);
      else held[n] = source.get(r, k + c * MMOPT_CHUNK);
    }
  }

  __device__ __forceinline__ void finish(unsigned char* tile, int thread) {
    if constexpr (!Source::direct) {
#pragma unroll
      for (int n = 0; n < each; ++n) {
        int number = n * Threads + thread, r, c;
        if (chunks % Threads && number >= chunks) break;
        split(number, r, c);
        *reinterpret_cast<mmopt_chunk*>(tile + mmopt_place(r, c)) = held[n];
      }
    }
  }
};

template <int Kind, int MT, int NT>
__device__ __forceinline__ void mmopt_step(typename mmopt_kind<Kind>::Sum* sum, const unsigned (&a)[MT][4], const unsigned (&b)[NT][2]) {
  if constexpr (Kind == MMOPT_F32) {
    // Each float is the sum of two tf32 numbers of 11 bits; the product of the small ones is below a float's precision.
    unsigned a_big[MT][4], a_small[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        a_big[m][n] = mmopt_to_tf32(__int_as_float(a[m][n]));
        a_small[m][n] = mmopt_to_tf32(__int_as_float(a[m][n]) - __int_as_float(a_big[m][n]));
      }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      unsigned b_big[2], b_small[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        b_big[e] = mmopt_to_tf32(__int_as_float(b[n][e]));
        b_small[e] = mmopt_to_tf32(__int_as_float(b[n][e]) - __int_as_float(b_big[e]));
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mmopt_mma_tf32(sum + (m * NT + n) * 4, a_small[m], b_big);
        mmopt_mma_tf32(sum + (m * NT + n) * 4, a_big[m], b_small);
        mmopt_mma_tf32(sum + (m * NT + n) * 4, a_big[m], b_big);
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if constexpr (Kind == MMOPT_F16) mmopt_mma_f16(sum + (m * NT + n) * 4, a[m], b[n]);
        if constexpr (Kind == MMOPT_BF16) mmopt_mma_bf16(sum + (m * NT + n) * 4, a[m], b[n]);
        if constexpr (Kind == MMOPT_S8) mmopt_mma_s8(sum + (m * NT + n) * 4, a[m], b[n]);
        if constexpr (Kind == MMOPT_U8) mmopt_mma_u8(sum + (m * NT + n) * 4, a[m], b[n]);
        if constexpr (Kind == MMOPT_S8U8) mmopt_mma_s8u8(sum + (m * NT + n) * 4, a[m], b[n]);
      }
  }
}

// Both tiles multiplied: 64 bytes of the summed axis.
template <int Kind, int MT, int NT>
__device__ __forceinline__ void mmopt_multiply(typename mmopt_kind<Kind>::Sum* sum, const unsigned char* a_tile, const unsigned char* b_tile,
                                               int row, int column, int lane) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    unsigned a[MT][4], b[NT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)  // matrices: rows 0-7 and 8-15 of the first chunk, then of the second
      mmopt_load_matrices(a[m], a_tile + mmopt_place(row + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < NT; n += 2) {  // matrices: both chunks of columns 0-7, then of columns 8-15
      unsigned two[4];
      mmopt_load_matrices(two, b_tile + mmopt_place(column + n * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
      b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
    }
    mmopt_step<Kind, MT, NT>(sum, a, b);
  }
}

// sum = A B for a tile: WM x WN warps, each with MT x NT products of 16 x 8 results. `depth` in bytes.
template <int Kind, int WM, int WN, int MT, int NT, int Stages, typename A, typename B>
__device__ __forceinline__ void mmopt_product(typename mmopt_kind<Kind>::Sum* sum, unsigned char* shared, const A& a, const B& b, int depth) {
  constexpr int BM = WM * MT * 16, BN = WN * NT * 8, Threads = WM * WN * 32, Size = (BM + BN) * MMOPT_ROW;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = warp % WM * MT * 16, column = warp / WM * NT * 8, tiles = (depth + MMOPT_ROW - 1) / MMOPT_ROW;
  mmopt_tile<A, BM, Threads> a_tile;
  mmopt_tile<B, BN, Threads> b_tile;
#pragma unroll
  for (int n = 0; n < MT * NT * 4; ++n) sum[n] = 0;
#pragma unroll
  for (int n = 0; n < Stages - 1; ++n) {
    unsigned char* stage = shared + n * Size;
    if (n < tiles) {
      a_tile.start(a, stage, n * MMOPT_ROW, thread);
      b_tile.start(b, stage + BM * MMOPT_ROW, n * MMOPT_ROW, thread);
      a_tile.finish(stage, thread);
      b_tile.finish(stage + BM * MMOPT_ROW, thread);
    }
    mmopt_commit();
  }
#pragma unroll 1
  for (int n = 0; n < tiles; ++n) {
    mmopt_wait<Stages - 2>();
    __syncthreads();
    const int next = n + Stages - 1;
    unsigned char* stage = shared + next % Stages * Size;
    if (next < tiles) {
      a_tile.start(a, stage, next * MMOPT_ROW, thread);
      b_tile.start(b, stage + BM * MMOPT_ROW, next * MMOPT_ROW, thread);
    }
    mmopt_commit();
    const unsigned char* here = shared + n % Stages * Size;
    mmopt_multiply<Kind, MT, NT>(sum, here, here + BM * MMOPT_ROW, row, column, lane);
    if (next < tiles) {
      a_tile.finish(stage, thread);
      b_tile.finish(stage + BM * MMOPT_ROW, thread);
    }
  }
  mmopt_wait<0>();
}

// Rows `pass` · Rows and following of the tile, as [Rows][BN] in shared memory, for whoever finishes the results.
template <int WM, int WN, int MT, int NT, int Rows, typename Sum>
__device__ __forceinline__ void mmopt_deliver(const Sum* sum, unsigned char* shared, int pass) {
  constexpr int BN = WN * NT * 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sum* out = reinterpret_cast<Sum*>(shared);
  __syncthreads();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int r = warp % WM * MT * 16 + m * 16 + lane / 4 + e / 2 * 8 - pass * Rows;
        int c = warp / WM * NT * 8 + n * 8 + lane % 4 * 2 + e % 2;
        if (r >= 0 && r < Rows) out[r * BN + c] = sum[(m * NT + n) * 4 + e];
      }
  __syncthreads();
}

template <typename Sum>
__device__ __forceinline__ Sum mmopt_delivered(const unsigned char* shared, int at) {
  return reinterpret_cast<const Sum*>(shared)[at];
}

// ---- entry points of generated code ----

// `a` rows x depth and `b` columns x depth, both contiguous along the depth.
template <int Kind, int WM, int WN, int MT, int NT, int Stages>
__device__ __forceinline__ void mmopt_rows_by_rows(typename mmopt_kind<Kind>::Sum* sum, unsigned char* shared, const void* a, const void* b,
                                                   long long a_stride, long long b_stride, int rows, int columns, int depth) {
  constexpr int size = mmopt_kind<Kind>::bytes;
  mmopt_rows left{static_cast<const unsigned char*>(a), a_stride * size, rows, depth * size};
  mmopt_rows right{static_cast<const unsigned char*>(b), b_stride * size, columns, depth * size};
  mmopt_product<Kind, WM, WN, MT, NT, Stages>(sum, shared, left, right, depth * size);
}

// `a` contiguous along the depth, `b` with any strides.
template <int Kind, int WM, int WN, int MT, int NT, int Stages>
__device__ __forceinline__ void mmopt_rows_by_any(typename mmopt_kind<Kind>::Sum* sum, unsigned char* shared, const void* a, const void* b,
                                                  long long a_stride, long long b_row, long long b_k, int rows, int columns, int depth) {
  constexpr int size = mmopt_kind<Kind>::bytes;
  using Right = mmopt_gathered<mmopt_strided<size>, size>;
  mmopt_rows left{static_cast<const unsigned char*>(a), a_stride * size, rows, depth * size};
  Right right{{static_cast<const unsigned char*>(b), b_row, b_k, columns, depth}};
  mmopt_product<Kind, WM, WN, MT, NT, Stages>(sum, shared, left, right, depth * size);
}

// Any strides on both sides.
template <int Kind, int WM, int WN, int MT, int NT, int Stages>
__device__ __forceinline__ void mmopt_any_by_any(typename mmopt_kind<Kind>::Sum* sum, unsigned char* shared, const void* a, const void* b,
                                                 long long a_row, long long a_k, long long b_row, long long b_k, int rows, int columns, int depth) {
  constexpr int size = mmopt_kind<Kind>::bytes;
  using Any = mmopt_gathered<mmopt_strided<size>, size>;
  Any left{{static_cast<const unsigned char*>(a), a_row, a_k, rows, depth}};
  Any right{{static_cast<const unsigned char*>(b), b_row, b_k, columns, depth}};
  mmopt_product<Kind, WM, WN, MT, NT, Stages>(sum, shared, left, right, depth * size);
}

// Filters rows x depth by the windows of an image.
template <int Kind, int WM, int WN, int MT, int NT, int Stages, int KH, int KW>
__device__ __forceinline__ void mmopt_rows_by_windows(typename mmopt_kind<Kind>::Sum* sum, unsigned char* shared, const void* a, const void* b,
                                                      long long a_stride, long long image, int rows, int depth, int padded, int first, int pixels,
                                                      int height, int width, int out_height, int out_width, int stride_h, int stride_w,
                                                      int dilation_h, int dilation_w, int before_h, int before_w, int fill) {
  constexpr int size = mmopt_kind<Kind>::bytes;
  using Right = mmopt_gathered<mmopt_windows<size, KH, KW>, size>;
  mmopt_rows left{static_cast<const unsigned char*>(a), a_stride * size, rows, padded * size};
  Right right{{static_cast<const unsigned char*>(b), image, first, pixels, depth, height, width, out_height, out_width,
               stride_h, stride_w, dilation_h, dilation_w, before_h, before_w}, static_cast<unsigned char>(fill)};
  mmopt_product<Kind, WM, WN, MT, NT, Stages>(sum, shared, left, right, depth * size);
}

#endif
