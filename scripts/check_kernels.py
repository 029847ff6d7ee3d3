#!/usr/bin/env python3
"""Checks the CUDA attention kernels against PyTorch, and times them beside PyTorch's own.

    scripts/build_kernels.sh && scripts/check_kernels.py target/cuda/libattn.so
    scripts/check_kernels.py target/cuda/libattn.so --bench

Needs a GPU and PyTorch. Every case compares the output, lse and all gradients with an f64
computation. An error may be twice that of a naive computation in the same dtype plus twice the
rounding of the exact result, and what one rounding of the output makes of delta = dot(d_o, o), as
plain softmax gradients are exact where a query sees one key; in f32, where 3xTF32 products and tensor-core sums are a little
coarser than plain f32, eight times (tf32 alone would need about a thousand). Outputs and workspaces start as NaN, and so do masked keys, so
whatever is read or left out by mistake shows. Exit code 1 if any case fails.
"""
import argparse
import ctypes
import itertools
import math
import os
import statistics
import sys
import zlib

import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Tensor(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_void_p), ("batch_stride", ctypes.c_int64),
                ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64)]


TENSORS = ["q", "k", "v", "o", "d_o", "dq", "dk", "dv"]
POINTERS = ["lse", "cu_seqlens", "key_lens", "key_mask", "rope_cos", "rope_sin", "bias", "bias_buckets",
            "d_bias", "d_qkv_sums", "workspace", "rotated", "stream"]
INTS = ["batch", "seqlen", "num_heads", "head_dim", "dtype", "causal", "window_left",
        "window_right", "rope_interleaved", "num_buckets", "qk_rotated"]


class Params(ctypes.Structure):
    """AttnParams of cuda/attn_params.h."""
    _fields_ = ([(n, Tensor) for n in TENSORS] + [(n, ctypes.c_void_p) for n in POINTERS]
                + [("total_tokens", ctypes.c_int64), ("dropout_seed", ctypes.c_uint64)]
                + [(n, ctypes.c_int32) for n in INTS]
                + [("softmax_scale", ctypes.c_float), ("dropout_p", ctypes.c_float)])


assert ctypes.sizeof(Params) == 432


def load(path):
    lib = ctypes.CDLL(path)
    for name in ("attn_fwd", "attn_bwd"):
        getattr(lib, name).argtypes = [ctypes.POINTER(Params)]
        workspace = getattr(lib, name + "_workspace_bytes")
        workspace.argtypes, workspace.restype = [ctypes.POINTER(Params)], ctypes.c_size_t
    lib.attn_rotated_bytes.argtypes, lib.attn_rotated_bytes.restype = [ctypes.POINTER(Params)], ctypes.c_size_t
    lib.attn_bwd_sums_columns.argtypes = [ctypes.POINTER(Params)]
    lib.attn_bias_table.argtypes = ([ctypes.c_void_p] * 3 + [ctypes.c_int32] * 2 + [ctypes.c_void_p])
    lib.attn_error_string.restype = ctypes.c_char_p
    return lib


class Attention:
    """One call's parameters. Tensors are [batch, seqlen, heads, head_dim] or, with cu_seqlens,
    [total_tokens, heads, head_dim]."""

    def __init__(self, lib, q, k, v, *, causal=False, window=(-1, -1), cu_seqlens=None,
                 key_lens=None, key_mask=None, rope=None, interleaved=False, scale=None, bias=None,
                 dropout=(0.0, 0)):
        self.lib, self.keep = lib, [q, k, v, cu_seqlens, key_lens, key_mask, rope, bias]
        p = self.params = Params()
        p.num_heads, p.head_dim = q.shape[-2:]
        if cu_seqlens is None:
            p.batch, p.seqlen = q.shape[:2]
        else:
            p.batch = len(cu_seqlens) - 1
            p.seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        p.total_tokens = q.numel() // (p.num_heads * p.head_dim)
        p.dtype = list(DTYPES.values()).index(q.dtype)
        p.causal, (p.window_left, p.window_right) = causal, window
        p.softmax_scale = q.shape[-1] ** -0.5 if scale is None else scale
        for name, x in (("cu_seqlens", cu_seqlens), ("key_lens", key_lens), ("key_mask", key_mask)):
            setattr(p, name, None if x is None else x.data_ptr())
        if rope is not None:
            p.rope_cos, p.rope_sin = rope[0].data_ptr(), rope[1].data_ptr()
            p.rope_interleaved = interleaved
        p.bias = None if bias is None else bias.data_ptr()
        p.dropout_p, p.dropout_seed = dropout
        p.stream = torch.cuda.current_stream().cuda_stream
        self.set(q=q, k=k, v=v)

    def set(self, **tensors):
        for name, x in tensors.items():
            assert x.stride(-1) == 1
            batch_stride = x.stride(0) if x.dim() == 4 else 0
            setattr(self.params, name, Tensor(x.data_ptr(), batch_stride, x.stride(-3), x.stride(-2)))
            self.keep.append(x)

    def workspace(self, which):
        size = getattr(self.lib, which + "_workspace_bytes")(ctypes.byref(self.params))
        self.params.workspace, behind = self.reserve(size)
        return behind

    def keep_rotated(self):
        size = self.lib.attn_rotated_bytes(ctypes.byref(self.params))
        self.params.rotated, behind = self.reserve(size)
        return behind

    def reserve(self, size):
        """Where so many bytes are, and the NaN behind them, which an overrun would replace."""
        space = torch.full((size // 4 + 64,), float("nan"), device="cuda")
        self.keep.append(space)
        return space.data_ptr(), space[(size + 3) // 4:]

    def call(self, which):
        code = getattr(self.lib, which)(ctypes.byref(self.params))
        if code != 0:
            raise RuntimeError(f"{which}: {code} {self.lib.attn_error_string(code).decode()}")


def rope_tables(rows, head_dim):
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device="cuda", dtype=torch.float64) / head_dim)
    angle = torch.arange(rows, device="cuda", dtype=torch.float64)[:, None] * inv_freq
    return angle.cos().float().contiguous(), angle.sin().float().contiguous()


def rotate(x, cos, sin, interleaved):
    """x [b, s, h, d]; cos, sin [s, d/2]. In f32 or f64, rounded to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y, (c, s) = x.to(wide), (t.to(wide)[:, None, :] for t in (cos, sin))
    a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
    ra, rb = a * c - b * s, a * s + b * c
    y = torch.stack((ra, rb), -1).flatten(-2) if interleaved else torch.cat((ra, rb), -1)
    return y.to(x.dtype)


def philox(counter, key):
    """Philox4x32-10 of four int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]  # int64 wraps; its bits are right
        counter = [b >> 32 & low ^ counter[1] ^ key[0], b & low, a >> 32 & low ^ counter[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter


def dropout_keep(p, seed, sequence, heads, query, key):
    """[b, heads, s, s]: 0 where dropped, else 1 / (1 - p). Sequence numbers, queries and keys within
    their sequence are [b, s]."""
    shape = (*query.shape[:1], heads, query.shape[1], key.shape[1])
    head = torch.arange(heads, device="cuda")[None, :, None, None]
    counter = [key[:, None, None, :] // 4, query[:, None, :, None], head, sequence[:, None, :, None]]
    words = philox([x.expand(shape) for x in counter], [seed & 0xFFFFFFFF, seed >> 32])
    word = torch.stack(words, -1).gather(-1, (key % 4)[:, None, None, :, None].expand(*shape, 1))[..., 0]
    p = ctypes.c_float(p).value
    return (word >= p * 2**32).double() / (1 - p)


def t5_buckets(distance, num_buckets, max_distance=32):
    """transformers' T5Attention._relative_position_bucket, bidirectional; distance = key - query."""
    half = num_buckets // 2
    away, exact = distance.abs(), half // 2
    ratio = torch.log(away.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    large = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(away < exact, away, large)


def naive(q, k, v, grad, mask, rope, interleaved, scale, weight, buckets, keep):
    """o, lse, dq, dk, dv, d_weight in the dtype of q [b, s, h, d]. mask [b, s, s]: true = attend;
    weight [num_buckets, heads] is added at buckets [b, s, s]; keep [b, h, s, s] multiplies
    probabilities. Each of the last three may be None."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, weight) if x is not None]
    q, k, v = leaves[:3]
    rq, rk = (rotate(x, *rope, interleaved) if rope is not None else x for x in (q, k))
    s = torch.einsum("bqhd,bkhd->bhqk", rq, rk) * scale
    if weight is not None:
        s = s + leaves[3][buckets].permute(0, 3, 1, 2)
    mask = mask[:, None]
    some = mask.any(-1, keepdim=True)
    s = s.masked_fill(~mask & some, -math.inf)
    probs = s.softmax(-1) * some
    if keep is not None:
        probs = probs * keep.to(probs.dtype)
    o = torch.einsum("bhqk,bkhd->bqhd", probs, v)
    lse = s.logsumexp(-1).masked_fill(~some[..., 0], -math.inf)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, grad)]


def run_case(lib, *, dtype, d, lens, heads=2, seqs="dense", causal=False, window=(-1, -1),
             rope="none", layout="packed", scale=None, bias="none", dropout=0.0, seed=0, reference=True):
    """Worst error / bound of one case, by result; without a reference, only the other checks."""
    torch.manual_seed(seed)
    T = DTYPES[dtype]
    varlen = seqs == "cu_seqlens"
    if varlen:
        rows, batch = sum(lens), 1
    else:
        rows, batch = max(lens), len(lens)
    gap = {"packed": 0, "aligned": 8, "odd": 1}[layout]

    def buffer(parts):
        base = torch.full((batch, rows, parts, heads, d + gap), float("nan"), device="cuda", dtype=T)
        return base, base[..., :d]

    base, qkv = buffer(3)
    qkv.copy_(torch.randn(qkv.shape, device="cuda"))
    do_base, grad = buffer(1)
    grad.copy_(torch.randn(grad.shape, device="cuda"))
    position = torch.arange(rows, device="cuda")
    owner = torch.arange(batch, device="cuda")[:, None].expand(batch, rows)  # sequence of each row
    mask = torch.ones(batch, rows, rows, dtype=torch.bool, device="cuda")
    args = {}
    if varlen:
        owner = torch.cat([torch.full((n,), i) for i, n in enumerate(lens)]).cuda()[None]
        position = torch.cat([torch.arange(n) for n in lens]).cuda()
        mask &= owner[:, :, None] == owner[:, None, :]
        cu = list(itertools.accumulate(lens, initial=0))
        args["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32, device="cuda")
    keys = torch.ones(batch, rows, dtype=torch.bool, device="cuda")
    if seqs == "key_lens":
        args["key_lens"] = torch.tensor(lens, dtype=torch.int32, device="cuda")
        keys = position[None] < args["key_lens"][:, None]
    if seqs == "key_mask":
        keys = torch.rand(batch, rows, device="cuda") < 0.7
        keys[-1] = False
        args["key_mask"] = keys.to(torch.uint8)
    mask &= keys[:, None, :]
    distance = position[None, :] - position[:, None]  # key - query
    if causal:
        mask &= distance <= 0
    if window[0] >= 0:
        mask &= distance >= -window[0]
    if window[1] >= 0:
        mask &= distance <= window[1]
    q, k, v = (x.clone() for x in qkv.unbind(2))
    k[~keys] = 0
    v[~keys] = 0
    interleaved = rope == "interleaved"
    tables = rope_tables(rows, d) if rope != "none" else None
    scale = d ** -0.5 if scale is None else scale
    at = None if tables is None else [t[position] for t in tables]
    g = grad[:, :, 0]
    longest, num_buckets = max(lens), 12
    all_distances = torch.arange(1 - longest, longest, device="cuda")
    weight = table = table_buckets = buckets = keep = None
    if bias == "alibi":  # the weight of a distance is that of its own bucket
        num_buckets = longest
        table_buckets, buckets = all_distances.abs(), distance.abs()
        slopes = torch.tensor([2.0 ** -(h + 1) for h in range(heads)], device="cuda")
        weight = -slopes * torch.arange(longest, device="cuda")[:, None]
    if bias == "t5":
        table_buckets, buckets = (t5_buckets(x, num_buckets) for x in (all_distances, distance))
        weight = torch.randn(num_buckets, heads, device="cuda")
    if bias != "none":
        buckets = buckets.clamp(max=num_buckets - 1).expand(batch, rows, rows)  # far: other sequences
        table_buckets = table_buckets.int()
        table = torch.full((heads, 2 * longest - 1), float("nan"), device="cuda")
        code = lib.attn_bias_table(weight.data_ptr(), table_buckets.data_ptr(), table.data_ptr(), heads, longest,
                                   torch.cuda.current_stream().cuda_stream)
        assert code == 0, code
    seed64 = 0x123456789ABCDEF0 + seed
    if dropout > 0 and reference:
        at_rows = position.expand(batch, rows)
        keep = dropout_keep(dropout, seed64, owner, heads, at_rows, at_rows)
    if reference:
        double = None if weight is None else weight.double()
        exact = naive(q.double(), k.double(), v.double(), g.double(), mask, at, interleaved, scale, double, buckets, keep)
        rounded = None if weight is None else weight.to(T)
        same = naive(q, k, v, g, mask, at, interleaved, scale, rounded, buckets, keep)

    qkv[:, :, 1:][~keys[:, :, None].expand(-1, -1, 2)] = float("nan")
    out_base, out = buffer(4)
    lse = torch.full((batch, heads, rows), float("nan"), device="cuda")
    one = (lambda x: x[0]) if varlen else (lambda x: x)
    a = Attention(lib, *(one(x) for x in qkv.unbind(2)), causal=causal, window=window, rope=tables,
                  interleaved=interleaved, scale=scale, bias=table, dropout=(dropout, seed64), **args)
    o, dq, dk, dv = out.unbind(2)
    d_weight = torch.full((num_buckets, heads), float("nan"), device="cuda")
    if bias == "t5" or num_buckets <= 1024 and bias == "alibi":
        a.params.bias_buckets, a.params.d_bias = table_buckets.data_ptr(), d_weight.data_ptr()
        a.params.num_buckets = num_buckets
    a.params.lse = lse.data_ptr()
    a.set(o=one(o), d_o=one(g), dq=one(dq), dk=one(dk), dv=one(dv))
    sums = torch.full((3, heads, d), float("nan"), device="cuda")
    can_sum = lib.attn_bwd_sums_columns(ctypes.byref(a.params)) == 1
    hopper = torch.cuda.get_device_capability() == (9, 0) and "ATTN_PORTABLE" not in os.environ
    expected = (hopper and dtype != "f32" and d in (64, 128) and layout != "odd" and scale > 0 and bias == "none"
                and dropout == 0)
    with_sums = can_sum and sum(lens) % 4 != 3
    if with_sums:
        a.params.d_qkv_sums = sums.data_ptr()
    # By the call itself, kept for the backward, or done before. A hash mixes that with all that a case has.
    case = repr((dtype, d, lens, heads, seqs, causal, window, rope, layout))
    rotation = zlib.crc32(case.encode()) % 3 if rope != "none" else 0
    guards = {"rotated": a.keep_rotated()} if rotation == 1 else {}
    if rotation == 2:
        a.params.qk_rotated = 1
        for x in qkv.unbind(2)[:2]:
            x.copy_(rotate(x, *at, interleaved))
    problems = [] if can_sum == expected else [f"attn_bwd_sums_columns says {can_sum}"]
    written = (out, lse, d_weight, sums)
    for _ in range(2):
        first = [x.clone() for x in written]
        for x in written:
            x.fill_(float("nan"))
        for which in ("attn_fwd", "attn_bwd"):
            guards["workspace"] = a.workspace(which)
            a.call(which)
            torch.cuda.synchronize()
            problems.extend(f"{name} overrun" for name, behind in guards.items() if not behind.isnan().all())
    if not all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(written, first)):
        problems.append("not deterministic")
    if gap and not (out_base[..., d:].isnan().all() and base[..., d:].isnan().all()):
        problems.append("wrote between rows")
    ratios = {}
    if not reference:
        if out.isnan().any() or lse.isnan().any() or with_sums and sums.isnan().any() or bias != "none" and d_weight.isnan().any():
            problems.append("NaN")
        return ratios, problems
    eps = torch.finfo(T).eps
    # Score gradients are p * (dp - delta).
    delta_error = eps / 2 * (exact[0] * g).abs().sum(-1).max()
    row_error = delta_error * abs(scale)
    floors = {"dq": row_error * k.abs().max(), "dk": row_error * q.abs().max(),
              "d_bias": delta_error * math.sqrt(batch * rows)}
    results = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "d_bias": d_weight}
    if with_sums:
        wanted = torch.stack([x.sum((0, 1)) for x in exact[2:5]])
        # Each number to be added has its error, and errors add up like the steps of a random walk.
        error = torch.stack([(x.double() - y).square().sum((0, 1)).sqrt() for x, y in zip(same[2:5], exact[2:5])])
        rounding = eps * torch.stack([x.square().sum((0, 1)).sqrt() for x in exact[2:5]])
        floor = torch.tensor([floors["dq"], floors["dk"], 0.0], device="cuda")[:, None, None] * math.sqrt(batch * rows)
        ratio = ((sums.double() - wanted).abs() / (8 * (error + rounding + floor) + 1e-4)).max().item()
        ratios["sums"] = math.inf if math.isnan(ratio) else ratio
    for (name, got), want, other in zip(results.items(), exact, same):
        got = got.double()
        if name == "lse":
            if not torch.equal(got.isinf(), want.isinf()):
                problems.append("lse of masked rows")
            got, want, other = (x.masked_fill(x.isinf(), 0.0) for x in (got, want, other.double()))
        bound = (8 if dtype == "f32" else 2) * ((other.double() - want).abs().max() + floors.get(name, 0.0))
        bound += 2 * (want.to(T).double() - want).abs().max()
        bound += (256 if dtype == "f32" else 1 / 16) * eps * max(1.0, want.abs().max())
        ratio = ((got - want).abs().max() / bound).item()
        ratios[name] = math.inf if math.isnan(ratio) else ratio
    return ratios, problems


def cases(sanitize):
    """Every feature at every dtype and head_dim, at lengths around the tile sizes; or a short table."""
    table = []

    def add(**case):
        table.append(case)

    if sanitize:
        for dtype in DTYPES:
            for d in (64, 128):
                add(dtype=dtype, d=d, lens=[65, 130], seqs="key_mask", rope="half")
                add(dtype=dtype, d=d, lens=[1, 70, 129], seqs="cu_seqlens", causal=True, rope="interleaved")
                add(dtype=dtype, d=d, lens=[1, 70, 129], seqs="cu_seqlens", bias="t5", dropout=0.2)
        add(dtype="bf16", d=64, lens=[129, 0], seqs="key_lens", causal=True, bias="alibi")
        add(dtype="bf16", d=32, lens=[129, 0], seqs="key_lens", causal=True)
        add(dtype="bf16", d=256, lens=[67], bias="t5", dropout=0.2)
        add(dtype="bf16", d=96, lens=[129], window=(20, 5), rope="half")
        add(dtype="bf16", d=40, lens=[67], layout="odd", rope="half")
        add(dtype="bf16", d=256, lens=[67], layout="aligned", rope="half")
        add(dtype="f32", d=256, lens=[67], layout="aligned", rope="half")
        add(dtype="f16", d=33, lens=[67], layout="odd")
        return table
    for dtype, d in itertools.product(DTYPES, (32, 64, 96, 128, 256)):
        for n in (1, 2, 17, 63, 64, 65, 127, 128, 129, 200, 257):
            add(dtype=dtype, d=d, lens=[n, n], causal=n % 2 == 0, rope="half" if n % 3 == 0 else "none")
        for rope, causal in itertools.product(("none", "half", "interleaved"), (False, True)):
            add(dtype=dtype, d=d, lens=[300, 300], rope=rope, causal=causal)
            add(dtype=dtype, d=d, lens=[190, 77, 0, 129], seqs="key_lens", rope=rope, causal=causal)
            add(dtype=dtype, d=d, lens=[131, 131, 131], seqs="key_mask", rope=rope, causal=causal)
            add(dtype=dtype, d=d, lens=[1, 64, 0, 65, 200, 127], seqs="cu_seqlens", rope=rope, causal=causal)
        for window in ((0, 0), (10, 10), (64, 0), (-1, 3), (100, -1)):
            add(dtype=dtype, d=d, lens=[270], window=window, rope="half")
        add(dtype=dtype, d=d, lens=[190, 77, 5], seqs="key_lens", window=(20, 20))
        for layout in ("aligned", "odd"):
            add(dtype=dtype, d=d, lens=[150, 150], layout=layout, rope="interleaved")
            add(dtype=dtype, d=d, lens=[33, 90], seqs="cu_seqlens", layout=layout, rope="half")
        add(dtype=dtype, d=d, lens=[1000], causal=True, heads=3)
        if d in (64, 128) and dtype != "f32":
            # More blocks of work than a persistent kernel has thread blocks.
            for causal in (False, True):
                add(dtype=dtype, d=d, lens=[385] * 8, heads=40, causal=causal, rope="half")
                add(dtype=dtype, d=d, lens=[1, 500, 0, 65, 200, 127, 300, 64, 129], heads=40,
                    seqs="cu_seqlens", causal=causal)
            # Blocks whose query tiles belong to several heads: numbers of tiles and heads that blocks
            # divide or not, and sequences with fewer tiles than the longest.
            for n, heads, causal in itertools.product((64, 100, 192, 256, 290, 384, 512), (1, 5), (False, True)):
                add(dtype=dtype, d=d, lens=[n, n], heads=heads, causal=causal)
            for causal, rope in itertools.product((False, True), ("none", "half")):
                add(dtype=dtype, d=d, lens=[500, 64, 0, 129, 200], heads=7, seqs="key_lens", causal=causal, rope=rope)
                add(dtype=dtype, d=d, lens=[330, 330], heads=5, seqs="key_mask", causal=causal, rope=rope)
                add(dtype=dtype, d=d, lens=[64, 0, 500, 130, 320, 1], heads=7, seqs="cu_seqlens", causal=causal,
                    rope=rope)
            for window in ((0, 0), (30, 5), (64, -1), (200, 100), (-1, 0)):
                add(dtype=dtype, d=d, lens=[470, 470], heads=4, window=window)
                add(dtype=dtype, d=d, lens=[470, 20, 320], heads=4, seqs="cu_seqlens", window=window)
            add(dtype=dtype, d=d, lens=[321, 64, 200] * 10, heads=17, seqs="cu_seqlens", rope="interleaved")
        add(dtype=dtype, d=d, lens=[1024], rope="half")
        for scale in (-0.3, 0.0, 1.5):
            add(dtype=dtype, d=d, lens=[100], scale=scale)
            add(dtype=dtype, d=d, lens=[100], scale=scale, bias="t5")
        for bias, p in (("alibi", 0.0), ("t5", 0.0), ("none", 0.3), ("alibi", 0.1), ("t5", 0.1)):
            for n in (1, 7, 64, 127, 130, 300):
                add(dtype=dtype, d=d, lens=[n, n], causal=n == 130, bias=bias, dropout=p)
            add(dtype=dtype, d=d, lens=[190, 77, 0, 129], seqs="key_lens", bias=bias, dropout=p)
            add(dtype=dtype, d=d, lens=[131, 131, 131], seqs="key_mask", bias=bias, dropout=p, causal=True)
            add(dtype=dtype, d=d, lens=[1, 64, 0, 65, 200, 127], seqs="cu_seqlens", bias=bias, dropout=p)
            add(dtype=dtype, d=d, lens=[270], window=(40, 25), bias=bias, dropout=p)
        add(dtype=dtype, d=d, lens=[150, 150], rope="half", dropout=0.5, heads=3)
        add(dtype=dtype, d=d, lens=[150, 150], layout="odd", bias="t5", dropout=0.99)
    for dtype, d in itertools.product(DTYPES, (1, 2, 8, 16, 24, 33, 40, 48, 50, 80, 112, 160, 192, 250)):
        add(dtype=dtype, d=d, lens=[130, 130], rope="half" if d % 2 == 0 else "none")
        add(dtype=dtype, d=d, lens=[70, 5], seqs="cu_seqlens", causal=True,
            rope="interleaved" if d % 2 == 0 else "none")
        add(dtype=dtype, d=d, lens=[70, 99], seqs="key_mask", layout="odd")
    return table


def check_errors(lib):
    """Bad parameters must give their own code and leave the device alone."""
    x = torch.zeros(1, 4, 1, 6, device="cuda", dtype=torch.bfloat16)
    ints = torch.zeros(4, device="cuda", dtype=torch.int32)

    def code(**fields):
        a = Attention(lib, x, x, x)
        a.params.lse = ints.data_ptr()
        a.set(o=x, d_o=x, dq=x, dk=x, dv=x)
        a.workspace("attn_bwd")
        for name, value in fields.items():
            setattr(a.params, name, value)
        return [getattr(lib, which)(ctypes.byref(a.params)) for which in ("attn_fwd", "attn_bwd")]

    p = ints.data_ptr()
    wrong = []
    for want, fields in ((-1, {"lse": None}), (-1, {"q": Tensor()}), (-2, {"head_dim": 257}),
                         (-2, {"head_dim": 0}), (-3, {"dtype": 3}), (-4, {"rope_cos": p}),
                         (-4, {"rope_cos": p, "rope_sin": p, "head_dim": 5}),
                         (-5, {"cu_seqlens": p, "key_lens": p}), (-6, {"seqlen": -1}),
                         ((0, -10), {"d_qkv_sums": p}), (0, {"batch": 0}), (0, {"seqlen": 0})):
        want = list(want) if isinstance(want, tuple) else [want, want]
        if code(**fields) != want:
            wrong.append((fields, code(**fields)))
    sums = torch.full((3, 1, 6), float("nan"), device="cuda")
    if code(batch=0, d_qkv_sums=sums.data_ptr()) != [0, 0] or sums.any():
        wrong.append("sums of no tokens")
    if wrong:
        print("FAILED error codes:", wrong)
    return len(wrong)


def check_far(lib):
    """Offsets beyond 2^31 elements give what the same numbers close together give."""
    shape, strides = (2, 70, 2, 64), (2**31 + 8, 128, 64, 1)
    n = 70 * 128
    if torch.cuda.mem_get_info()[0] < 6e9:
        print("skipped: offsets beyond 2^31 need 5 GB of free GPU memory")
        return 0
    far = torch.empty(2**31 + 8 + 8 * n, device="cuda", dtype=torch.bfloat16)
    results = []
    for tensors in ([far[i * n:].as_strided(shape, strides) for i in range(8)],
                    [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(8)]):
        torch.manual_seed(0)
        q, k, v, o, g, dq, dk, dv = tensors
        for x in (q, k, v, g):
            x.copy_(torch.randn(shape, device="cuda"))
        a = Attention(lib, q, k, v, rope=rope_tables(70, 64))
        lse = torch.empty(2, 2, 70, device="cuda")
        a.params.lse = lse.data_ptr()
        a.set(o=o, d_o=g, dq=dq, dk=dk, dv=dv)
        a.workspace("attn_bwd")
        a.call("attn_fwd")
        a.call("attn_bwd")
        results.append([x.clone() for x in (o, dq, dk, dv, lse)])
    same = all(torch.equal(x, y) for x, y in zip(*results))
    if not same:
        print("FAILED: offsets beyond 2^31 elements")
    return int(not same)


def check(lib, sanitize):
    failed, worst, count = 0, {}, {}
    for case in cases(sanitize):
        ratios, problems = run_case(lib, **case, reference=not sanitize)
        dtype = case["dtype"]
        count[dtype] = count.get(dtype, 0) + 1
        for name, ratio in ratios.items():
            worst[dtype, name] = max(worst.get((dtype, name), 0.0), ratio)
        if problems or max(ratios.values(), default=0.0) > 1:
            failed += 1
            if failed <= 25:
                shown = {n: round(r, 2) for n, r in ratios.items()}
                print("FAILED", case, shown, *problems, flush=True)
    if not sanitize:
        failed += check_errors(lib) + check_far(lib)
    print("worst error / allowed error, by dtype (1 = limit)")
    for dtype, n in count.items():
        row = " ".join(f"{name} {ratio:.2f}" for (t, name), ratio in worst.items() if t == dtype)
        print(f"  {dtype:5} {n:4} cases: {row}")
    print(f"{sum(count.values())} cases, error codes and far offsets: {failed} failed", flush=True)
    return failed


def median_ms(fns, repeats=7):
    """Median time of one call of each function, of calls enqueued back to back. The functions take
    turns, so that a clock that slows down as the device heats up slows all of them alike."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(fn, calls):
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls

    for fn in fns:
        time(fn, 1)
    calls = [max(2, min(20, int(4 / max(time(fn, 1), 0.02)))) for fn in fns]
    times = [[time(*pair) for pair in zip(fns, calls)] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


def bench(lib, head_dims, lengths, causals, with_rope, peers=True, features=False):
    """TFLOP/s, forward / backward; causal counts half the work. 16,384 tokens of width 2048, bf16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    import torch.nn.functional as F
    compiled = torch.compile(rotate, dynamic=False) if with_rope else None
    print("bf16, 16384 tokens, width 2048; TFLOP/s fwd / bwd; x = ours / a peer")
    for d, causal, n in itertools.product(head_dims, map(bool, causals), lengths):
        torch._dynamo.reset()  # else the number of shapes exceeds its limit
        heads, batch = 2048 // d, 16384 // n
        flop = 4 * batch * heads * n * n * d * (0.5 if causal else 1)
        shape = (batch, n, heads, d)
        q, k, v, g = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        dq, dk, dv = (torch.empty_like(q) for _ in range(3))
        rope = rope_tables(n, d)
        fns = {}
        num_buckets = 32
        buckets = t5_buckets(torch.arange(1 - n, n, device="cuda"), num_buckets, 128).int()
        bias = torch.randn(num_buckets, heads, device="cuda")[buckets].t().contiguous()
        d_bias = torch.empty(num_buckets, heads, device="cuda")
        for name in ("ours", "ours+rope", *(("ours+bias", "ours+bias, d_bias", "ours+dropout") if features else ())):
            a = Attention(lib, q, k, v, causal=causal, rope=rope if "rope" in name else None,
                          bias=bias if "bias" in name else None, dropout=(0.1 if "dropout" in name else 0.0, 1))
            if "d_bias" in name:
                a.params.bias_buckets, a.params.d_bias = buckets.data_ptr(), d_bias.data_ptr()
                a.params.num_buckets = num_buckets
            o, lse = torch.empty_like(q), torch.empty(batch, heads, n, device="cuda")
            a.params.lse = lse.data_ptr()
            a.set(o=o, d_o=g, dq=dq, dk=dk, dv=dv)
            a.keep.append(lse)
            a.workspace("attn_bwd")  # at least as large as the forward's
            fns[name] = [lambda a=a, which=which: a.call(which) for which in ("attn_fwd", "attn_bwd")]
        backends = {"FA2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        for name, backend in backends.items() if peers else ():
            for roped in ((False, True) if with_rope else (False,)):
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]

                def attention(leaves=leaves, backend=backend, roped=roped):
                    x = [compiled(t, *rope, False) for t in leaves[:2]] if roped else leaves[:2]
                    x = [t.transpose(1, 2) for t in (*x, leaves[2])]
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(*x, is_causal=causal)

                def forward(attention=attention):
                    with torch.no_grad():
                        attention()

                out, gt = attention(), g.transpose(1, 2)
                fns[name + "+rope" * roped] = [
                    forward, lambda out=out, leaves=leaves:
                    torch.autograd.grad(out, leaves, gt, retain_graph=True)]
        # Forward first: it makes what our backward reads.
        row = dict(zip(fns, zip(*(median_ms([pair[i] for pair in fns.values()]) for i in (0, 1)))))
        text = f"d{d:<4}{'causal' if causal else 'full':7}{n:6}"
        for name, (fwd, bwd) in row.items():
            text += f" | {name} {flop / fwd / 1e9:4.0f} / {2.5 * flop / bwd / 1e9:4.0f}"
        for peer, (fwd, bwd) in row.items():
            if not peer.startswith("ours"):
                ours = row["ours" + "+rope" * peer.endswith("+rope")]
                text += f" | x {peer} {fwd / ours[0]:.2f} / {bwd / ours[1]:.2f}"
        print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="the shared library that build_kernels.sh made")
    parser.add_argument("--sanitize", action="store_true",
                        help="a short case table without references, for compute-sanitizer")
    parser.add_argument("--bench", action="store_true", help="time instead of check")
    parser.add_argument("--no-peers", action="store_true", help="with --bench: only our kernels")
    parser.add_argument("--features", action="store_true",
                        help="with --bench: also our kernels with a bias, its gradient, and dropout")
    parser.add_argument("--rope-peers", action="store_true",
                        help="with --bench: also the peers behind a compiled RoPE")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--causal", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("check_kernels.py: PyTorch sees no GPU; run it on a machine with one")
    lib = load(args.library)
    if args.bench:
        bench(lib, args.head_dims, args.lengths, args.causal, args.rope_peers, not args.no_peers, args.features)
    else:
        sys.exit(1 if check(lib, args.sanitize) else 0)


if __name__ == "__main__":
    main()
