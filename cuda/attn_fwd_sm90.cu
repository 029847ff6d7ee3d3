// Attention on Hopper, forward: o = softmax(scale * rope(q) rope(k)^T + mask) v, and lse.
//
//   one thread block a multiprocessor; for each block of queries in its share of the work, a few
//   tiles of 64 queries, not all of one head:
//     one warp plans: which tiles these are and what they see, some blocks ahead
//     one producer thread:
//       load q (TMA)
//       for each tile of keys that the block sees, for each of its runs of one head's tiles:
//         load k, v into a ring of stages (TMA), for the warpgroups that see them
//     each consumer warpgroup, for its 64 queries:
//       if RoPE, rotate q in shared memory, by angles read while the block before ended, and leave
//         it for the backward if asked to (k comes rotated)
//       s = q k_0^T; p = softmax numerators of s; l = rowsum p
//       for each further tile j:
//         in turn with the other warpgroups: start s = q k_j^T, start o += p v_(j-1)
//         await s; where a limit crosses the tile, masked s = -inf
//         if some s may exceed its row's offset by 2^8: raise offsets to the maxima
//         p = exp(s - offset); l += rowsum p          (beside the product with v_(j-1))
//         await o; if offsets were raised: o, l *= exp(old - new)
//       o += p v_last; o /= l; lse = offset + ln l; a row that saw no key gets o = 0, lse = -inf
//
// (FlashAttention-3, Shah et al. 2024, https://arxiv.org/abs/2407.08608, algorithms 1 and 2, with
// turns instead of its ping-pong of two, and a softmax that rarely needs row maxima.)
//
// What made it fast; TFLOP/s on one H100, bf16, head_dim 64, at sequence lengths 512, 2048 and 8192
// (README.md compares with cuDNN):
//   1. Offsets that need no maxima. exp(s - offset) is exact for any offset near the maximum, so a
//      tile only has to tell that no score exceeds the offset by much. As integers, positive floats
//      order like floats and negative ones stay below them, and VIMNMX3 takes the maximum of three:
//      32 instructions a tile and warp instead of 64, no shuffles. With uniform addresses (3.) a
//      tile takes 400 instructions a warp; others count 610 of a kernel of theirs and 620 of
//      cuDNN's (github.com/gabrieldemarmiesse/torch-mojo-backend/pull/391).
//   2. Turns: a warpgroup starts its products only when the one before it has started its own, so
//      that one's products run beside the others' exponentials: 374, 489, 536 -> 401, 530, 574.
//   3. Exponentials before the wait for the product beside them (the compiler moves the wait up
//      unless a branch is in its way), addresses in uniform registers, blocks decoded by the
//      producer (now by a planner, 6.): 341, 467, 522 -> 376, 507, 574.
//   4. s of a tile beside o += p v of the tile before, in one warpgroup: 365, 472, 524 -> 374, 489,
//      536.
//   5. Causal blocks in pairs of equal length, instead of the longest first: causal head_dim 128 at
//      2048 376 -> 610; head_dim 64 415 -> 441.
//   6. Blocks that take tiles of several heads, planned by a warp of its own. Only one block of a
//      line of three heads may have idle warpgroups where three do not divide a head's tiles, and
//      causal warpgroups see about as much as their neighbours: on one H200, at 512, 1024, 2048 and
//      8192, 387, 434, 515, 550 -> 412, 475, 516, 539; causal 231, 280, 397, 498 -> 265, 349, 420,
//      496.
//   7. Angles read a block ahead: with 12 heads and RoPE, at 128, 512 and 2048, 110, 176, 455
//      -> 99, 167, 455 us, of which rotating k ahead takes 30.
#include "sm90_common.cuh"
#include "softmax.cuh"

namespace attn {

using namespace hopper;

// kGroups warpgroups of 64 queries each, with kRegisters a thread, share tiles of kN keys in
// kStages buffers. Heads of up to kMaxShared query tiles may share a block.
template <int D>
struct FwdSm90Config;
template <>
struct FwdSm90Config<64> {
  static constexpr int kGroups = 3, kRegisters = 160, kN = 128, kStages = 5;
  static constexpr int kMaxShared = INT_MAX;
};
template <>
struct FwdSm90Config<128> {
  static constexpr int kGroups = 2, kRegisters = 240, kN = 128, kStages = 2;
  static constexpr int kMaxShared = 32;
};

template <int D>
struct FwdSm90 : FwdSm90Config<D> {
  using C = FwdSm90Config<D>;
  static constexpr int kM = 64 * C::kGroups, kConsumers = 128 * C::kGroups;
  static constexpr int kThreads = kConsumers + 128, kItems = 4;
  static constexpr int kQ = kM * D, kTile = C::kN * D;  // elements
  static_assert(C::kGroups <= C::kStages, "a block's runs fit the ring");
};

// A warpgroup's part of a block.
struct QueryTile {
  int q0;     // its first query; len: none
  int head;   // -1: none
  int run;    // which of the block's runs that is in
  int k_end;  // of the keys that it sees
  int stage;  // where in the ring its first tile of keys is
  uint32_t parity;
};

// A block of query tiles, which may belong to several heads of a sequence. Tiles of one head that
// follow each other are a run, and each run has the keys loaded for itself.
template <int kGroups>
struct Item {
  int runs;  // 0: no more work
  int batch;
  int k_begin, k_end;  // of the keys that some tile sees; k_begin is a multiple of the tile size
  int len, key_end;    // of the sequence
  int64_t first_row;
  QueryTile tiles[kGroups];
};

template <class T, int D>
struct FwdShared {
  using S = FwdSm90<D>;
  static constexpr int kStages = S::kStages;
  T q[2][S::kQ], k[kStages][S::kTile], v[kStages][S::kTile];
  Item<S::kGroups> items[S::kItems];
  Barrier item_full[S::kItems], item_empty[S::kItems], q_full[2], q_empty[2];
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];

  __device__ __forceinline__ static FwdShared& get() {
    extern __shared__ __align__(1024) char smem[];
    return *reinterpret_cast<FwdShared*>(smem);
  }
};

// The order of work. The query tiles of `line_heads` heads of a sequence form a line, which is cut
// into blocks of kGroups tiles from its end, so that only its first block may have less. A line
// begins with the first few tiles of each of its heads, goes on with the next `band` tiles of each
// head, and so on; a band of a whole sequence makes it one head after the other. Where a limit
// depends on the query, bands are as short as a tile of keys: then the queries of a block see the
// same tiles, at the price of loading those of two heads.
//
// Blocks are persistent, one a multiprocessor, and take units of work in turn. Without causality a
// unit is one block. With it, a unit is a block of one line and the block as far from the other end
// of the next line, or of the same line if that is the last, so that all units take equally long.
struct FwdSm90Params : KernelParams {
  CUtensorMap q_map, k_map, v_map;
  AttnTensor rotated_q;  // where to leave them, or a null ptr
  int line_heads, band, parts, sequence_units, units;

  // For blocks of `groups` tiles; heads of more than max_shared tiles share no blocks.
  FwdSm90Params(const KernelParams& p, const AttnTensor& rotated_q, int groups, int max_shared)
      : KernelParams(p), rotated_q(rotated_q), parts(p.causal ? 2 : 1), sequence_units(),
        units(-1) {
    const int tiles = ceil_div(seqlen, 64);
    line_heads = tiles <= max_shared ? groups : 1;
    band = causal || window_left >= 0 || window_right >= 0 ? 2 : tiles;
    const int lines = ceil_div(num_heads, line_heads);
    const auto line_blocks = [&](int heads) { return int64_t{ceil_div(heads * tiles, groups)}; };
    // Units are of `parts` lines. The last line, which may have fewer heads, may be left by itself.
    const int last_heads = num_heads - (lines - 1) * line_heads;
    const int64_t last = lines % parts == 1 % parts
                             ? (line_blocks(last_heads) + parts - 1) / parts
                             : line_blocks(line_heads);
    const int64_t count = (ceil_div(lines, parts) - 1) * line_blocks(line_heads) + last;
    if (count * batch * parts > INT32_MAX / 2) return;
    sequence_units = static_cast<int>(count);
    units = sequence_units * batch;
  }
};

// The query tiles of one part of a unit.
template <int kGroups>
struct Block {
  Sequence seq;
  int batch, band, head0, heads, tiles;  // the line's heads, and `tiles` of each
  int first;                             // place in the line of the block's first tile, or negative
  bool valid;

  __device__ __forceinline__ Block(const FwdSm90Params& p, int unit, int part)
      : batch(unit / p.sequence_units), band(p.band) {
    seq = sequence(p, batch);
    unit %= p.sequence_units;
    tiles = ceil_div(seq.len, 64);
    const int full = max(ceil_div(p.line_heads * tiles, kGroups), 1);  // blocks of most lines
    const int lines = ceil_div(p.num_heads, p.line_heads), i = unit % full;
    int line = unit / full * p.parts;
    const bool last = line + p.parts > lines;
    if (!last) line += part;
    head0 = line * p.line_heads;
    heads = min(p.num_heads - head0, p.line_heads);
    const int count = heads * tiles, blocks = ceil_div(count, kGroups);
    first = count - (part == 0 ? i + 1 : blocks - i) * kGroups;
    valid = i < blocks && (!last || i + part < blocks - i);
  }

  // The head and the first query of the tile at place t of the line.
  __device__ __forceinline__ void locate(int t, int& head, int& q0) const {
    const int whole = tiles / band * band;  // tiles of a head in bands that are not cut short
    const bool rest = t >= heads * whole;
    const int width = rest ? tiles - whole : band, skipped = rest ? whole : 0;
    t -= heads * skipped;
    const int stretch = t / width;
    head = head0 + stretch % heads;
    q0 = 64 * (skipped + stretch / heads * width + t % width);
  }
};

// Online softmax of a thread's two rows. Offsets are in log2 units, -inf before the first key.
struct LazySoftmax {
  float offset[2], sum[2];
  int limit[2];  // bits of the greatest score that needs no new offset, or INT_MIN: ask the maximum

  __device__ __forceinline__ LazySoftmax() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      offset[h] = -INFINITY;
      sum[h] = 0.0f;
      limit[h] = INT_MIN;
    }
  }

  // Whether some score of the warp's rows may exceed its row's offset by more than 2^kSlack.
  template <int NT>
  __device__ __forceinline__ bool exceeds(const float (&s)[NT][4]) const {
    int best[2] = {INT_MIN, INT_MIN};
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        best[h] = __vimax3_s32(best[h], __float_as_int(s[n][2 * h]),
                               __float_as_int(s[n][2 * h + 1]));
      }
    }
    return __any_sync(0xffffffffu, best[0] > limit[0] || best[1] > limit[1]);
  }

  // Raises offsets to the maxima; shrink is what sums (done here) and o must be multiplied by.
  template <int NT>
  __device__ __forceinline__ void raise(const float (&s)[NT][4], float (&shrink)[2],
                                        float scale_log2) {
    constexpr float kSlack = 8.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = s[0][2 * h];
#pragma unroll
      for (int n = 0; n < NT; ++n) best = fmaxf(best, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      best = fmaxf(offset[h], quad_max(best) * scale_log2);
      shrink[h] = best == -INFINITY ? 1.0f : exp2_approx(offset[h] - best);
      offset[h] = best;
      sum[h] *= shrink[h];
      const float most = __fdividef(best + kSlack, scale_log2);
      limit[h] = most >= 0.0f ? __float_as_int(most) : INT_MIN;
    }
  }

  // Turns the scores of columns 8 * kBegin to 8 * kEnd into exp(score - offset), and adds them up.
  template <int kBegin, int kEnd, int NT>
  __device__ __forceinline__ void exponentiate(float (&s)[NT][4], float scale_log2) {
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float subtract = offset[i / 2] == -INFINITY ? 0.0f : offset[i / 2];
        s[n][i] = exp2_approx(fmaf(s[n][i], scale_log2, -subtract));
        sum[i / 2] += s[n][i];
      }
    }
  }
};

// Works out blocks ahead of their turn. One warp, whose lane g finds the block's tile g.
template <class T, int D>
__device__ __forceinline__ void plan(const FwdSm90Params& p) {
  using S = FwdSm90<D>;
  constexpr int kN = S::kN;
  auto& shared = FwdShared<T, D>::get();
  const Window window(p);
  const int lane = lane_id();
  Ring<S::kItems> ring;
  uint32_t loaded = 0;  // tiles of keys before this block's
  for (int round = 0; round < p.units; round += gridDim.x) {
    // If there are thread blocks enough for the parts of the last units, each takes one.
    const int step = (p.units - round) * p.parts <= static_cast<int>(gridDim.x) ? p.parts : 1;
    const int unit = round + blockIdx.x / step;
    if (unit >= p.units) break;
    for (int part = blockIdx.x % step; part < p.parts; part += step) {
      const Block<S::kGroups> block(p, unit, part);
      if (!block.valid) continue;
      QueryTile tile{block.seq.len, -1, 0, 0, 0, 0};
      int k_begin = INT_MAX;
      const bool some = lane < S::kGroups && block.first + lane >= 0;
      if (some) {
        block.locate(block.first + lane, tile.head, tile.q0);
        tile.k_end = min(block.seq.key_end, window.end_key(tile.q0, 64));
        k_begin = window.first_key(tile.q0) / kN * kN;
      }
      const int k_end = __reduce_max_sync(~0u, tile.k_end);
      k_begin = __reduce_min_sync(~0u, k_begin);
      const int before = __shfl_up_sync(~0u, tile.head, 1);
      const uint32_t firsts = __ballot_sync(~0u, some && (lane == 0 || tile.head != before));
      const int runs = __popc(firsts);
      tile.run = __popc(firsts << (31 - lane)) - 1;
      tile.stage = (loaded + tile.run) % S::kStages;
      tile.parity = (loaded + tile.run) / S::kStages % 2;
      loaded += runs * ceil_div(max(k_end - k_begin, 0), kN);

      wait(shared.item_empty + ring.stage, ring.parity ^ 1);
      auto& item = shared.items[ring.stage];
      if (lane < S::kGroups) item.tiles[lane] = tile;
      if (lane == 0) {
        item.runs = runs;
        item.batch = block.batch;
        item.k_begin = k_begin;
        item.k_end = k_end;
        item.len = block.seq.len;
        item.key_end = block.seq.key_end;
        item.first_row = block.seq.first_row;
      }
      __syncwarp();
      if (lane == 0) arrive(shared.item_full + ring.stage);
      ring.next();
    }
  }
  wait(shared.item_empty + ring.stage, ring.parity ^ 1);
  if (lane == 0) {
    shared.items[ring.stage].runs = 0;
    arrive(shared.item_full + ring.stage);
  }
}

// Loads what the plan asks for. One thread.
template <class T, int D>
__device__ __forceinline__ void produce(const FwdSm90Params& p) {
  using S = FwdSm90<D>;
  constexpr int kGroups = S::kGroups, kN = S::kN;
  auto& shared = FwdShared<T, D>::get();
  Ring<S::kItems> items;
  Ring<2> q_ring;
  Ring<S::kStages> ring;
  for (;; items.next(), q_ring.next()) {
    wait(shared.item_full + items.stage, items.parity);
    const auto& item = shared.items[items.stage];
    if (item.runs == 0) break;
    const int row0 = static_cast<int>(item.first_row);
    const int batch = p.cu_seqlens != nullptr ? 0 : item.batch;
    const int k_begin = item.k_begin, k_end = item.k_end;
    int head[kGroups], run[kGroups], k_ends[kGroups], q0[kGroups], queries = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      head[g] = item.tiles[g].head;
      run[g] = item.tiles[g].run;
      k_ends[g] = item.tiles[g].k_end;
      q0[g] = item.tiles[g].q0;
      queries += head[g] >= 0 ? 64 : 0;
    }
    arrive(shared.item_empty + items.stage);

    Barrier* const q_full = shared.q_full + q_ring.stage;
    wait(shared.q_empty + q_ring.stage, q_ring.parity ^ 1);
    arrive_expect(q_full, queries * D * 2);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (head[g] < 0) continue;
#pragma unroll
      for (int c = 0; c < D / 64; ++c) {
        tma_load(shared.q[q_ring.stage] + (c * kGroups + g) * 64 * 64, p.q_map, q_full, c * 64,
                 head[g], row0 + q0[g], batch);
      }
    }
    for (int k0 = k_begin; k0 < k_end; k0 += kN) {
      // Tiles of the block's runs alternate.
#pragma unroll
      for (int h = 0; h < kGroups; ++h) {
        if (head[h] < 0 || (h > 0 && run[h] == run[h - 1])) continue;
        int users = 0;
#pragma unroll
        for (int g = h; g < kGroups; ++g) users += run[g] == run[h] && k0 < k_ends[g];
        auto load = [&](auto& tiles, const CUtensorMap& map, Barrier* full, Barrier* empty) {
          wait(empty + ring.stage, ring.parity ^ 1);
          // Warpgroups that do not see the tile never ask for it. They may skip that phase of
          // `full`: before they ask for a later tile of the stage, they have a turn that comes
          // after the one in which others found this tile loaded. Nobody finds a tile without users
          // loaded, but its phase ends here, before any later tile is loaded. Nor does a look ahead
          // (is_over) find an older tile: that kStages before belongs to this or an earlier turn, as
          // a block has at most kStages runs, which all begin at k_begin.
          if (users < kGroups) arrive_many(empty + ring.stage, 4 * (kGroups - users));
          arrive_expect(full + ring.stage, users > 0 ? S::kTile * 2 : 0);
          if (users == 0) return;
#pragma unroll
          for (int c = 0; c < D / 64; ++c) {
            tma_load(tiles[ring.stage] + c * kN * 64, map, full + ring.stage, c * 64, head[h],
                     row0 + k0, batch);
          }
        };
        load(shared.k, p.k_map, shared.k_full, shared.k_empty);
        load(shared.v, p.v_map, shared.v_full, shared.v_empty);
        ring.next();
      }
    }
  }
}

template <class T, int D>
__device__ __forceinline__ void consume(const FwdSm90Params& p) {
  using S = FwdSm90<D>;
  constexpr int kN = S::kN, NT = kN / 8, kStages = S::kStages;
  auto& shared = FwdShared<T, D>::get();
  // Known to be the same for all lanes.
  const int warp = __shfl_sync(~0u, warp_id(), 0), group = warp / 4, group_row = group * 64;
  const int warp_row = warp * 16, lane = lane_id();
  const Window window(p);
  const Rope rope(p);
  const float scale_log2 = p.softmax_scale * kLog2e;
  Ring<S::kItems> items;
  Ring<2> q_ring;
  auto release = [&](Barrier* b) {
    if (lane == 0) arrive(b);
  };

  // Warpgroups take turns at the tensor cores.
  auto turn = [&](auto&& work) {
    sync_group(1 + S::kGroups + group, 256);
    work();
    arrive_group(1 + S::kGroups + (group + 1) % S::kGroups, 256);
  };
  if (group == S::kGroups - 1) arrive_group(1 + S::kGroups, 256);

  // The angles of the next block's queries are read while this block ends.
  TileAngles<T, D, S::kM> angles;
  auto read_angles = [&] {
    wait(shared.item_full + items.stage, items.parity);
    const auto& item = shared.items[items.stage];
    if (rope.cos != nullptr && item.runs != 0) {
      angles.load(rope, item.tiles[group].q0, item.len);
    } else {
      angles = {};  // or those of this block would be kept through its loop
    }
  };
  read_angles();
  for (;;) {
    const auto& item = shared.items[items.stage];
    const int runs = item.runs;
    if (runs == 0) break;
    const QueryTile& tile = item.tiles[group];
    const int group_q0 = tile.q0, warp_q0 = group_q0 + warp % 4 * 16;
    const int len = item.len, key_end = item.key_end, k_end = item.k_end, own_end = tile.k_end;
    Ring<kStages> ring{tile.stage, tile.parity};
    const uint8_t* const key_mask =
        p.key_mask != nullptr ? p.key_mask + int64_t{item.batch} * p.seqlen : nullptr;
    // Of the keys, those before any padding, those that the thread's two rows see, and those that
    // all rows of the warp see.
    const int clean_end = key_mask != nullptr ? 0 : key_end;
    const int row = warp_q0 + lane / 4;
    const int lo[] = {row - window.left, row + 8 - window.left};
    const int hi[] = {min(row + window.right + 1, key_end), min(row + window.right + 9, key_end)};
    const int all_begin = warp_q0 + 15 - window.left;
    const int all_end = min(clean_end, warp_q0 + window.right + 1);
    T* const q = shared.q[q_ring.stage];
    wait(shared.q_full + q_ring.stage, q_ring.parity);
    if (rope.cos != nullptr) {
      T* const rotated = p.rotated_q.ptr == nullptr
                             ? nullptr
                             : head_ptr<T>(p.rotated_q, item.batch, tile.head, item.first_row) +
                                   group_q0 * p.rotated_q.row_stride;
      angles.rotate(q, rope, group_row, rotated, p.rotated_q.row_stride, len - group_q0);
      fence_async();
      sync_group(1 + group, 128);
    }
    // Out of a shuffle, or the loop would compute it again for each tile.
    const uint32_t q_desc = __shfl_sync(~0u, descriptor(q + group_row * 64), 0);

    float out[D / 8][4] = {};
    LazySoftmax softmax;
    // Starts s = q k^T for the ring's tile. `ready`: it is known to have landed.
    auto scores = [&](float (&s)[NT][4], bool ready) {
      if (!ready) wait(shared.k_full + ring.stage, ring.parity);
      const uint32_t k_desc = descriptor(shared.k[ring.stage]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const int column = k / 4, step = k % 4 * 32;
        wgmma<T, false, false>(flat(s), advance(q_desc, column * S::kM * 128 + step),
                               advance(k_desc, column * kN * 128 + step), k != 0);
      }
      wgmma_commit();
    };
    // Starts out += probs v for the tile at k0.
    auto weigh = [&](const uint32_t (&probs)[kN / 16][4], const Ring<kStages>& at, int k0,
                     bool ready) {
      if (!ready) wait(shared.v_full + at.stage, at.parity);
      T* const v = shared.v[at.stage];
      if (k0 + kN > clean_end) {
        zero_padding<T, D, kN>(v, 0, kN, key_mask, key_end, k0);
        fence_async();
        sync_group(1 + group, 128);
      }
      const uint32_t v_desc = descriptor(v, kN * 128);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kN / 16; ++k) {
        wgmma<T, true>(flat(out), probs[k], advance(v_desc, k * 16 * 128), true);
      }
      wgmma_commit();
    };
    auto mask = [&](float (&s)[NT][4], int k0) {
      if (k0 < all_begin || k0 + kN > all_end) {
        mask_tile(s, lo, hi, key_mask, k0, -INFINITY);
      }
    };
    auto scale_out = [&](const float (&shrink)[2]) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
      }
    };

    int k0 = item.k_begin;
    if (k0 < own_end) {
      constexpr int kFirst = NT * 3 / 4;
      uint32_t probs[kN / 16][4];
      float s[NT][4], shrink[2];
      turn([&] { scores(s, false); });
      wgmma_wait<0>();
      pin(flat(s));
      release(shared.k_empty + ring.stage);
      mask(s, k0);
      softmax.raise(s, shrink, scale_log2);
      softmax.template exponentiate<0, NT>(s, scale_log2);
      to_operand<T>(probs, s);
      bool k_ready = false, v_ready = false;
      for (k0 += kN; k0 < own_end; k0 += kN) {
        const Ring<kStages> before = ring;
        ring.advance(runs);
        pin(flat(out));
        turn([&] {
          scores(s, k_ready);
          weigh(probs, before, k0 - kN, v_ready);
        });
        wgmma_wait<1>();
        pin(flat(s));
        release(shared.k_empty + ring.stage);
        mask(s, k0);
        const bool exceeds = softmax.exceeds(s);
        if (exceeds) softmax.raise(s, shrink, scale_log2);
        Ring<kStages> next = ring;
        next.advance(runs);
        k_ready = is_over(shared.k_full + next.stage, next.parity);
        v_ready = is_over(shared.v_full + ring.stage, ring.parity);
        softmax.template exponentiate<0, kFirst>(s, scale_log2);
        pin(flat(s));
        // Two ways to wait, or the compiler would move the wait before the exponentials.
        if (exceeds) {
          wgmma_wait<0>();
          pin(flat(out));
          scale_out(shrink);
        } else {
          asm volatile("wgmma.wait_group.sync.aligned 0; // no rescaling" ::: "memory");
          pin(flat(out));
        }
        release(shared.v_empty + before.stage);
        softmax.template exponentiate<kFirst, NT>(s, scale_log2);
        to_operand<T>(probs, s);
      }
      pin(flat(out));
      turn([&] { weigh(probs, ring, k0 - kN, v_ready); });
      wgmma_wait<0>();
      pin(flat(out));
      release(shared.v_empty + ring.stage);
    } else if (k0 < k_end) {
      turn([] {});
    }
    // Tiles that only other warpgroups see.
    for (; k0 < k_end; k0 += kN) turn([] {});

    const int item_stage = items.stage;
    items.next();
    read_angles();
    // All warps of the group are done with q: the output goes through its place.
    sync_group(1 + group, 128);
    const bool varlen = p.cu_seqlens != nullptr;
    const int64_t row0 = varlen ? item.first_row : int64_t{item.batch} * p.num_heads * p.seqlen;
    float* const lse = p.lse + row0 + tile.head * (varlen ? p.total_tokens : int64_t{p.seqlen});
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(softmax.sum[h]);
      inverse[h] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
      if (lane % 4 == 0 && row + 8 * h < len) {
        lse[row + 8 * h] = sum == 0.0f ? -INFINITY : softmax.offset[h] * kLn2 + logf(sum);
      }
    }
    store_rows<T, D, S::kM>(q, warp_row, out, inverse,
                            head_ptr<T>(p.o, item.batch, tile.head, item.first_row),
                            p.o.row_stride, warp_q0, len);
    fence_async();
    __syncwarp();
    release(shared.q_empty + q_ring.stage);
    release(shared.item_empty + item_stage);
    q_ring.next();
  }
}

template <class T, int D>
__global__ void __launch_bounds__(FwdSm90<D>::kThreads, 1)
    fwd_sm90_kernel(const __grid_constant__ FwdSm90Params p) {
  using S = FwdSm90<D>;
  constexpr int kStages = S::kStages;
  auto& shared = FwdShared<T, D>::get();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      init_barrier(shared.q_full + i, 1);
      init_barrier(shared.q_empty + i, 4 * S::kGroups);
    }
    for (int i = 0; i < S::kItems; ++i) {
      init_barrier(shared.item_full + i, 1);
      init_barrier(shared.item_empty + i, 4 * S::kGroups + 1);
    }
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared.k_full + i, 1);
      init_barrier(shared.v_full + i, 1);
      init_barrier(shared.k_empty + i, 4 * S::kGroups);
      init_barrier(shared.v_empty + i, 4 * S::kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    give_registers<24>();
    const int warp = __shfl_sync(~0u, warp_id(), 0);
    if (warp == S::kConsumers / 32) {
      if (lane_id() == 0) produce<T, D>(p);
    } else if (warp == S::kConsumers / 32 + 1) {
      plan<T, D>(p);
    }
  } else {
    take_registers<S::kRegisters>();
    consume<T, D>(p);
  }
}

template <class T, int D>
int fwd(const KernelParams& params, const AttnTensor& rotated_q) {
  using S = FwdSm90<D>;
  FwdSm90Params p(params, rotated_q, S::kGroups, S::kMaxShared);
  ATTN_RETURN_IF(tile_map(p, p.q, 64, p.q_map));
  ATTN_RETURN_IF(tile_map(p, p.k, S::kN, p.k_map));
  ATTN_RETURN_IF(tile_map(p, p.v, S::kN, p.v_map));
  return launch_persistent(fwd_sm90_kernel<T, D>, p.units * p.parts, S::kThreads,
                           sizeof(FwdShared<T, D>), p);
}

int fwd_sm90(const KernelParams& p, const AttnTensor& rotated_q) {
  return for_sm90(p, [&]<class T, int D>() { return fwd<T, D>(p, rotated_q); });
}

}  // namespace attn
