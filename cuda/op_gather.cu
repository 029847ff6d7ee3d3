// Rows of a table by number, and the sum of their gradients.
//
// The gradient is deterministic without atomics: a stable sort brings the uses of each row
// together, in their order. A block then adds up a window of sorted uses. A run of uses that lies in
// one window is a row of the result; of others the block keeps partial sums, which a second kernel
// adds in order, so that a row with many uses is no bottleneck.
#include <cub/device/device_radix_sort.cuh>

#include "ops.cuh"

namespace attn {

// ---- Forward -----------------------------------------------------------------------------------

// A warp a row, in units of 16, 4 or 2 bytes.
template <class Unit>
__global__ void __launch_bounds__(kOpThreads)
    gather_kernel(const Unit* __restrict__ table, const uint32_t* __restrict__ rows,
                  Unit* __restrict__ y, int64_t len, int64_t count, int64_t units) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kOpThreads / 32) + warp_id();
  if (i >= len) return;
  const int64_t row = rows[i];
  Unit* to = y + i * units;
  if (row < count) {
    const Unit* from = table + row * units;
#pragma unroll 4
    for (int64_t unit = lane_id(); unit < units; unit += 32) to[unit] = from[unit];
  } else {
    Unit nan;
    memset(&nan, 0xff, sizeof(nan));  // a NaN of every dtype
    for (int64_t unit = lane_id(); unit < units; unit += 32) to[unit] = nan;
  }
}

struct Tables {
  OpTable parts[OP_MAX_TABLES];
};

// `warps` a row, of different blocks.
template <int W>
__global__ void __launch_bounds__(kOpThreads)
    sum_rows_kernel(const __grid_constant__ Tables tables, int count, float* __restrict__ y,
                    int64_t len, int64_t width, unsigned warps) {
  const int64_t i = static_cast<int64_t>(blockIdx.x / warps) * (kOpThreads / 32) + warp_id();
  if (i >= len) return;
  const float* from[OP_MAX_TABLES] = {};  // null for a row that is not there
#pragma unroll
  for (int t = 0; t < OP_MAX_TABLES; ++t) {
    if (t >= count) break;
    const OpTable& part = tables.parts[t];
    const int64_t row = part.rows[i];
    if (row < part.count) from[t] = part.table + row * width;
  }
  for (int64_t column = (blockIdx.x % warps * 32 + lane_id()) * W; column < width;
       column += warps * 32 * W) {
    float x[OP_MAX_TABLES][W], sum[W] = {};
#pragma unroll
    for (int t = 0; t < OP_MAX_TABLES; ++t) {
#pragma unroll
      for (int j = 0; j < W; ++j) x[t][j] = NAN;
      if (from[t] != nullptr) load_f32<W>(x[t], from[t] + column);
    }
#pragma unroll
    for (int t = 0; t < OP_MAX_TABLES; ++t) {
      if (t >= count) break;
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += x[t][j];
    }
    store_f32<W>(y + i * width + column, sum);
  }
}

// ---- Backward ----------------------------------------------------------------------------------

constexpr int kWindow = 64;        // uses that a block adds up
constexpr int kInFlight = 8;       // loads of a thread at a time
constexpr int kScatterThreads = 128;

// What the kernels share. keys are the row numbers in order, `count` in place of any from there on;
// uses say where in the gradient each was. partial is [windows][2][width]: slot 0 belongs to the
// run that began in an earlier window, slot 1 to the one that goes on in the next.
struct Scatter {
  const uint32_t* keys;
  const uint32_t* uses;
  float* partial;
  int64_t len, width;
  uint32_t count;

  __device__ __forceinline__ bool same(int64_t a, int64_t b) const {
    return a >= 0 && b < len && keys[a] == keys[b];
  }

  __device__ __forceinline__ float* slot(int64_t window, int which) const {
    return partial + (2 * window + which) * width;
  }
};

__global__ void __launch_bounds__(kOpThreads)
    number_uses_kernel(const uint32_t* __restrict__ rows, uint32_t* __restrict__ keys,
                       uint32_t* __restrict__ uses, int64_t len, uint32_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kOpThreads + threadIdx.x;
  if (i >= len) return;
  keys[i] = min(rows[i], count);
  uses[i] = static_cast<uint32_t>(i);
}

// No other thread adds to the same elements.
template <class T, int W>
__device__ __forceinline__ void add_to(T* to, float (&x)[W]) {
  float before[W];
  load_vec<T, W>(before, to);
#pragma unroll
  for (int j = 0; j < W; ++j) x[j] += before[j];
  store_vec<T, W>(to, x);
}

template <class T, int W>
__global__ void __launch_bounds__(kScatterThreads)
    add_window_kernel(const T* __restrict__ grad, T* __restrict__ d_table, const Scatter s,
                      int64_t tiles) {
  const int64_t window = blockIdx.x / tiles, begin = window * kWindow;
  const int64_t end = min(begin + kWindow, s.len);
  const int64_t column = (blockIdx.x % tiles * kScatterThreads + threadIdx.x) * W;
  if (column >= s.width) return;

  bool from_before = s.same(begin - 1, begin);
  float sum[W] = {};
  for (int64_t i0 = begin; i0 < end; i0 += kInFlight) {
    float x[kInFlight][W];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (i0 + i < end) load_vec<T, W>(x[i], grad + s.uses[i0 + i] * s.width + column);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (i0 + i >= end) break;
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += x[i][j];
      const bool goes_on = s.same(i0 + i, i0 + i + 1);
      if (goes_on && i0 + i + 1 < end) continue;
      const uint32_t row = s.keys[i0 + i];
      if (row < s.count) {
        if (from_before || goes_on) {
          store_f32<W>(s.slot(window, from_before ? 0 : 1) + column, sum);
        } else {
          add_to<T, W>(d_table + row * s.width + column, sum);
        }
      }
      from_before = false;
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] = 0.0f;
    }
  }
}

// The end of the run of equal keys that `at` belongs to.
__device__ __forceinline__ int64_t run_end(const Scatter& s, int64_t at) {
  const uint32_t key = s.keys[at];
  int64_t low = at + 1, high = s.len;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (s.keys[middle] == key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// For the run that goes on after the window, if it began in it.
template <class T, int W>
__global__ void __launch_bounds__(kScatterThreads)
    join_windows_kernel(T* __restrict__ d_table, const Scatter s, int64_t tiles) {
  const int64_t window = blockIdx.x / tiles, begin = window * kWindow;
  const int64_t last = min(begin + kWindow, s.len) - 1;
  const int64_t column = (blockIdx.x % tiles * kScatterThreads + threadIdx.x) * W;
  if (column >= s.width || !s.same(last, last + 1)) return;
  const uint32_t row = s.keys[last];
  const bool began_before = s.keys[begin] == row && s.same(begin - 1, begin);
  if (began_before || row >= s.count) return;

  const int64_t last_window = (run_end(s, last) - 1) / kWindow;
  float sum[W];
  load_f32<W>(sum, s.slot(window, 1) + column);
#pragma unroll 4
  for (int64_t next = window + 1; next <= last_window; ++next) {
    float x[W];
    load_f32<W>(x, s.slot(next, 0) + column);
#pragma unroll
    for (int j = 0; j < W; ++j) sum[j] += x[j];
  }
  add_to<T, W>(d_table + row * s.width + column, sum);
}

// ---- Workspace ---------------------------------------------------------------------------------

inline int64_t windows_of(int64_t len) { return (len + kWindow - 1) / kWindow; }

inline int sort(void* temporary, size_t& bytes, const uint32_t* keys, uint32_t* sorted_keys,
                const uint32_t* uses, uint32_t* sorted_uses, int64_t len, int bits,
                void* stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, sorted_keys, uses, sorted_uses,
                                         static_cast<int>(len), 0, bits,
                                         static_cast<cudaStream_t>(stream));
}

// Parts of the workspace, each at a multiple of 256 bytes.
struct ScatterWorkspace {
  size_t array, partial, temporary;  // bytes of one array of len numbers, and of the others
  int bits;                          // of a key

  int init(int64_t len, int64_t count, int64_t width) {
    if (len > INT32_MAX || count >= UINT32_MAX) return ATTN_ERR_SIZE;
    array = round_up(len * sizeof(uint32_t));
    partial = round_up(2 * windows_of(len) * width * sizeof(float));
    temporary = 0;
    bits = 1;
    while (count >> bits != 0) ++bits;
    return sort(nullptr, temporary, nullptr, nullptr, nullptr, nullptr, len, bits, nullptr);
  }

  size_t total() const { return 4 * array + partial + temporary; }

 private:
  static size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }
};

}  // namespace attn

int op_gather_rows(int32_t dtype, const void* table, const uint32_t* rows, void* y, int64_t len,
                   int64_t count, int64_t width, void* stream) {
  using namespace attn;
  if (len == 0 || width == 0) return ATTN_OK;
  return for_element(dtype, [&]<class T>() {
    auto gather = [&]<class Unit>() {
      constexpr int64_t kRows = kOpThreads / 32;
      return launch(gather_kernel<Unit>, (len + kRows - 1) / kRows, kOpThreads, 0, stream,
                    static_cast<const Unit*>(table), rows, static_cast<Unit*>(y), len, count,
                    static_cast<int64_t>(width * sizeof(T) / sizeof(Unit)));
    };
    if (aligned_to_16({table, y}) && width % kChunk<T> == 0) {
      return gather.template operator()<uint4>();
    }
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    return gather.template operator()<Bits>();
  });
}

int op_sum_rows(const OpTable* tables, int64_t count, float* y, int64_t len, int64_t width,
                void* stream) {
  using namespace attn;
  if (count < 1 || count > OP_MAX_TABLES) return ATTN_ERR_SIZE;
  if (len == 0 || width == 0) return ATTN_OK;
  Tables list;
  bool aligned = aligned_to_16({y}) && width % 4 == 0;
  for (int64_t t = 0; t < count; ++t) {
    list.parts[t] = tables[t];
    aligned = aligned && aligned_to_16({tables[t].table});
  }
  constexpr int64_t kRows = kOpThreads / 32;
  const int64_t columns = aligned ? 128 : 32;  // that a warp takes at a time
  const int64_t warps = few_rows(len) ? (width + columns - 1) / columns : 1;
  return launch(aligned ? sum_rows_kernel<4> : sum_rows_kernel<1>,
                (len + kRows - 1) / kRows * warps, kOpThreads, 0, stream, list,
                static_cast<int>(count), y, len, width, static_cast<unsigned>(warps));
}

int op_scatter_rows_workspace(int64_t len, int64_t count, int64_t width, size_t* bytes) {
  attn::ScatterWorkspace workspace;
  ATTN_RETURN_IF(workspace.init(len, count, width));
  *bytes = workspace.total();
  return ATTN_OK;
}

int op_scatter_rows(int32_t dtype, const void* grad, const uint32_t* rows, void* d_table,
                    int32_t add, void* workspace, int64_t len, int64_t count, int64_t width,
                    void* stream) {
  using namespace attn;
  if (count == 0 || width == 0) return ATTN_OK;
  ScatterWorkspace sizes;
  ATTN_RETURN_IF(sizes.init(len, count, width));
  char* part = static_cast<char*>(workspace);
  auto take = [&](size_t bytes) { return reinterpret_cast<uint32_t*>((part += bytes) - bytes); };
  uint32_t* keys = take(sizes.array);
  uint32_t* uses = take(sizes.array);
  uint32_t* sorted_keys = take(sizes.array);
  uint32_t* sorted_uses = take(sizes.array);
  float* partial = reinterpret_cast<float*>(take(sizes.partial));
  void* temporary = part;

  return for_element(dtype, [&]<class T>() -> int {
    if (!add) {
      ATTN_RETURN_IF(cudaMemsetAsync(d_table, 0, count * width * sizeof(T),
                                     static_cast<cudaStream_t>(stream)));
    }
    if (len == 0) return ATTN_OK;
    const uint32_t end = static_cast<uint32_t>(count);
    ATTN_RETURN_IF(launch(number_uses_kernel, (len + kOpThreads - 1) / kOpThreads, kOpThreads, 0,
                          stream, rows, keys, uses, len, end));
    ATTN_RETURN_IF(sort(temporary, sizes.temporary, keys, sorted_keys, uses, sorted_uses, len,
                        sizes.bits, stream));
    const Scatter scatter{sorted_keys, sorted_uses, partial, len, width, end};
    const bool aligned = aligned_to_16({grad, d_table}) && width % kChunk<T> == 0;
    return for_vector<T>(aligned, [&]<int W>() -> int {
      const int64_t tiles = (width + kScatterThreads * W - 1) / (kScatterThreads * W);
      const int64_t blocks = windows_of(len) * tiles;
      ATTN_RETURN_IF(launch(add_window_kernel<T, W>, blocks, kScatterThreads, 0, stream,
                            static_cast<const T*>(grad), static_cast<T*>(d_table), scatter, tiles));
      return launch(join_windows_kernel<T, W>, blocks, kScatterThreads, 0, stream,
                    static_cast<T*>(d_table), scatter, tiles);
    });
  });
}
