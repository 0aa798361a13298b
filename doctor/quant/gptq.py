"""GPTQ for one linear: codes whose rounding errors are passed on to the columns that are still to be rounded.

The layout is transposed, T[k, n], so that a column of W is one run of memory; columns go in sub-blocks, whose updates
reach the rest of a block by one product, and a block's updates reach the rest of the matrix by one product. 
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from doctor.errors import NotQuantizable
from doctor.quant import grid as grids
from doctor.quant.grid import Grid
from doctor.quant.hessian import (Attempt, dead_columns, exact_products, factorise_with_escalation, live_mean)

_BLOCK = 128
_SUB = 16


@dataclass(frozen=True)
class Solution:
    codes: torch.Tensor
    grid: Grid
    g_idx: torch.Tensor
    loss: float
    rtn_loss: float
    outcome: str
    attempts: tuple[Attempt, ...]


def solve(W, H, *, bits=4, group_size=128, sym=True, act_order=True, mse=True, damp=0.01, damp_max=0.1,
          zero_min=1, static=True, weighting="diag", refine=0, cd=0, power=1.0, desc=False, dyn_weight=None):
    n, k = W.shape
    W = W.to(torch.float32)
    H = H.to(torch.float32)
    mean = live_mean(H)
    U, attempts = factorise_with_escalation(H, damp, damp_max, mean)
    diag = H.diagonal() + damp * mean
    order = torch.arange(k)
    if act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
        U, attempts = factorise_with_escalation(H[order][:, order], damp, damp_max, mean)
    weight = None
    if weighting == "diag":
        weight = diag ** power
    elif weighting == "pivot":
        weight = torch.empty(k); weight[order] = U.diagonal() ** -2
        weight = weight ** power
    g_idx = grids.contiguous_groups(k, group_size)
    fitkw = dict(mse=mse, zero_min=zero_min)
    T = W[:, order].T.contiguous()
    if static or act_order:
        grid = grids.fit(W, bits, group_size, sym, weight=weight, **fitkw)
        rtn = grid
    else:
        grid = None
        rtn = grids.fit(W, bits, group_size, sym, weight=weight, **fitkw)
    with exact_products():
        codes, grid = _loop(T, U, order, grid, g_idx, bits, group_size, sym, weight, fitkw)
        for _ in range(refine):
            if cd:
                codes = descend(W, H + damp * mean * torch.eye(k), codes, grid, g_idx, bits, cd, order)
            grid = refit_scales(W, H + damp * mean * torch.eye(k), codes, grid, g_idx)
        if cd:
            codes = descend(W, H + damp * mean * torch.eye(k), codes, grid, g_idx, bits, cd, order)
    loss = proxy_loss(W, grids.dequantize(codes, grid, g_idx), H)
    rtn_loss = proxy_loss(W, grids.dequantize(grids.quantize(W, rtn, bits), rtn), H)
    return Solution(codes, grid, g_idx, loss, rtn_loss, "gptq", tuple(attempts))


def proxy_loss(W, Q, H):
    E = W - Q
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())


def _loop(T, U, order, grid, g_idx, bits, group_size, sym, weight, fitkw):
    k, n = T.shape
    top = 2**bits - 1
    width = grids.group_width(k, group_size)
    codes = torch.empty(k, n)
    dynamic = grid is None
    if dynamic:
        scale = torch.empty(k // width, n); zero = torch.empty(k // width, n)
    else:
        scale = grid.scale.T.contiguous(); zero = grid.zero.T.to(torch.float32).contiguous()
    gi = g_idx[order].tolist()
    block = _BLOCK
    E = torch.empty(block, n)
    for b0 in range(0, k, block):
        b1 = min(k, b0 + block)
        for s0 in range(b0, b1, _SUB):
            s1 = min(b1, s0 + _SUB)
            if dynamic and s0 % width == 0:
                g = s0 // width
                f = grids.fit(T[s0:s0 + width].T, bits, -1, sym, weight=None if weight is None else weight[order[s0:s0 + width]], **fitkw)
                scale[g] = f.scale[:, 0]; zero[g] = f.zero[:, 0]
            for j in range(s0, s1):
                s, z = scale[gi[j]], zero[gi[j]]
                c = (T[j] / s).round_().add_(z).clamp_(0, top)
                codes[order[j]] = c
                e = T[j] - (c - z) * s
                e /= U[j, j]
                E[j - b0] = e
                if j + 1 < s1:
                    T[j + 1:s1].addr_(U[j, j + 1:s1], e, alpha=-1)
            if s1 < b1:
                T[s1:b1].addmm_(U[s0:s1, s1:b1].T, E[s0 - b0:s1 - b0], alpha=-1)
        if b1 < k:
            T[b1:].addmm_(U[b0:b1, b1:].T, E[:b1 - b0], alpha=-1)
    if dynamic:
        grid = Grid(scale.T.contiguous(), zero.T.contiguous().to(torch.int32))
    return codes.T.contiguous().to(torch.uint8), grid


def refit_scales(W, H, codes, grid, g_idx, joint=True):
    """least squares of all the scales of a row at once given codes, under H."""
    n, k = W.shape
    G = grid.scale.shape[1]
    idx = g_idx.long()
    Z = codes.float() - grid.zero.float()[:, idx]
    WH = W @ H
    b = torch.zeros(n, G).index_add_(1, idx, WH * Z)
    A = torch.empty(n, G, G)
    for g in range(G):
        m = idx == g
        A[:, g] = torch.zeros(n, G).index_add_(1, idx, (Z[:, m] @ H[m]) * Z)
    dead = A.diagonal(dim1=1, dim2=2) <= 0
    A.diagonal(dim1=1, dim2=2)[dead] = 1
    s = torch.linalg.solve(A.double(), b.double()).float()
    s = torch.where(dead | ~(s > 0), grid.scale, s)
    s = grids.store_scale(s)
    new = Grid(s, grid.zero)
    # keep per row only where better
    def rowloss(gr):
        E = W - grids.dequantize(codes, gr, g_idx)
        return ((E @ H) * E).sum(1, keepdim=True)
    better = rowloss(new) < rowloss(grid)
    return Grid(torch.where(better, s, grid.scale), grid.zero)


def descend(W, H, codes, grid, g_idx, bits, passes, order):
    """Cyclic coordinate descent over columns: each code is set to its best value given all others."""
    top = 2**bits - 1
    n, k = W.shape
    idx = g_idx[order].long()
    Hp = H[order][:, order]
    T = W[:, order].T.contiguous()
    S = grid.scale.T[idx].contiguous(); Z = grid.zero.T.float()[idx].contiguous()
    C = codes.T[order].float().contiguous()
    D = T - (C - Z) * S           # error [k,n]
    d = Hp.diagonal().clone()
    for _ in range(passes):
        R = Hp @ D                # gradient
        for b0 in range(0, k, _BLOCK):
            b1 = min(k, b0 + _BLOCK)
            old = D[b0:b1].clone()
            for s0 in range(b0, b1, _SUB):
                s1 = min(b1, s0 + _SUB)
                olds = D[s0:s1].clone()
                for j in range(s0, s1):
                    # target value of the weight given others
                    t = T[j] + (R[j] - d[j] * D[j]) / d[j]
                    c = (t / S[j]).round_().add_(Z[j]).clamp_(0, top)
                    new = T[j] - (c - Z[j]) * S[j]
                    delta = new - D[j]
                    D[j] = new; C[j] = c
                    R[s0:s1].addr_(Hp[j, s0:s1], delta)
                if s1 < b1:
                    R[s1:b1].addmm_(Hp[s0:s1, s1:b1].T, D[s0:s1] - olds)
            if b1 < k:
                R[b1:].addmm_(Hp[b0:b1, b1:].T, D[b0:b1] - old)
    out = torch.empty_like(C); out[order] = C
    return out.T.contiguous().to(torch.uint8)
