// Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34), and the
// store of a result tile, which rotates gradients back on their way out.
#pragma once

#include "common.cuh"

namespace attn {

// Pair i of a row at position pos is turned by the angle whose cosine is cos[pos * half + i].
struct Rope {
  const float* cos;  // null: no rotation
  const float* sin;
  int half;          // pairs of a row, head_dim / 2
  bool interleaved;  // pairs (2i, 2i + 1) instead of (i, i + half)

  __host__ __device__ __forceinline__ explicit Rope(const AttnParams& p)
      : cos(p.rope_cos), sin(p.rope_sin), half(p.head_dim / 2), interleaved(p.rope_interleaved) {}

  __host__ __device__ __forceinline__ static Rope none() { return Rope(); }

  // W pairs fill two runs of W columns; run 0 or 1 of the pairs from pair0 on begins here.
  __device__ __forceinline__ int column(int pair0, int run, int width) const {
    return interleaved ? 2 * pair0 + run * width : pair0 + run * half;
  }

  // The angles of the W pairs from pair0 on at one position, or their negatives.
  template <int W>
  struct Turn {
    float cos[W], sin[W];
    bool interleaved;

    Turn() = default;
    __device__ __forceinline__ Turn(const Rope& rope, int pos, int pair0, bool inverse)
        : interleaved(rope.interleaved) {
      const int64_t entry = static_cast<int64_t>(pos) * rope.half + pair0;
      if constexpr (W == 1) {
        cos[0] = __ldg(rope.cos + entry);
        sin[0] = __ldg(rope.sin + entry);
      } else {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
          *reinterpret_cast<float4*>(cos + i) =
              __ldg(reinterpret_cast<const float4*>(rope.cos + entry + i));
          *reinterpret_cast<float4*>(sin + i) =
              __ldg(reinterpret_cast<const float4*>(rope.sin + entry + i));
        }
      }
      if (inverse) {
#pragma unroll
        for (int i = 0; i < W; ++i) sin[i] = -sin[i];
      }
    }

    // Rotates the pairs, given as their two runs.
    __device__ __forceinline__ void apply(float (&x)[2][W]) const {
      float* flat = &x[0][0];
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float a = interleaved ? flat[2 * i] : x[0][i];
        const float b = interleaved ? flat[2 * i + 1] : x[1][i];
        const float ra = a * cos[i] - b * sin[i], rb = a * sin[i] + b * cos[i];
        if (interleaved) {
          flat[2 * i] = ra;
          flat[2 * i + 1] = rb;
        } else {
          x[0][i] = ra;
          x[1][i] = rb;
        }
      }
    }
  };

 private:
  __host__ __device__ __forceinline__ Rope()
      : cos(nullptr), sin(nullptr), half(0), interleaved(false) {}
};

// Rotation may work on 16-byte runs: they are whole, and the tables are aligned.
template <class T>
inline bool rope_vec(const AttnParams& p) {
  return p.head_dim / 2 % kChunk<T> == 0 && reinterpret_cast<uintptr_t>(p.rope_cos) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.rope_sin) % 16 == 0;
}

// Rotates a landed tile [kRows][D] in place; row r is at position pos0 + r. The caller puts
// barriers around it. Rows from row_end on stay as they are (the tables may end there).
template <class T, int D, int kRows, int kThreads, int W>
__device__ __forceinline__ void rotate_tile(T* tile, const Rope& rope, int pos0, int row_end) {
  const int units = rope.half / W;
  for (int index = threadIdx.x; index < kRows * units; index += kThreads) {
    const int r = index / units, pair0 = index % units * W;
    if (pos0 + r >= row_end) break;
    T* run0 = tile + tile_offset<T, D>(r, rope.column(pair0, 0, W));
    T* run1 = tile + tile_offset<T, D>(r, rope.column(pair0, 1, W));
    const Rope::Turn<W> turn(rope, pos0 + r, pair0, false);
    float x[2][W];
    load_vec<T, W>(x[0], run0);
    load_vec<T, W>(x[1], run1);
    turn.apply(x);
    store_vec<T, W>(run0, x[0]);
    store_vec<T, W>(run1, x[1]);
  }
}

// Floats of shared memory that one warp needs in store_rows.
template <int D>
constexpr int kStageFloats = 16 * (D + 4);

// Writes scale * acc to rows row0 .. row0 + MT * 16 of out (a [*, head_dim] matrix), except rows
// from row_end on. With RoPE tables, rows are rotated back first, in f32. A warp stages 16 rows at
// a time in its own shared memory, so that device memory sees whole 16-byte runs.
template <class T, int D, int MT>
__device__ __forceinline__ void store_rows(float (&acc)[MT][D / 8][4], float* stage, T* out,
                                           int64_t row_stride, int row0, int row_end, int head_dim,
                                           float scale, const Rope& rope, bool vec) {
  constexpr int kRow = D + 4;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(stage + (g + 8 * h) * kRow + 8 * n + 2 * t) =
            make_float2(scale * acc[m][n][2 * h], scale * acc[m][n][2 * h + 1]);
      }
    }
    __syncwarp();
    const int first = row0 + 16 * m;
    const int rows = min(16, row_end - first);
    auto store = [&]<int W>() {
      if (rope.cos != nullptr) {
        const int units = rope.half / W;
        for (int index = lane; index < rows * units; index += 32) {
          const int r = index / units, pair0 = index % units * W;
          const Rope::Turn<W> turn(rope, first + r, pair0, true);
          float x[2][W];
#pragma unroll
          for (int run = 0; run < 2; ++run) {
#pragma unroll
            for (int i = 0; i < W; ++i) {
              x[run][i] = stage[r * kRow + rope.column(pair0, run, W) + i];
            }
          }
          turn.apply(x);
#pragma unroll
          for (int run = 0; run < 2; ++run) {
            store_vec<T, W>(out + (first + r) * row_stride + rope.column(pair0, run, W), x[run]);
          }
        }
      } else {
        const int units = head_dim / W;
        for (int index = lane; index < rows * units; index += 32) {
          const int r = index / units, col = index % units * W;
          float x[W];
#pragma unroll
          for (int i = 0; i < W; ++i) x[i] = stage[r * kRow + col + i];
          store_vec<T, W>(out + (first + r) * row_stride + col, x);
        }
      }
    };
    if (vec) {
      store.template operator()<kChunk<T>>();
    } else {
      store.template operator()<1>();
    }
  }
}

// ---- Rotation ahead of a kernel -----------------------------------------------------------------

// A [batch][num_heads][seqlen] (packed: [num_heads][total_tokens]) tensor at ptr.
inline AttnTensor workspace_tensor(const AttnParams& p, void* ptr) {
  const int64_t width = p.head_dim;
  const int64_t rows = p.cu_seqlens != nullptr ? p.total_tokens : p.seqlen;
  return {ptr, p.cu_seqlens != nullptr ? 0 : p.num_heads * rows * width, width, rows * width};
}

inline size_t workspace_tensor_bytes(const AttnParams& p) {
  const size_t bytes = static_cast<size_t>(p.total_tokens) * p.num_heads * p.head_dim *
                       (p.dtype == ATTN_F32 ? 4 : 2);
  return (bytes + 255) / 256 * 256;
}

}  // namespace attn
