"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), the model of Pythia (Biderman et al. 2023, 2304.01373).

Read top to bottom: configuration, operations, modules, sampling, optimizer, Hugging Face files. Three operations
come twice: in PyTorch and, below it, as Triton kernels, which a GPU runs. A first reading may skip the kernels.

Shapes:  B batch   T tokens of a sequence   C hidden_size   H heads   D = C / H head size   R rotary dims
         F intermediate_size (4 C)   V vocab_size   N = B T tokens of a batch
"""
import functools
import json
import math
import os
import pickle
import shutil
import tempfile
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:                     # pick_kernels then picks none; their definitions still have to be valid
    triton, jit, constexpr = None, lambda kernel: kernel, None


class ModelError(ValueError):
    """A configuration, input or weight file that this model cannot take."""


# -----------------------------------------------------------------------------
# Configuration. Field names are those of Hugging Face's config.json.

# 'gelu' is the exact erf form, which the released Pythia configs name; the other names are one and the same
# tanh approximation, with which gpt-neox trained Pythia (its bias_gelu_fusion).
GELU_KINDS = {'gelu': 'none', 'gelu_fast': 'tanh', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}


@dataclass
class GPTNeoXConfig:
    vocab_size: int = 50304             # V, rows of both embedding matrices, padding rows included
    hidden_size: int = 1024             # C
    num_hidden_layers: int = 24
    num_attention_heads: int = 16       # H
    intermediate_size: int = None       # F; None means 4 * hidden_size
    max_position_embeddings: int = 2048  # the longest sequence, "block size"
    rotary_pct: float = 0.25            # share of each head's dims that is rotated
    rotary_emb_base: float = 10000
    layer_norm_eps: float = 1e-5
    hidden_act: str = 'gelu'
    use_parallel_residual: bool = True  # x + Attn(LN1(x)) + MLP(LN2(x)); False: the two one after the other

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        sizes = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size',
                 'max_position_embeddings')
        problems = [f'{name} is {getattr(self, name)!r}, expected an integer of at least 1' for name in sizes
                    if type(getattr(self, name)) is not int or getattr(self, name) < 1]
        if not problems and self.hidden_size % self.num_attention_heads:
            problems.append(f'hidden_size {self.hidden_size} is not a multiple of num_attention_heads '
                            f'{self.num_attention_heads}')
        elif not problems and not (0 <= self.rotary_pct <= 1 and self.rotary_dims % 2 == 0):
            problems.append(f'rotary_pct {self.rotary_pct} of head size {self.head_size} rotates '
                            f'{self.rotary_dims} dims, expected an even number from 0 to {self.head_size}')
        if self.hidden_act not in GELU_KINDS:
            problems.append(f'hidden_act is {self.hidden_act!r}, expected one of {", ".join(GELU_KINDS)}')
        for name in ('rotary_emb_base', 'layer_norm_eps'):
            if not getattr(self, name) > 0:
                problems.append(f'{name} is {getattr(self, name)}, expected a positive number')
        if problems:
            raise ModelError('model configuration: ' + '; '.join(problems))

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dims(self):
        return int(self.head_size * self.rotary_pct)

    @classmethod
    def pythia(cls, size, **changes):
        """The configuration of a Pythia size ('14m' .. '12b'), with fields changed by keyword."""
        if size not in PYTHIA:
            raise ModelError(f'unknown Pythia size {size!r}, expected one of {", ".join(PYTHIA)}')
        p = PYTHIA[size]
        return cls(**{**dict(vocab_size=p.vocab, hidden_size=p.width, num_hidden_layers=p.layers,
                             num_attention_heads=p.heads), **changes})


# Biderman et al., Table 1 and the suite's training files: sizes, vocabulary rows (50277 tokens, padded to a
# multiple of 128 times the model-parallel ranks that trained it), peak and least learning rate.
PythiaSize = namedtuple('PythiaSize', 'layers width heads vocab peak_lr min_lr')
PYTHIA = {
    '14m': PythiaSize(6, 128, 4, 50304, 1.0e-3, 1.0e-4),
    '31m': PythiaSize(6, 256, 8, 50304, 1.0e-3, 1.0e-4),
    '70m': PythiaSize(6, 512, 8, 50304, 1.0e-3, 1.0e-4),
    '160m': PythiaSize(12, 768, 12, 50304, 6.0e-4, 6.0e-5),
    '410m': PythiaSize(24, 1024, 16, 50304, 3.0e-4, 3.0e-5),
    '1b': PythiaSize(16, 2048, 8, 50304, 2.5e-4, 2.5e-5),
    '1.4b': PythiaSize(24, 2048, 16, 50304, 2.0e-4, 2.0e-5),
    '2.8b': PythiaSize(32, 2560, 32, 50304, 1.6e-4, 1.6e-5),
    '6.9b': PythiaSize(32, 4096, 32, 50432, 1.2e-4, 1.2e-5),
    '12b': PythiaSize(36, 5120, 40, 50688, 1.2e-4, 1.2e-5),
}


# -----------------------------------------------------------------------------
# Which operations run as Triton kernels.

Fused = namedtuple('Fused', 'norm attention loss')      # True: by Triton kernels; False: by PyTorch; or CUDNN
CUDNN = 'cuDNN'                                         # PyTorch's attention, by cuDNN where that takes the shape
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PYTORCH = Fused(False, False, False)
said = set()


def say(line):
    """Print a line the first time that it is said, from rank 0."""
    if line not in said and os.environ.get('RANK', '0') == '0':
        print(line, flush=True)
    said.add(line)


def pick_kernels(wanted, device, dtype, hidden_size, head_size, deterministic=True):
    """-> Fused. wanted: 'triton', 'torch', or 'auto', which is Triton on CUDA and PyTorch elsewhere.

    'auto' leaves attention to PyTorch where that is faster: in float32, whose products no matrix unit does in full
    precision; and for heads above 64 on Hopper, by cuDNN, whose gradients vary in their last bits from run to run,
    unless the run is to be deterministic. Says once (rank 0) what runs where, and why an operation is PyTorch's.
    """
    if wanted not in ('auto', 'triton', 'torch'):
        raise ModelError(f"kernels is {wanted!r}, expected 'auto', 'triton' or 'torch'")
    if wanted == 'torch' or wanted == 'auto' and device != 'cuda':
        return PYTORCH
    interpreted = triton is not None and triton.knobs.runtime.interpret     # TRITON_INTERPRET=1: tests, on a CPU
    reason = next((reason for reason, holds in {
        'Triton is not installed': triton is None,
        f'the kernels need a GPU with CUDA, this is {device}': device != 'cuda' and not interpreted,
        'the kernels are for GPUs of NVIDIA': device == 'cuda' and torch.version.hip is not None,
        'this GPU is too old: compute capability below 8.0':
            device == 'cuda' and torch.cuda.get_device_capability() < (8, 0),
        f'{dtype} is not one of float32, float16, bfloat16':
            dtype not in (torch.float32, torch.float16, torch.bfloat16)}.items() if holds), '')
    reasons = Fused(norm=reason or f'width {hidden_size} is above 8192' * (hidden_size > 8192),
                    attention=reason or f'head size {head_size} is above 256' * (head_size > 256), loss=reason)
    if wanted == 'auto' and dtype == torch.float32 and not reason:
        reasons = reasons._replace(attention='it is faster in float32')
    cudnn = not (deterministic or reason or dtype == torch.float32) and wanted == 'auto' and head_size > 64
    cudnn = cudnn and torch.cuda.get_device_capability()[0] == 9
    if cudnn:
        reasons = reasons._replace(attention='cuDNN: heads above 64 on Hopper, deterministic = False')
    say('kernels: ' + ', '.join(f'{name} by PyTorch ({reason})' if reason else f'{name} by Triton'
                                for name, reason in reasons._asdict().items()))
    fused = Fused(*(not reason for reason in reasons))
    return fused._replace(attention=CUDNN) if cudnn else fused


# torch.compile shall run it while tracing and keep the result. This is all that torch.compiler.assume_constant_result
# does, after importing the whole compiler, which takes a second.
pick_kernels._dynamo_marked_constant = True


def compute_dtype(x):
    """The type of matrix products: autocast's, or without autocast that of x."""
    kind = x.device.type
    autocast = kind != 'meta' and torch.is_autocast_enabled(kind)       # of meta, that would be an error
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def launcher(*outputs):
    """Decorator: a function that only fills `outputs`, tensors among its arguments, becomes an operator of PyTorch.

    torch.compile then takes it as it is, and since it allocates nothing, needs no description of its shapes.
    """
    def register(launch):
        @functools.wraps(launch)
        def on_its_device(x, *args):
            with torch.cuda.device_of(x):               # Triton would launch on the current device
                launch(x, *args)
        return torch.library.custom_op(f'rewarm::{launch.__name__}', on_its_device, mutates_args=outputs)
    return register


# -----------------------------------------------------------------------------
# Operations: what the modules below compute, as plain functions. First the residual sum and LayerNorm.

def add_norm(x, branches, norms, fused=PYTORCH):
    """The sum s of x and 0 to 2 branches (all (B, T, C)), and its LayerNorms -> (s, norms[0](s), ...).

    In a parallel block both norms see the same s, and so share its mean and variance.
    """
    if fused.norm:
        a, m = (*branches, None, None)[:2]
        w1, b1, w2, b2 = (*(p for norm in norms for p in (norm.weight, norm.bias)), None, None)[:4]
        return AddNorm.apply(x, a, m, w1, b1, w2, b2, norms[0].eps, compute_dtype(x))
    for branch in branches:
        x = x + branch
    return x, *(norm(x) for norm in norms)


class AddNorm(torch.autograd.Function):
    """add_norm in one pass over memory each way; memory traffic is all that these operations cost on a GPU.

    With n = (s - mean) rstd and y_i = n w_i + b_i, let g = sum_i w_i dy_i and <.> the mean over a row. Then
    dx = rstd (g - <g> - n <g n>) + ds:  linear in g, so that two norms need no more reductions than one. It is the
    gradient of the branches, too. dw_i = sum over rows of n dy_i,  db_i = sum over rows of dy_i.
    """

    @staticmethod
    def forward(ctx, x, a, m, w1, b1, w2, b2, eps, dtype):
        x, a, m = (t if t is None else t.contiguous() for t in (x, a, m))
        s, y1 = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        y2 = None if w2 is None else torch.empty_like(y1)
        mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
        add_norm_forward(x, a, m, w1, b1, w2, b2, s, y1, y2, mean, rstd, eps)
        ctx.save_for_backward(s, mean, rstd, w1, w2)
        ctx.branches = tuple(t if t is None else t.dtype for t in (a, m))
        return (s, y1) if y2 is None else (s, y1, y2)

    @staticmethod
    def backward(ctx, ds, dy1, dy2=None):
        s, mean, rstd, w1, w2 = ctx.saved_tensors
        ds, dy1, dy2 = (t if t is None else t.contiguous() for t in (ds, dy1, dy2))     # a sum's has stride 0
        # A few programs go over many rows each and keep the sums of their rows in registers; one sum over the
        # programs follows. Atomic additions would come in another order in every run.
        programs = 4 * torch.cuda.get_device_properties(s.device).multi_processor_count if s.is_cuda else 4
        sums = s.new_empty(programs, 2 if w2 is None else 4, s.shape[-1], dtype=torch.float32)
        dx = torch.empty_like(s)
        a, m = ctx.branches
        rounded = None if a in (None, s.dtype) else torch.empty_like(s, dtype=a)    # fp32 stream, bf16 branches
        add_norm_backward(s, mean, rstd, w1, w2, ds, dy1, dy2, dx, rounded, sums)
        dbranch = dx if rounded is None else rounded
        dw1, db1, dw2, db2 = (*sums.sum(0), None, None)[:4]
        return dx, a and dbranch, m and dbranch, dw1, db1, dw2, db2, None, None


def row_tile(C):
    """(rows of a tile, its columns, warps): rows of C numbers whole, padded to a power of 2."""
    columns = triton.next_power_of_2(C)
    return max(1, 1024 // columns), columns, min(max(columns // 256, 4), 16)


@launcher('s', 'y1', 'y2', 'mean', 'rstd')
def add_norm_forward(x: Tensor, a: Optional[Tensor], m: Optional[Tensor], w1: Tensor, b1: Tensor, w2: Optional[Tensor],
                     b2: Optional[Tensor], s: Tensor, y1: Tensor, y2: Optional[Tensor], mean: Tensor, rstd: Tensor,
                     eps: float) -> None:
    (ROWS, COLS, warps), N = row_tile(x.shape[-1]), mean.numel()
    add_norm_kernel[triton.cdiv(N, ROWS),](x, a, m, w1, b1, w2, b2, s, y1, y2, mean, rstd, N, eps, x.shape[-1],
                                           ROWS, COLS, num_warps=warps)


@jit
def add_norm_kernel(X, A, M, W1, B1, W2, B2, S, Y1, Y2, Mean, Rstd, N, eps,
                    C: constexpr, ROWS: constexpr, COLS: constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside, at = (row < N)[:, None] & (col < C)[None, :], tl.cast(row, tl.int64)[:, None] * C + col[None, :]
    s = tl.load(X + at, inside, 0).to(tl.float32)                   # (ROWS, COLS)
    if A is not None:
        s += tl.load(A + at, inside, 0).to(tl.float32)
    if M is not None:
        s += tl.load(M + at, inside, 0).to(tl.float32)
    s = s.to(S.dtype.element_ty)
    tl.store(S + at, s, inside)
    s = s.to(tl.float32)                                            # as rounded: what the backward pass will read
    mean = tl.sum(s, 1) / C
    centred = tl.where(inside, s - mean[:, None], 0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(Mean + row, mean, row < N)
    tl.store(Rstd + row, rstd, row < N)
    n = centred * rstd[:, None]
    w, b = tl.load(W1 + col, col < C, 0).to(tl.float32), tl.load(B1 + col, col < C, 0).to(tl.float32)
    tl.store(Y1 + at, (n * w[None, :] + b[None, :]).to(Y1.dtype.element_ty), inside)
    if W2 is not None:
        w, b = tl.load(W2 + col, col < C, 0).to(tl.float32), tl.load(B2 + col, col < C, 0).to(tl.float32)
        tl.store(Y2 + at, (n * w[None, :] + b[None, :]).to(Y2.dtype.element_ty), inside)


@launcher('dx', 'rounded', 'sums')
def add_norm_backward(s: Tensor, mean: Tensor, rstd: Tensor, w1: Tensor, w2: Optional[Tensor], ds: Tensor, dy1: Tensor,
                      dy2: Optional[Tensor], dx: Tensor, rounded: Optional[Tensor], sums: Tensor) -> None:
    ROWS, COLS, warps = row_tile(s.shape[-1])
    add_norm_backward_kernel[sums.shape[0],](s, mean, rstd, w1, w2, ds, dy1, dy2, dx, rounded, sums, mean.numel(),
                                             s.shape[-1], ROWS, COLS, num_warps=warps)


@jit
def add_norm_backward_kernel(S, Mean, Rstd, W1, W2, DS, DY1, DY2, DX, Rounded, Sums, N,
                             C: constexpr, ROWS: constexpr, COLS: constexpr):
    col = tl.arange(0, COLS)
    w1 = tl.load(W1 + col, col < C, 0).to(tl.float32)[None, :]
    dw1, db1 = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    if W2 is not None:
        w2 = tl.load(W2 + col, col < C, 0).to(tl.float32)[None, :]
        dw2, db2 = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside, at = (row < N)[:, None] & (col < C)[None, :], tl.cast(row, tl.int64)[:, None] * C + col[None, :]
        mean, rstd = tl.load(Mean + row, row < N, 0)[:, None], tl.load(Rstd + row, row < N, 0)[:, None]
        n = tl.where(inside, (tl.load(S + at, inside, 0).to(tl.float32) - mean) * rstd, 0)
        ds = tl.load(DS + at, inside, 0).to(tl.float32)             # before the sums, after which it would wait alone
        dy = tl.load(DY1 + at, inside, 0).to(tl.float32)
        g = dy * w1
        dw1 += n * dy
        db1 += dy
        if W2 is not None:
            dy = tl.load(DY2 + at, inside, 0).to(tl.float32)
            g += dy * w2
            dw2 += n * dy
            db2 += dy
        mean_g, mean_gn = tl.sum(g, 1)[:, None] / C, tl.sum(g * n, 1)[:, None] / C
        dx = rstd * (g - mean_g - n * mean_gn) + ds
        tl.store(DX + at, dx.to(DX.dtype.element_ty), inside)
        if Rounded is not None:
            tl.store(Rounded + at, dx.to(Rounded.dtype.element_ty), inside)
    Sums += tl.program_id(0) * (2 if W2 is None else 4) * C + col
    tl.store(Sums, tl.sum(dw1, 0), col < C)
    tl.store(Sums + C, tl.sum(db1, 0), col < C)
    if W2 is not None:
        tl.store(Sums + 2 * C, tl.sum(dw2, 0), col < C)
        tl.store(Sums + 3 * C, tl.sum(db2, 0), col < C)


# -----------------------------------------------------------------------------
# Rotary position embedding

def rotary_tables(config):
    """cos and sin of position * base^(-2i / R), float32, each (max_position_embeddings, R), halves alike.

    Su et al. 2021 (arXiv:2104.09864), equation 15. Kept in float32: gpt-neox rounds them to the parameters'
    type, which misplaces late positions.
    """
    R = config.rotary_dims
    inv_freq = 1.0 / config.rotary_emb_base ** (torch.arange(0, R, 2, dtype=torch.float32) / max(R, 1))
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate_(x, cos, sin):
    """Rotate x (..., R) in place by the angles of cos and sin, computing in their precision.

    Dim i pairs with dim i + R/2 (half split, as GPT-NeoX), not with its neighbour as in GPT-J and the paper.
    """
    wide = x.to(cos.dtype)
    a, b = wide.chunk(2, dim=-1)
    x.copy_((wide * cos).addcmul_(torch.cat((-b, a), dim=-1), sin))


class SplitHeads(torch.autograd.Function):
    """Fused projection (B, T, H, 3, D) -> q, k with their first R dims rotated, v, as one (3, B, H, T, D).

    One copy each way, and only the R dims touched again. From slices and joins, autograd would copy all of q
    and k twice more. The gradient of a rotation is the rotation back: sin -> -sin.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        heads = qkv.permute(3, 0, 2, 1, 4).contiguous()             # (3, B, H, T, D)
        rotate_(heads[:2, ..., :cos.shape[-1]], cos, sin)
        return heads

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad = grad.permute(1, 3, 2, 0, 4).contiguous()             # (B, T, H, 3, D)
        rotate_(grad[..., :2, :cos.shape[-1]], cos[:, None, None], -sin[:, None, None])
        return grad, None, None


@launcher('qkv')
def rotate_packed_(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Rotate the first R dims of q and k in a packed (B, T, H, 3, D), in place, and touch nothing else."""
    B, T, H, _, D = qkv.shape
    N, half = 2 * B * T * H, cos.shape[-1] // 2
    if half:
        rotate_kernel[triton.cdiv(N, 128),](qkv, cos, sin, N, T, H, D, half, triton.next_power_of_2(half), 128,
                                            -1 if inverse else 1)


@jit
def rotate_kernel(QKV, Cos, Sin, N, T, H: constexpr, D: constexpr, HALF: constexpr, COLS: constexpr, ROWS: constexpr,
                  SIGN: constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row < N)[:, None] & (col < HALF)[None, :]             # row: sequence, token, head, q or k; flat
    angle = (row // (2 * H) % T)[:, None] * (2 * HALF) + col[None, :]       # the tables' halves are alike
    cos, sin = tl.load(Cos + angle, inside, 0).to(tl.float32), tl.load(Sin + angle, inside, 0).to(tl.float32) * SIGN
    first = QKV + (tl.cast(row // 2, tl.int64) * (3 * D) + row % 2 * D)[:, None] + col[None, :]
    a, b = tl.load(first, inside, 0).to(tl.float32), tl.load(first + HALF, inside, 0).to(tl.float32)
    tl.store(first, (a * cos - b * sin).to(QKV.dtype.element_ty), inside)
    tl.store(first + HALF, (b * cos + a * sin).to(QKV.dtype.element_ty), inside)


# -----------------------------------------------------------------------------
# Causal attention

QUERY_BLOCK = 64


class BlockedAttention(torch.autograd.Function):
    """Causal attention of (3, B, H, T, D) by batched matrix products over blocks of queries -> (B, H, T, D).

    For training on a CPU, where PyTorch's SDPA has a slow backward pass. Queries s .. e see keys 0 .. e only,
    so that blocks skip nearly half of the products; the probabilities P are kept for the backward pass
    (H T^2 / 2 a sequence), where SDPA recomputes them. In bfloat16, scores are rounded before the softmax,
    which SDPA does not. With S = q k^T / sqrt(D), P = softmax(S), y = P v and gradients d_:
    dv = P^T dy,  dP = dy v^T,  dS = P (dP - rowsum(P dP)),  dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D).
    """

    @staticmethod
    def forward(ctx, qkv):
        q, k, v = qkv.flatten(1, 2)                                 # (B H, T, D) each
        T, scale, y = q.shape[1], q.shape[2] ** -0.5, torch.empty_like(q)
        future = torch.full((QUERY_BLOCK, QUERY_BLOCK), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        kept = []
        for s in range(0, T, QUERY_BLOCK):
            e = min(s + QUERY_BLOCK, T)
            scores = torch.bmm(q[:, s:e], k[:, :e].mT).mul_(scale)  # (B H, e - s, e)
            scores[:, :, s:] += future[:e - s, :e - s]
            P = torch.softmax(scores, dim=-1, out=scores)           # in place: fresh memory costs page faults
            y[:, s:e] = torch.bmm(P, v[:, :e])
            kept.append(P)
        ctx.save_for_backward(qkv, *kept)
        return y.view(qkv.shape[1:])

    @staticmethod
    def backward(ctx, dy):
        qkv, *kept = ctx.saved_tensors
        q, k, v = qkv.flatten(1, 2)
        dqkv = torch.zeros_like(qkv)
        dq, dk, dv = dqkv.flatten(1, 2)
        T, scale, dy = q.shape[1], q.shape[2] ** -0.5, dy.flatten(0, 1)
        for s, P in zip(range(0, T, QUERY_BLOCK), kept):
            e = s + P.shape[1]
            dP = torch.bmm(dy[:, s:e], v[:, :e].mT)
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype, grad_input=dP).mul_(scale)
            dq[:, s:e] = torch.bmm(dS, k[:, :e])
            dk[:, :e] += torch.bmm(dS.mT, q[:, s:e])
            dv[:, :e] += torch.bmm(P.mT, dy[:, s:e])
        return dqkv


def causal_attention(qkv):
    """softmax(q k^T / sqrt(D)) v; a query sees itself and what came before. (3, B, H, T, D) -> (B, H, T, D).

    CPU up to 1024 tokens: blocked products. Forward + backward, SDPA / blocked, ms, 2 cores (AVX-512 bf16):
      T 256: bfloat16 32 / 12, float32 25 / 18;  T 512: 50 / 23, 63 / 33;  T 1024: 61 / 41, 76 / 61.
    Elsewhere SDPA: its memory does not grow with T^2.
    """
    if qkv.device.type == 'cpu' and qkv.shape[3] <= 1024:
        return BlockedAttention.apply(qkv)
    return F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)


def cached_attention(qkv, past):
    """The same after past = (k, v), (B, H, S, D) each -> (B, H, T, D) and (k, v) of all S + T tokens."""
    q, k, v = qkv.unbind(0)
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past[0].shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible), (k, v)


class FlashAttention(torch.autograd.Function):
    """Rotary and causal attention of a packed projection (B, T, H, 3, D) -> (B, T, C), with no copy of either.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2): scores S = q k^T / sqrt(D) exist only as tiles
    in registers. Going along a row, its peak m and its sum l of exp(S - m) are brought up to date tile by tile
    (Milakov & Gimelshein 2018, arXiv:1805.02867), and what is summed already shrinks by exp(m_old - m_new). Kept for
    the backward pass: L = m + log l, so that P = exp(S - L) is one step. There, with delta = rowsum(dO o O), which is
    BlockedAttention's rowsum(P o dP):  dS = P o (dP - delta). One kernel goes along the rows for dq, another along the
    columns for dk and dv: each tile is computed twice, but no two programs add to one place, so results repeat bit
    for bit. Exponentials are base 2, the one that GPUs have; log2(e) goes into the scale.

    The projection is rotated in place: nothing else keeps it, a linear layer does not need its output again.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        B, T, H, _, D = qkv.shape
        rotate_packed_(qkv, cos, sin, False)
        o, L = qkv.new_empty(B, T, H * D), qkv.new_empty(B, H, padded_rows(T), dtype=torch.float32)
        attention_forward(qkv, o, L)
        ctx.save_for_backward(qkv, o, L, cos, sin)
        return o

    @staticmethod
    def backward(ctx, do):
        qkv, o, L, cos, sin = ctx.saved_tensors
        dqkv, delta = torch.empty_like(qkv), torch.empty_like(L)
        attention_backward(qkv, o, L, do.contiguous(), dqkv, delta)
        rotate_packed_(dqkv, cos, sin, True)
        return dqkv, None, None


# Tiles (queries, keys, warps, stages of the pipeline) of forward, dq, and dk dv, by bytes of a number and head size.
# As large as goes without spilling registers (float32 heads above 64 do) and with 99 KB of shared memory, the least
# that GPUs of compute capability 8.0 and up have. Of s stages, s - 2 tiles are loaded ahead while one is worked on: 2
# stages wait for every load. Four warps, a group, share the rows of a product 64 at a time: a group too many for the
# rows repeats the work of another. Keys divide queries in the first two, and queries keys in the last: so tiles meet
# the diagonal with a corner. A kernel's queries divide those of the one before it, which fills the rows that it reads.
ATTENTION_TILES = {
    (2, 64): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    (2, 128): ((128, 32, 8, 3), (64, 32, 4, 3), (32, 64, 4, 2)),
    (2, 256): ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    (4, 64): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (4, 128): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (4, 256): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))}


def padded_rows(T):
    """Rows of L and delta: whole tiles, so that their loads need no mask. Past the end, L = inf makes P = 0."""
    return -(-T // 128) * 128


def attention_sizes(qkv):
    """(B, T, H, D, D padded to what a matrix unit takes, 1 / sqrt(D), that for exp2, tiles of the three kernels)"""
    B, T, H, _, D = qkv.shape
    padded = max(16, triton.next_power_of_2(D))
    scale, tiles = D**-0.5, ATTENTION_TILES[qkv.element_size(), max(64, padded)]
    return B, T, H, D, padded, scale, scale * math.log2(math.e), tiles


@launcher('o', 'L')
def attention_forward(qkv: Tensor, o: Tensor, L: Tensor) -> None:
    B, T, H, D, padded, scale, scale2, ((queries, keys, warps, stages), _, _) = attention_sizes(qkv)
    attention_kernel[triton.cdiv(T, queries), B * H](qkv, o, L, T, L.shape[-1], scale2, H, D, padded, queries, keys,
                                                     num_warps=warps, num_stages=stages)


@launcher('dqkv', 'delta')
def attention_backward(qkv: Tensor, o: Tensor, L: Tensor, do: Tensor, dqkv: Tensor, delta: Tensor) -> None:
    B, T, H, D, padded, scale, scale2, (_, (queries, keys, warps, stages), dkv) = attention_sizes(qkv)
    sizes = T, L.shape[-1], scale, scale2, H, D, padded
    attention_dq_kernel[triton.cdiv(T, queries), B * H](qkv, o, L, do, dqkv, delta, *sizes, queries, keys,
                                                        num_warps=warps, num_stages=stages)
    queries, keys, warps, stages = dkv                  # after it, for the delta that it writes
    attention_dkv_kernel[triton.cdiv(T, keys), B * H](qkv, L, do, dqkv, delta, *sizes, queries, keys,
                                                      num_warps=warps, num_stages=stages)


@jit
def head_of(QKV, T, H: constexpr, D: constexpr):
    """This program's head of its sequence: the address of its first q in a (B, T, H, 3, D)."""
    return QKV + tl.cast(tl.program_id(1) // H, tl.int64) * T * (3 * H * D) + tl.program_id(1) % H * (3 * D)


@jit
def output_of(O, T, H: constexpr, D: constexpr):
    """The same in a (B, T, H, D)."""
    return O + tl.cast(tl.program_id(1) // H, tl.int64) * T * (H * D) + tl.program_id(1) % H * D


@jit
def tile(row, col, pitch, T, D: constexpr):
    """(offsets, mask) of rows `pitch` apart: none past the end of the sequence (ragged T) or of the head (D padded)."""
    return row[:, None] * pitch + col[None, :], (row < T)[:, None] & (col < D)[None, :]


@jit
def attention_kernel(QKV, O, L, T, L_ROWS, scale2,
                     H: constexpr, D: constexpr, COLS: constexpr, QUERIES: constexpr, KEYS: constexpr):
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES   # the longest rows first: no late straggler
    row, col = start + tl.arange(0, QUERIES), tl.arange(0, COLS)
    Q = head_of(QKV, T, H, D)
    at, inside = tile(row, col, 3 * H * D, T, D)
    q = tl.load(Q + at, inside, 0)                                  # (QUERIES, D)
    peak, total = tl.full((QUERIES,), float('-inf'), tl.float32), tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, COLS), tl.float32)
    for diagonal in tl.static_range(2):                             # tiles before the diagonal need no mask
        for s in range(start if diagonal else 0, tl.minimum(start + QUERIES, T) if diagonal else start, KEYS):
            key = s + tl.arange(0, KEYS)
            at_key, real = tile(key, col, 3 * H * D, T, D)
            k, v = tl.load(Q + D + at_key, real, 0), tl.load(Q + 2 * D + at_key, real, 0)   # (KEYS, D)
            scores = tl.dot(q, tl.trans(k), input_precision='ieee')                         # (QUERIES, KEYS)
            if diagonal:
                scores = tl.where(row[:, None] >= key[None, :], scores, float('-inf'))
            higher = tl.maximum(peak, tl.max(scores, 1) * scale2)
            p, shrink = tl.exp2(scores * scale2 - higher[:, None]), tl.exp2(peak - higher)
            total = total * shrink + tl.sum(p, 1)
            out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision='ieee')
            peak = higher
    tl.store(L + tl.program_id(1) * L_ROWS + row, tl.where(row < T, peak + tl.log2(total), float('inf')))
    at, inside = tile(row, col, H * D, T, D)
    tl.store(output_of(O, T, H, D) + at, (out / total[:, None]).to(O.dtype.element_ty), inside)


@jit
def attention_dq_kernel(QKV, O, L, DO, DQKV, Delta, T, L_ROWS, scale, scale2,
                        H: constexpr, D: constexpr, COLS: constexpr, QUERIES: constexpr, KEYS: constexpr):
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    row, col = start + tl.arange(0, QUERIES), tl.arange(0, COLS)
    Q = head_of(QKV, T, H, D)
    at, inside = tile(row, col, H * D, T, D)
    o, do = tl.load(output_of(O, T, H, D) + at, inside, 0), tl.load(output_of(DO, T, H, D) + at, inside, 0)
    at, inside = tile(row, col, 3 * H * D, T, D)
    q = tl.load(Q + at, inside, 0)                                  # (QUERIES, D)
    lse = tl.load(L + tl.program_id(1) * L_ROWS + row)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(Delta + tl.program_id(1) * L_ROWS + row, delta)
    dq = tl.zeros((QUERIES, COLS), tl.float32)
    for diagonal in tl.static_range(2):
        for s in range(start if diagonal else 0, tl.minimum(start + QUERIES, T) if diagonal else start, KEYS):
            key = s + tl.arange(0, KEYS)
            at_key, real = tile(key, col, 3 * H * D, T, D)
            k, v = tl.load(Q + D + at_key, real, 0), tl.load(Q + 2 * D + at_key, real, 0)   # (KEYS, D)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision='ieee') * scale2 - lse[:, None])
            if diagonal:
                p = tl.where(row[:, None] >= key[None, :], p, 0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision='ieee') - delta[:, None])     # (QUERIES, KEYS)
            dq += tl.dot(ds.to(k.dtype), k, input_precision='ieee')
    tl.store(head_of(DQKV, T, H, D) + at, (dq * scale).to(DQKV.dtype.element_ty), inside)


@jit
def attention_dkv_kernel(QKV, L, DO, DQKV, Delta, T, L_ROWS, scale, scale2,
                         H: constexpr, D: constexpr, COLS: constexpr, QUERIES: constexpr, KEYS: constexpr):
    start = tl.program_id(0) * KEYS
    key, col = start + tl.arange(0, KEYS), tl.arange(0, COLS)
    Q = head_of(QKV, T, H, D)
    at, inside = tile(key, col, 3 * H * D, T, D)
    k, v = tl.load(Q + D + at, inside, 0), tl.load(Q + 2 * D + at, inside, 0)               # (KEYS, D)
    dk, dv = tl.zeros((KEYS, COLS), tl.float32), tl.zeros((KEYS, COLS), tl.float32)
    for after in tl.static_range(2):                                # queries at the diagonal, then those after it
        for s in range(start + KEYS if after else start, T if after else tl.minimum(start + KEYS, T), QUERIES):
            row = s + tl.arange(0, QUERIES)
            at_q, real = tile(row, col, 3 * H * D, T, D)
            at_o, _ = tile(row, col, H * D, T, D)
            q, do = tl.load(Q + at_q, real, 0), tl.load(output_of(DO, T, H, D) + at_o, real, 0)     # (QUERIES, D)
            lse = tl.load(L + tl.program_id(1) * L_ROWS + row)
            delta = tl.load(Delta + tl.program_id(1) * L_ROWS + row)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision='ieee') * scale2 - lse[None, :])
            if not after:
                p = tl.where(row[None, :] >= key[:, None], p, 0)
            dv += tl.dot(p.to(do.dtype), do, input_precision='ieee')
            ds = p * (tl.dot(v, tl.trans(do), input_precision='ieee') - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision='ieee')
    tl.store(head_of(DQKV, T, H, D) + D + at, (dk * scale).to(DQKV.dtype.element_ty), inside)
    tl.store(head_of(DQKV, T, H, D) + 2 * D + at, dv.to(DQKV.dtype.element_ty), inside)


# -----------------------------------------------------------------------------
# Loss

def cross_entropy(logits, targets, reduction='mean'):
    """Loss in nats per token, computed in float32 (float64 stays). logits (B, T, V), targets (B, T).

    reduction 'mean': over all tokens (end-of-text is learned too, as in gpt-neox); 'none': (B, T).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss.view_as(targets) if reduction == 'none' else loss


def head_loss(x, head, targets, reduction='mean', fused=PYTORCH):
    """cross_entropy(head(x), targets) for x (B, T, C) and the linear layer head."""
    if fused.loss and (reduction == 'mean' or not torch.is_grad_enabled()):
        x = x.to(compute_dtype(x)).flatten(0, 1)                    # (N, C)
        loss = HeadLoss.apply(x, head.weight, targets.flatten(), torch.is_grad_enabled(), reduction)
        return loss.view_as(targets) if reduction == 'none' else loss
    if fused.loss:                              # HeadLoss takes the gradient before it knows how tokens are weighted
        say("kernels: loss by PyTorch, where reduction = 'none' and gradients are wanted")
    return cross_entropy(head(x), targets, reduction)


LOSS_ROWS = 16384           # of logits at a time; x V = 50304 in bfloat16: 1.6 GB


class HeadLoss(torch.autograd.Function):
    """cross_entropy(x W^T, targets) for x (N, C), W (V, C), with LOSS_ROWS rows of logits at a time, never in float32.

    The logits' gradient, softmax(logits) - onehot(target), takes their place as soon as the loss is known, and goes
    into dx and dW at once: the idea of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989). The factor that the backward
    pass brings, divided by N, is applied there, so that fp16 sees it together with its loss scale. Chunks are large,
    since each reads and writes all of dW.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradient, reduction):
        w, losses, dx = weight.to(x.dtype), [], []
        dw = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        for x_rows, wanted in zip(x.split(LOSS_ROWS), targets.split(LOSS_ROWS)):
            logits = x_rows @ w.T                                   # (rows, V)
            losses.append(x.new_empty(len(logits), dtype=torch.float32))
            cross_entropy_(logits, wanted, losses[-1], with_gradient)
            if with_gradient:                                       # logits now holds their gradient
                dx.append(logits @ w)
                dw += logits.T @ x_rows
        if with_gradient:
            ctx.save_for_backward(torch.cat(dx), dw)
        losses = torch.cat(losses)
        return losses.mean() if reduction == 'mean' else losses

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        grad = grad / len(dx)
        return dx * grad, dw * grad, None, None, None


@launcher('logits', 'losses')
def cross_entropy_(logits: Tensor, targets: Tensor, losses: Tensor, with_gradient: bool) -> None:
    rows, V = logits.shape
    block = min(8192, triton.next_power_of_2(V))
    cross_entropy_kernel[rows,](logits, targets, losses, V, block, with_gradient, num_warps=8)


@jit
def cross_entropy_kernel(Logits, Targets, Losses, V: constexpr, BLOCK: constexpr, WITH_GRADIENT: constexpr):
    """Loss of a row of logits (V), in a pass for their peak and sum; in another they become their own gradient."""
    row = tl.program_id(0)
    Logits += tl.cast(row, tl.int64) * V
    target = tl.load(Targets + row)                                 # no such token: a loss of NaN
    right = tl.load(Logits + target, (target >= 0) & (target < V), float('nan')).to(tl.float32)
    peak, total, target, log2e = float('-inf'), 0.0, target.to(tl.int32), 1.4426950408889634
    for s in range(0, V, BLOCK):
        col = s + tl.arange(0, BLOCK)
        x = tl.load(Logits + col, col < V, float('-inf')).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp2((peak - higher) * log2e) + tl.sum(tl.exp2((x - higher) * log2e), 0)
        peak = higher
    tl.store(Losses + row, tl.log(total) + (peak - right))
    if WITH_GRADIENT:
        for s in range(0, V, BLOCK):
            col = s + tl.arange(0, BLOCK)
            x = tl.load(Logits + col, col < V, float('-inf')).to(tl.float32)
            p = tl.exp2((x - peak) * log2e - tl.log2(total))
            tl.store(Logits + col, (p - (col == target)).to(Logits.dtype.element_ty), col < V)


# -----------------------------------------------------------------------------
# Modules. Parameter names are the keys of Hugging Face's GPTNeoXForCausalLM files.

class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(C, 3 * C)                # rows: head 0's q, k, v, then head 1's, ...
        self.dense = nn.Linear(C, C)

    def forward(self, x, cos, sin, past=None, fused=PYTORCH):
        """x (B, T, C), past (k, v) of the tokens before it or None -> (B, T, C), (k, v) including x.

        The kernels keep no (k, v): for training and evaluation, not for generating.
        """
        B, T, C = x.shape
        qkv = self.query_key_value(x).view(B, T, self.num_heads, 3, -1)     # (B, T, H, 3, D)
        if fused.attention is True:
            return self.dense(FlashAttention.apply(qkv, cos, sin)), None
        qkv = SplitHeads.apply(qkv, cos, sin)                       # (3, B, H, T, D)
        if past is None:
            with sdpa_kernel(CUDNN_FIRST, set_priority=True) if fused.attention == CUDNN else nullcontext():
                y, present = causal_attention(qkv), (qkv[1], qkv[2])        # (B, H, T, D)
        else:
            y, present = cached_attention(qkv, past)
        return self.dense(y.transpose(1, 2).reshape(B, T, C)), present


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.gelu_kind = GELU_KINDS[config.hidden_act]

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.gelu_kind))


class Layer(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, branches, cos, sin, past=None, fused=PYTORCH):
        """Residual x (B, T, C) and the branches still to be added to it -> the same after this layer, (k, v).

        A sum is put off until the next LayerNorm, which reads it, so that one kernel can do both.
        """
        if self.use_parallel_residual:
            x, a, m = add_norm(x, branches, (self.input_layernorm, self.post_attention_layernorm), fused)
            attended, present = self.attention(a, cos, sin, past, fused)
            return x, (attended, self.mlp(m)), present
        x, a = add_norm(x, branches, (self.input_layernorm,), fused)
        attended, present = self.attention(a, cos, sin, past, fused)
        x, m = add_norm(x, (attended,), (self.post_attention_layernorm,), fused)
        return x, (self.mlp(m),), present


class GPTNeoX(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.kernels = 'auto'           # or 'triton', 'torch': see pick_kernels; may be set at any time
        self.deterministic = True       # the same bits in every run, also where it is slower; likewise
        self.gpt_neox = nn.ModuleDict(dict(
            embed_in=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            final_layer_norm=nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)))
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)   # not tied to embed_in
        cos, sin = rotary_tables(config)
        self.register_buffer('cos', cos, persistent=False)          # (block size, R)
        self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Pythia's: N(0, 2/(5C)) (small_init, Nguyen & Salazar 2019), and for the matrices that write into
        the residual stream a standard deviation of 2 / (layers sqrt(C)) (wang_init); biases 0.
        """
        C, L = self.config.hidden_size, self.config.num_hidden_layers
        small, wang = math.sqrt(2 / (5 * C)), 2 / (L * math.sqrt(C))
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                into_residual = name.endswith(('attention.dense.weight', 'mlp.dense_4h_to_h.weight'))
                nn.init.normal_(p, std=wang if into_residual else small)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)                                   # LayerNorm weights are 1 already

    def forward(self, idx, targets=None, cache=None, reduction='mean'):
        """Next-token logits, or the loss when targets are given.

        idx      (B, T) token ids, T at most the block size
        targets  (B, T) the token that follows each; then logits are None
        cache    keys and values of the tokens before idx, from `new_cache`; extended in place
        returns  (logits (B, T, V) or None, loss or None): nats per token, mean over all tokens, or (B, T)
                 for reduction='none'
        """
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        end = start + idx.shape[1]
        if end > self.config.max_position_embeddings:
            raise ModelError(f'a sequence of {end} tokens is longer than the block size '
                             f'{self.config.max_position_embeddings} (max_position_embeddings); crop it')
        if not idx.numel():
            raise ModelError(f'an empty batch: token ids of shape {tuple(idx.shape)}, expected at least one token')
        cos, sin = self.cos[start:end], self.sin[start:end]         # (T, R)
        x, branches = self.gpt_neox.embed_in(idx), ()               # (B, T, C)
        fused = PYTORCH if cache else pick_kernels(self.kernels, x.device.type, compute_dtype(x),
                                                   self.config.hidden_size, self.config.head_size, self.deterministic)
        for i, layer in enumerate(self.gpt_neox.layers):
            x, branches, present = layer(x, branches, cos, sin, cache[i] if cache else None, fused)
            if cache:                                               # otherwise let go of the keys and values
                cache[i] = present
        _, x = add_norm(x, branches, (self.gpt_neox.final_layer_norm,), fused)
        if targets is None:
            return self.embed_out(x), None                          # (B, T, V)
        return None, head_loss(x, self.embed_out, targets, reduction, fused)

    def new_cache(self):
        """An empty key-value cache: for every layer None, later (k, v), each (B, H, tokens so far, D)."""
        return [None] * len(self.gpt_neox.layers)

    def num_params(self):
        """Number of parameters, both embedding matrices included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations of one trained token, forward and backward: 6 N + 12 L C T.

        The convention of PaLM (Chowdhery et al. 2022, appendix B): N counts every parameter that multiplies
        (all but the input embedding, a look-up); attention counts the whole T x T square, though causal code
        may skip half.
        """
        T = T or self.config.max_position_embeddings
        N = self.num_params() - self.gpt_neox.embed_in.weight.numel()
        return 6 * N + 12 * self.config.num_hidden_layers * self.config.hidden_size * T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue idx (B, T) by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest whose
        probabilities reach p (see `sample_token`). Keys and values are cached until the block is full. From
        then on each token is computed from the last `block size` tokens anew: dropping the oldest token
        changes what all later ones saw in the layers below, so no cached key past the first layer would still
        be right.
        """
        block, cache = self.config.max_position_embeddings, self.new_cache()
        fed = 0                                                     # tokens whose keys are in the cache
        for _ in range(max_new_tokens):
            if idx.shape[1] <= block:
                logits, _ = self(idx[:, fed:], cache=cache)
                fed = idx.shape[1]
            else:
                logits, _ = self(idx[:, -block:])
            token = sample_token(logits[:, -1], temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
        return idx


# -----------------------------------------------------------------------------
# Sampling

def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token per row of logits (B, V) -> (B, 1).

    Order: temperature, then top-k, then top-p (Holtzman et al. 2020, arXiv:1904.09751) on what is left.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ModelError(f'temperature {temperature}, top_k {top_k}, top_p {top_p}: expected '
                         'temperature >= 0, top_k >= 1 and top_p in (0, 1]')
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits, order = (logits.float() / temperature).sort(dim=-1, descending=True)    # likeliest first
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probs = logits.softmax(dim=-1)                                  # (B, V)
    if top_p is not None:
        probs[probs.cumsum(dim=-1) - probs >= top_p] = 0            # those before it already reach p
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))


# -----------------------------------------------------------------------------
# Optimizer

def configure_optimizer(model, lr, betas, eps, weight_decay, device):
    """AdamW that decays matrices only (both embeddings included, as gpt-neox), not biases and LayerNorms."""
    params = list(model.parameters())
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    fused = torch.device(device).type in ('cpu', 'cuda')        # one pass over weights, gradients, moments
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


# -----------------------------------------------------------------------------
# Hugging Face directories: config.json and model.safetensors (or pytorch_model.bin), whole or in shards.

# What old files carry beside parameters: the causal mask, its fill value, the rotary frequencies.
LEGACY_BUFFERS = ('.attention.bias', '.attention.masked_bias', '.attention.rotary_emb.inv_freq')
# Fields of GPTNeoXConfig that config.json has under the same name.
PLAIN_FIELDS = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size',
                'max_position_embeddings', 'layer_norm_eps', 'hidden_act', 'use_parallel_residual')


def load_hf(path):
    """Read a Hugging Face directory of a GPTNeoXForCausalLM -> GPTNeoX with float32 parameters, on the CPU.

    float32 whatever the files hold: a training step of 1e-4 of a weight is below half the spacing of bfloat16 (at
    least 2^-8 of it) and float16 numbers (2^-11), and would be rounded away. Memory: 4 bytes a parameter and one file.
    Nothing in it is executed. Raises ModelError for what is missing, damaged or of another architecture.
    """
    path = Path(path)
    with torch.device('meta'):                                  # shapes alone: no memory, no random numbers
        model = GPTNeoX(read_hf_config(path / 'config.json'))
    tensors = {name: t for name, t in read_hf_tensors(path).items() if not name.endswith(LEGACY_BUFFERS)}
    if 'embed_out.weight' not in tensors and 'lm_head.weight' in tensors:      # transformers 5 in memory
        tensors['embed_out.weight'] = tensors.pop('lm_head.weight')
    check_tensors(tensors, model.state_dict(), path)
    model.load_state_dict(tensors, assign=True)
    model.cos, model.sin = rotary_tables(model.config)
    return model


def check_tensors(found, expected, where):
    """Every expected name with its shape and no other, or one ModelError that lists what differs."""
    problems = [f'missing {name} {tuple(expected[name].shape)}' for name in expected if name not in found]
    problems += [f'unexpected {name} {tuple(found[name].shape)}' for name in found if name not in expected]
    for name in (name for name in expected if name in found):
        if found[name].shape != expected[name].shape or not found[name].is_floating_point():
            problems.append(f'{name} is {found[name].dtype} {tuple(found[name].shape)}, expected floating '
                            f'point {tuple(expected[name].shape)}')
    if problems:
        raise ModelError(f'{where}: the weights do not fit config.json:\n  ' + '\n  '.join(problems))


def read_json(file):
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ModelError(f'{file}: cannot be read as JSON ({error}); expected a Hugging Face directory')
    if not isinstance(content, dict):
        raise ModelError(f'{file}: holds a {type(content).__name__}, expected an object')
    return content


def read_hf_config(file):
    """config.json -> GPTNeoXConfig. Reads both spellings of the rotary fields (transformers 4 and 5)."""
    raw = read_json(file)
    if raw.get('model_type') != 'gpt_neox':
        raise ModelError(f"{file}: model_type is {raw.get('model_type')!r}, expected 'gpt_neox'")
    missing = [name for name in PLAIN_FIELDS[:6] if name not in raw]
    if missing:
        raise ModelError(f'{file}: has no {", ".join(missing)}')
    rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
    rope_type = rope.get('rope_type', rope.get('type', 'default'))
    for what, value, expected in (('rope_type', rope_type, 'default'),
                                  ('tie_word_embeddings', raw.get('tie_word_embeddings', False), False),
                                  ('attention_bias', raw.get('attention_bias', True), True)):
        if value != expected:
            raise ModelError(f'{file}: {what} is {value!r}, only {expected!r} is supported')
    return GPTNeoXConfig(rotary_pct=rope.get('partial_rotary_factor', raw.get('rotary_pct', 0.25)),
                         rotary_emb_base=rope.get('rope_theta', raw.get('rotary_emb_base', 10000)),
                         **{name: raw[name] for name in PLAIN_FIELDS if name in raw})


def read_hf_tensors(path):
    """All tensors of a model directory {name: tensor}, from the first of the four forms that is there, as float32."""
    for whole in ('model.safetensors', 'pytorch_model.bin'):
        index = path / f'{whole}.index.json'
        if (path / whole).exists():
            return read_tensor_file(path / whole)
        if index.exists():
            return read_shards(index)
    raise ModelError(f'{path}: no model.safetensors, pytorch_model.bin or an index of shards')


def read_shards(index):
    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f'{index}: has no weight_map of tensor name to file name')
    tensors = {}
    for file in sorted(set(weight_map.values())):
        if file != os.path.basename(file) or file in ('', '.', '..') or '\\' in file:
            raise ModelError(f'{index}: names {file!r}, expected a file of the same directory')
        if not (index.parent / file).exists():
            raise ModelError(f'{index}: names {file}, which is not there; download it too')
        shard = read_tensor_file(index.parent / file)
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise ModelError(f'{index}: {", ".join(twice)} in more than one shard')
        tensors.update(shard)
    return tensors


def read_tensor_file(file):
    """One .safetensors or .bin file {name: tensor}; pickles by weights_only=True, so that none runs code.

    Floating-point tensors become float32, each given up as it is converted, before the next file is read.
    """
    try:
        tensors = (safetensors.torch.load_file(file) if file.suffix == '.safetensors' else
                   torch.load(file, map_location='cpu', weights_only=True))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f'{file}: damaged, cut short, or holds more than tensors ({reason}); get it again')
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise ModelError(f'{file}: expected a dictionary of tensors')
    # A copy even of float32: the tensor of a safetensors file may be the mapped file itself.
    return {name: t.to(torch.float32, copy=True) if t.is_floating_point() else t
            for name in list(tensors) for t in [tensors.pop(name)]}


def save_hf(model, path, eot=0, beside=None):
    """Write config.json and model.safetensors into the new or empty directory `path` (transformers 4 and 5).

    In the type of the model's parameters. eot: id of end-of-text; beside: {name: bytes} of a tokenizer's files.
    All or nothing: written into a temporary directory beside it, then renamed.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f'{path}: exists and is no empty directory; name another, nothing is overwritten')
    config = model.config
    raw = {'architectures': ['GPTNeoXForCausalLM'], 'model_type': 'gpt_neox',
           **{name: getattr(config, name) for name in PLAIN_FIELDS},
           # The old names: transformers 5 reads them too, transformers 4 does not know the new ones.
           'rotary_pct': config.rotary_pct, 'rotary_emb_base': config.rotary_emb_base,
           'tie_word_embeddings': False, 'bos_token_id': eot, 'eos_token_id': eot,
           'torch_dtype': str(model.embed_out.weight.dtype).removeprefix('torch.')}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        safetensors.torch.save_file(tensors, partial / 'model.safetensors', metadata={'format': 'pt'})
        (partial / 'config.json').write_text(json.dumps(raw, indent=2) + '\n', encoding='utf-8')
        for name, content in (beside or {}).items():
            (partial / name).write_bytes(content)
        partial.chmod(0o755)                                        # mkdtemp gives it to its owner alone
        if path.exists():
            path.rmdir()                                        # it is empty; Windows does not rename onto it
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)                  # is there no more when all went well
