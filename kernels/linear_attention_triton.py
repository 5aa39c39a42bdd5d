"""The Triton kernels of linear attention and their autograd functions; the maths is in linear_attention.py.

_outer_sums: over a chunk of tokens, sum_i a_i (w_i b_i)^T and sum_i w_i c_i a_i. Chunks are summed in a fixed order
             afterwards, so results are deterministic (no atomics) and one long sequence still fills the GPU.
_rows_times: y_i = w_i (x_i M + c_i m), and in the forward pass the normaliser w_i = 1 / (x_i . s + eps) itself.
_row_corrections: c_i = -g_i . o_i of the backward pass, in float32 and without keeping the output.

Widths above 64 are cut into tiles of 64 (SD-1.5 has heads of 40, 80 and 160), so registers never depend on D.
Half precision goes to the tensor cores as TF32: a bf16 or fp16 number is exact in TF32 and sums are float32.
float32 input is multiplied in full float32 ("ieee").
"""

import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _outer_sums(
    a_ptr, b_ptr, w_ptr, c_ptr, M_ptr, m_ptr, N, parts, chunk, H, Da, Db,
    a_b, a_h, a_n, a_d, b_b, b_h, b_n, b_d,
    WEIGHTED: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # tokens and heads share axis 0, the only one without a limit of 65535 programs
    part, bh, tile = tl.program_id(0) % parts, tl.program_id(0) // parts, tl.program_id(1)
    tiles_b = tl.cdiv(Db, BB)
    # 64-bit: at 256k tokens x 8 heads x 160 x a batch, an element's number passes 2^31
    batch, head, bh64 = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64)
    da = (tile // tiles_b) * BA + tl.arange(0, BA)
    db = (tile % tiles_b) * BB + tl.arange(0, BB)
    a_ptr += batch * a_b + head * a_h
    b_ptr += batch * b_b + head * b_h
    M = tl.zeros((BA, BB), dtype=tl.float32)
    m = tl.zeros((BA,), dtype=tl.float32)
    begin = part * chunk
    for start in range(begin, min(begin + chunk, N), BN):
        n = start + tl.arange(0, BN)
        inside, n64 = n < N, n.to(tl.int64)
        a = tl.load(a_ptr + n64[:, None] * a_n + da[None, :] * a_d, inside[:, None] & (da < Da)[None, :], other=0.0)
        b = tl.load(b_ptr + n64[:, None] * b_n + db[None, :] * b_d, inside[:, None] & (db < Db)[None, :], other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        if WEIGHTED:
            w = tl.load(w_ptr + bh64 * N + n64, inside, other=0.0)
            c = tl.load(c_ptr + bh64 * N + n64, inside, other=0.0)
            b = b * w[:, None]
            m += tl.sum(a * (c * w)[:, None], axis=0)
        else:
            m += tl.sum(a, axis=0)
        M += tl.dot(tl.trans(a), b, input_precision=PRECISION)
    row = (bh64 * parts + part) * Da + da
    tl.store(M_ptr + row[:, None] * Db + db[None, :], M, (da < Da)[:, None] & (db < Db)[None, :])
    # every tile of columns has the same m: one of them writes it
    tl.store(m_ptr + row, m, (da < Da) & (tile % tiles_b == 0))


@triton.jit
def _rows_times(
    x_ptr, M_ptr, m_ptr, w_ptr, c_ptr, y_ptr, N, blocks, H, Dx, Dy, eps, scale,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, M_x, M_y,
    MODE: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # MODE 0: y = scale * x M   1: y = x M / (x . m + eps), storing w   2: y = w (x M + c m)   3: y = scale (x M + m)
    block, bh, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1)
    batch, head, bh64 = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64)
    n = block * BN + tl.arange(0, BN)
    inside, n64 = n < N, n.to(tl.int64)
    dy = tile * BY + tl.arange(0, BY)
    x_ptr += batch * x_b + head * x_h
    y_ptr += batch * y_b + head * y_h
    M_ptr += bh64 * Dx * Dy
    y = tl.zeros((BN, BY), dtype=tl.float32)
    z = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, Dx, BX):
        dx = start + tl.arange(0, BX)
        x = tl.load(x_ptr + n64[:, None] * x_n + dx[None, :] * x_d, inside[:, None] & (dx < Dx)[None, :], other=0.0)
        x = x.to(tl.float32)
        M = tl.load(M_ptr + dx[:, None] * M_x + dy[None, :] * M_y, (dx < Dx)[:, None] & (dy < Dy)[None, :], other=0.0)
        y += tl.dot(x, M, input_precision=PRECISION)
        if MODE == 1:
            z += tl.sum(x * tl.load(m_ptr + bh64 * Dx + dx, dx < Dx, other=0.0)[None, :], axis=1)
    if MODE == 1:
        w = 1.0 / (z + eps)
        y = y * w[:, None]
        tl.store(w_ptr + bh64 * N + n64, w, inside & (tile == 0))
    elif MODE == 0:
        y = y * scale
    else:
        m = tl.load(m_ptr + bh64 * Dy + dy, dy < Dy, other=0.0)
        if MODE == 2:
            w = tl.load(w_ptr + bh64 * N + n64, inside, other=0.0)
            c = tl.load(c_ptr + bh64 * N + n64, inside, other=0.0)
            y = (y + c[:, None] * m[None, :]) * w[:, None]
        else:
            y = (y + m[None, :]) * scale
    out = y_ptr + n64[:, None] * y_n + dy[None, :] * y_d
    tl.store(out, y.to(y_ptr.dtype.element_ty), inside[:, None] & (dy < Dy)[None, :])


@triton.jit
def _row_corrections(
    q_ptr, g_ptr, S_ptr, w_ptr, c_ptr, N, blocks, H, D, Dv, q_b, q_h, q_n, q_d, g_b, g_h, g_n, g_d,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # c_i = -g_i . o_i, as -w_i q_i . (S g_i) in float32: the output's rounding to half precision would be as large as
    # dq itself where attention is nearly uniform (as it is before training), because dq is then a small difference
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, head, bh64 = (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64)
    n = block * BN + tl.arange(0, BN)
    inside, n64 = n < N, n.to(tl.int64)
    q_ptr += batch * q_b + head * q_h
    g_ptr += batch * g_b + head * g_h
    S_ptr += bh64 * D * Dv
    c = tl.zeros((BN,), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        y = tl.zeros((BN, BD), dtype=tl.float32)
        for v0 in range(0, Dv, BV):
            dv = v0 + tl.arange(0, BV)
            g = tl.load(g_ptr + n64[:, None] * g_n + dv[None, :] * g_d, inside[:, None] & (dv < Dv)[None, :], other=0.0)
            S = tl.load(S_ptr + d[None, :] * Dv + dv[:, None], (d < D)[None, :] & (dv < Dv)[:, None], other=0.0)
            y += tl.dot(g.to(tl.float32), S, input_precision=PRECISION)
        q = tl.load(q_ptr + n64[:, None] * q_n + d[None, :] * q_d, inside[:, None] & (d < D)[None, :], other=0.0)
        c -= tl.sum(q.to(tl.float32) * y, axis=1)
    w = tl.load(w_ptr + bh64 * N + n64, inside, other=0.0)
    tl.store(c_ptr + bh64 * N + n64, c * w, inside)


def _tile(width: int) -> int:
    return min(64, max(16, triton.next_power_of_2(width)))  # tl.dot wants 16 at least


def _tokens(N: int) -> int:
    return min(64, max(16, triton.next_power_of_2(N)))


def _precision(*tensors: Tensor) -> str:
    half = all(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
    return "tf32" if half and not INTERPRETED and torch.version.hip is None else "ieee"


def _chunks(N: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many parts to cut N tokens into, and their length, so that about four programs wait on each processor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    blocks = triton.cdiv(N, _tokens(N))
    parts = min(blocks, max(1, triton.cdiv(4 * processors, programs)), 1024)
    length = triton.cdiv(blocks, parts) * _tokens(N)
    return triton.cdiv(N, length), length


def _on(x: Tensor) -> Any:
    # Triton launches on the current device, which need not be the tensor's
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def outer_sums(a: Tensor, b: Tensor, w: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sum_i a_i (w_i b_i)^T (B, H, Da, Db) and sum_i w_i c_i a_i (B, H, Da), float32; w, c (B, H, N) default to 1."""
    B, H, N, Da = a.shape
    Db = b.shape[3]
    ba, bb = _tile(Da), _tile(Db)
    tiles = triton.cdiv(Da, ba) * triton.cdiv(Db, bb)
    parts, length = _chunks(N, B * H * tiles, a.device)
    M = torch.empty(B, H, parts, Da, Db, dtype=torch.float32, device=a.device)
    m = torch.empty(B, H, parts, Da, dtype=torch.float32, device=a.device)
    with _on(a):
        _outer_sums[(parts * B * H, tiles)](
            a, b, a if w is None else w, a if c is None else c, M, m, N, parts, length, H, Da, Db,
            *a.stride(), *b.stride(),
            WEIGHTED=w is not None, BN=_tokens(N), BA=ba, BB=bb, PRECISION=_precision(a, b), num_warps=4, num_stages=2,
        )  # fmt: skip
    return M.sum(2), m.sum(2)


def rows_times(
    x: Tensor, M: Tensor, m: Tensor | None, y: Tensor, mode: int, *, w: Tensor | None = None, c: Tensor | None = None,
    eps: float = 0.0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Fill y (B, H, N, Dy) from x (B, H, N, Dx) and M (B, H, Dx, Dy), which may be a transposed view; modes above."""
    B, H, N, Dx = x.shape
    Dy = y.shape[3]
    bx, by, bn = _tile(Dx), _tile(Dy), _tokens(N)
    blocks = triton.cdiv(N, bn)
    with _on(x):
        _rows_times[(blocks * B * H, triton.cdiv(Dy, by))](
            x, M, M if m is None else m, M if w is None else w, M if c is None else c, y,
            N, blocks, H, Dx, Dy, eps, scale, *x.stride(), *y.stride(), M.stride(2), M.stride(3),
            MODE=mode, BN=bn, BX=bx, BY=by, PRECISION=_precision(x, y), num_warps=4, num_stages=2,
        )  # fmt: skip
    return y


def row_corrections(q: Tensor, g: Tensor, S: Tensor, w: Tensor) -> Tensor:
    """-g_i . o_i with o_i = w_i S^T q_i: (B, H, N) float32 from q (B, H, N, D), g (B, H, N, Dv), contiguous S, w."""
    B, H, N, D = q.shape
    c, blocks = torch.empty_like(w), triton.cdiv(N, _tokens(N))
    with _on(q):
        _row_corrections[(blocks * B * H,)](
            q, g, S, w, c, N, blocks, H, D, g.shape[3], *q.stride(), *g.stride(),
            BN=_tokens(N), BD=_tile(D), BV=_tile(g.shape[3]), PRECISION=_precision(q, g), num_warps=4, num_stages=2,
        )  # fmt: skip
    return c


class Statistics(torch.autograd.Function):
    """(k, v) -> S = mean_j k_j v_j^T, s = mean_j k_j, in float32."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, v)
        S, s = outer_sums(k, v)
        return S / k.shape[2], s / k.shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dS: Tensor, ds: Tensor) -> tuple[Tensor | None, Tensor | None]:
        k, v = ctx.saved_tensors
        dS, ds = dS.contiguous().float(), ds.contiguous().float()
        dk = dv = None
        if ctx.needs_input_grad[0]:
            dk = rows_times(v, dS.mT, ds, torch.empty_like(k), 3, scale=1 / k.shape[2])
        if ctx.needs_input_grad[1]:
            dv = rows_times(k, dS, None, torch.empty_like(v), 0, scale=1 / k.shape[2])
        return dk, dv


class Apply(torch.autograd.Function):
    """(q, S, s) -> q^T S / (q^T s + eps), or q^T S * scale."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, S: Tensor, s: Tensor, eps: float, normalise: bool, scale: float, dtype: torch.dtype
    ) -> Tensor:
        B, H, N, _ = q.shape
        # like q, heads side by side within a token: the reshape that joins the heads then copies nothing
        out = torch.empty(B, N, H, S.shape[3], dtype=dtype, device=q.device).transpose(1, 2)
        wide_S, wide_s = S.contiguous().float(), s.contiguous().float()
        w = torch.empty(B, H, N, dtype=torch.float32, device=q.device) if normalise else None
        if N:
            rows_times(q, wide_S, wide_s, out, 1 if normalise else 0, w=w, eps=eps, scale=scale)
        ctx.save_for_backward(q, S, s, w)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, S, s, w = ctx.saved_tensors
        wide_S, wide_s = S.contiguous().float(), s.contiguous().float()
        dq = dS = ds = None
        if w is not None:
            c = row_corrections(q, g, wide_S, w)
            if ctx.needs_input_grad[0]:
                dq = rows_times(g, wide_S.mT, wide_s, torch.empty_like(q), 2, w=w, c=c)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dS, ds = outer_sums(q, g, w, c)
        else:
            if ctx.needs_input_grad[0]:
                dq = rows_times(g, wide_S.mT, None, torch.empty_like(q), 0, scale=ctx.scale)
            if ctx.needs_input_grad[1]:
                dS = outer_sums(q, g)[0] * ctx.scale
        return (
            dq, None if dS is None else dS.to(S.dtype), None if ds is None else ds.to(s.dtype), None, None, None, None
        )  # fmt: skip
