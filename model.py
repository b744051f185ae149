"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), the model of Pythia (Biderman et al. 2023).

The model comes first, in plain PyTorch, up to the banner "Faster on an NVIDIA GPU". What follows
there computes the same faster. Skip it on a first reading.

Shapes:  B batch   T tokens of a sequence   C hidden_size   H heads   D = C / H head size
         R rotary dims   F intermediate_size (4 C)   V vocab_size   N = B T tokens of a batch
"""
import fnmatch
import functools
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configurator import require

try:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:
    triton, jit, constexpr = None, lambda kernel: kernel, None      # then the plain model runs

# ------------------------------------------------------------------------------
# Configuration

# 'gelu' is the exact form, which the released Pythia configs name. The others are one and the same
# tanh approximation, with which gpt-neox trained Pythia (its bias_gelu_fusion).
GELU_KINDS = {'gelu': 'none', 'gelu_fast': 'tanh', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}


@dataclass
class GPTNeoXConfig:
    """The shape of a model. The names are those of Hugging Face's config.json."""
    vocab_size: int = 50304             # V, rows of both embeddings, padding included
    hidden_size: int = 1024             # C
    num_hidden_layers: int = 24
    num_attention_heads: int = 16       # H
    intermediate_size: int = None       # F; None means 4 C
    max_position_embeddings: int = 2048     # the longest sequence, "block size"
    rotary_pct: float = 0.25            # share of each head's dims that is rotated
    rotary_emb_base: float = 10000
    layer_norm_eps: float = 1e-5
    hidden_act: str = 'gelu'
    use_parallel_residual: bool = True  # x + Attn(LN1(x)) + MLP(LN2(x)); False: one after the other

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            if kind is int:
                require(type(value) is int and 1 <= value <= 2**24,
                        f'{name} is {value!r}, but must be an integer from 1 to 2^24')
            if kind is bool:
                require(type(value) is bool, f'{name} is {value!r}, but must be true or false')
            if kind is float:
                require(type(value) in (int, float) and 0 <= value < math.inf,
                        f'{name} is {value!r}, but must be a number of at least 0')
        require(self.num_hidden_layers <= 10_000, f'{self.num_hidden_layers} layers are too many')
        require(self.hidden_size % self.num_attention_heads == 0, f'hidden_size {self.hidden_size} '
                f'is not a multiple of num_attention_heads {self.num_attention_heads}')
        require(self.rotary_pct <= 1 and self.rotary_dims % 2 == 0, f'rotary_pct {self.rotary_pct} '
                f'rotates {self.rotary_dims} of {self.head_size} dims, but the number must be even')
        require(self.rotary_emb_base > 0, 'rotary_emb_base must be positive')
        require(self.hidden_act in GELU_KINDS, f'hidden_act is {self.hidden_act!r}, but must be '
                f'one of {", ".join(GELU_KINDS)}')

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dims(self):
        return int(self.head_size * self.rotary_pct)

    @classmethod
    def pythia(cls, size, **changes):
        """The configuration of a Pythia size, '14m' to '12b', with fields changed by keyword."""
        require(size in PYTHIA, f'there is no Pythia of size {size!r}, only {", ".join(PYTHIA)}')
        layers, width, heads, vocab_size = PYTHIA[size]
        shape = dict(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
                     vocab_size=vocab_size)
        return cls(**(shape | changes))


# layers, width, heads, vocabulary rows (Biderman et al., Table 1). The 50,277 tokens are padded to
# a multiple of 128 times the number of model-parallel GPUs that trained the size.
PYTHIA = {
    '14m': (6, 128, 4, 50304),
    '31m': (6, 256, 8, 50304),
    '70m': (6, 512, 8, 50304),
    '160m': (12, 768, 12, 50304),
    '410m': (24, 1024, 16, 50304),
    '1b': (16, 2048, 8, 50304),
    '1.4b': (24, 2048, 16, 50304),
    '2.8b': (32, 2560, 32, 50304),
    '6.9b': (32, 4096, 32, 50432),
    '12b': (36, 5120, 40, 50688),
}


# ------------------------------------------------------------------------------
# Rotary position embedding

def rotary_tables(config):
    """cos and sin of position * base^(-2i / R), float32, (block size, R) each; both halves alike.

    Su et al. 2021 (arXiv:2104.09864), equation 15. They stay in float32: gpt-neox rounds them to
    the type of the parameters, which misplaces late positions.
    """
    R = config.rotary_dims
    exponents = torch.arange(0, R, 2, dtype=torch.float32) / max(R, 1)
    frequencies = 1.0 / config.rotary_emb_base ** exponents                     # (R / 2)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = positions[:, None] * frequencies                       # (block size, R / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the first R dims of x (B, H, T, D) by the angles of cos and sin (T, R).

    Dim i pairs with dim i + R/2, as in GPT-NeoX, and not with its neighbour as in GPT-J.
    """
    R = cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin                    # in float32
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


# ------------------------------------------------------------------------------
# The model. Parameter names are those of Hugging Face's GPTNeoXForCausalLM files.

def causal_attention(qkv, cos, sin):
    """softmax(q k^T / sqrt(D)) v with rotary embedding: packed (B, T, H, 3, D) -> (B, T, C)."""
    q, k, v = qkv.permute(3, 0, 2, 1, 4)                                        # (B, H, T, D) each
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)                                         # (B, T, C)


class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(C, 3 * C)      # rows: head 0's q, k, v, then head 1's, ...
        self.dense = nn.Linear(C, C)
        self.attend = causal_attention                  # or one that computes the same faster

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = self.query_key_value(x).view(B, T, self.num_heads, 3, -1)         # (B, T, H, 3, D)
        y = self.attend(qkv, cos, sin)                                          # (B, T, C)
        return self.dense(y)


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

    def forward(self, x, cos, sin, branches=None):
        if branches is not None:
            return triton_layer(self, x, branches, cos, sin)    # the lines below, faster on a GPU

        attended = self.attention(self.input_layernorm(x), cos, sin)
        if self.use_parallel_residual:
            # GPT-NeoX and Pythia: attention and MLP both read the incoming x
            return x + attended + self.mlp(self.post_attention_layernorm(x))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class GPTNeoX(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.fast = False                               # whether Triton computes the loss
        self.checkpoint_activations = False             # less memory for a third more time
        self.gpt_neox = nn.ModuleDict(dict(
            embed_in=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            final_layer_norm=nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)))
        # not tied to embed_in
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config)
        self.register_buffer('cos', cos, persistent=False)                      # (block size, R)
        self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Pythia's initialisation: small_init (Nguyen & Salazar 2019) and wang_init; biases 0.

        N(0, 2 / (5C)), and for the matrices that write into the residual stream a standard
        deviation of 2 / (layers sqrt(C)).
        """
        for name, p in self.named_parameters():
            self.init_parameter(name, p)

    def init_parameter(self, name, p):
        C, layers = self.config.hidden_size, self.config.num_hidden_layers
        small, wang = math.sqrt(2 / (5 * C)), 2 / (layers * math.sqrt(C))
        into_residual = name.endswith(('attention.dense.weight', 'mlp.dense_4h_to_h.weight'))
        if p.dim() >= 2:
            nn.init.normal_(p, std=wang if into_residual else small)
        else:
            nn.init.constant_(p, 0 if name.endswith('.bias') else 1)            # 1: LayerNorms

    def forward(self, idx, targets=None, reduction='mean', position=0):
        """Next-token logits or, when targets are given, the loss.

        idx       (B, T) token ids, T at most the block size
        targets   (B, T) the token that follows each
        position  of the first token: above 0 where attention knows the tokens before
        returns   (logits (B, T, V), None) or (None, loss): nats per token, the mean over all
                  tokens, or (B, T) for reduction='none'
        """
        end = position + idx.shape[1]
        require(end <= self.config.max_position_embeddings, f'a sequence of {end} tokens is longer '
                f'than the block size {self.config.max_position_embeddings}. Crop it.')
        require(idx.numel() > 0, f'token ids of shape {tuple(idx.shape)} hold no token')
        cos, sin = self.cos[position:end], self.sin[position:end]               # (T, R) each
        x = self.gpt_neox.embed_in(idx)                                         # (B, T, C)

        # the same loss, computed by kernels; they do not know gradients of single tokens
        weighs_tokens = reduction == 'none' and torch.is_grad_enabled()
        if self.fast and targets is not None and not weighs_tokens:
            return None, triton_loss(self, x, cos, sin, targets, reduction)

        for layer in self.gpt_neox.layers:
            x = self.call_layer(layer, x, cos, sin)
        x = self.gpt_neox.final_layer_norm(x)
        logits = self.embed_out(x)                                              # (B, T, V)
        if targets is None:
            return logits, None
        return None, cross_entropy(logits, targets, reduction)

    def call_layer(self, layer, *args):
        """With checkpoint_activations, the backward pass computes the layer once more."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def num_params(self):
        """Number of parameters, both embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Floating-point operations to train on one token: 6 N + 12 L C T.

        The convention of PaLM (Chowdhery et al. 2022, appendix B): N counts all parameters but the
        input embedding, which is a look-up. Attention counts the whole T x T square, although
        causal code may skip half of it.
        """
        T = T or self.config.max_position_embeddings
        N = self.num_params() - self.gpt_neox.embed_in.weight.numel()
        return 6 * N + 12 * self.config.num_hidden_layers * self.config.hidden_size * T


def cross_entropy(logits, targets, reduction='mean'):
    """Loss in nats per token, in float32 or better. logits (B, T, V), targets (B, T).

    'mean' is over all tokens: end-of-text is learned too, as in gpt-neox. 'none' returns (B, T).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss.view_as(targets) if reduction == 'none' else loss


def parameter_groups(model, weight_decay):
    """As in gpt-neox, matrices decay, embeddings included; biases and LayerNorms do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{'params': [(name, p) for name, p in named if p.dim() >= 2],
               'weight_decay': weight_decay},
              {'params': [(name, p) for name, p in named if p.dim() < 2], 'weight_decay': 0.0}]
    return [group for group in groups if group['params']]


def freeze(model, patterns):
    """The parameters whose names match get no gradient, no decay and no moments."""
    for pattern in patterns:
        found = [p for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        require(found, f'freeze: {pattern!r} matches no parameter. They have names such as '
                'gpt_neox.layers.0.mlp.dense_h_to_4h.weight.')
        for p in found:
            p.requires_grad_(False)
    require(any(p.requires_grad for p in model.parameters()), 'freeze leaves nothing to train.')


# ==============================================================================
# Faster on an NVIDIA GPU: Triton
#
# Three operations, each with its formula: AddNorm (residual sums and LayerNorms), FlashAttention
# (rotary and attention) and HeadLoss (output matrix and cross entropy). triton_loss and
# triton_layer then compute the forward pass once more with them. All gradients repeat bit for bit:
# no kernel adds atomically. Before a run starts, support/fast_path.py compares both paths.
# ==============================================================================

def compute_dtype(x):
    """The type of matrix products: autocast's, or without autocast that of x."""
    kind = x.device.type
    if kind != 'meta' and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def launcher(*outputs):
    """Decorator: makes a function that only fills `outputs` an operator of PyTorch.

    torch.compile then takes it as it is. It allocates nothing, so no shapes have to be described.
    """
    def register(launch):
        @functools.wraps(launch)
        def on_its_device(x, *args):
            with torch.cuda.device_of(x):           # Triton launches on the current device
                launch(x, *args)
        return torch.library.custom_op(f'rewarm::{launch.__name__}', on_its_device,
                                       mutates_args=outputs)
    return register


# ------------------------------------------------------------------------------
# AddNorm: residual sums and LayerNorms

def add_norm(x, branches, *norms):
    """The sum s of x and 0 to 2 branches, all (B, T, C), and 1 or 2 LayerNorms of it.

    -> (s, norms[0](s)) or (s, norms[0](s), norms[1](s))
    """
    a, m = [*branches, None, None][:2]
    parameters = [p for norm in norms for p in (norm.weight, norm.bias)]
    w1, b1, w2, b2 = [*parameters, None, None][:4]
    return AddNorm.apply(x, a, m, w1, b1, w2, b2, norms[0].eps, compute_dtype(x))


class AddNorm(torch.autograd.Function):
    """s = x + a + m and its LayerNorms, with one pass over memory forward and one backward.

    In a parallel layer both norms read the same s, so they share its mean and variance. With
    n = (s - mean) rstd and y_i = n w_i + b_i, let g = sum_i w_i dy_i, and <.> the mean over a row:
    dx = rstd (g - <g> - n <g n>) + ds. This is linear in g, so two norms need no more reductions
    than one. It is the gradient of the branches, too. dw_i = sum over rows of n dy_i, and
    db_i = sum over rows of dy_i.
    """

    @staticmethod
    def forward(ctx, x, a, m, w1, b1, w2, b2, eps, dtype):
        x = x.contiguous()
        a = None if a is None else a.contiguous()
        m = None if m is None else m.contiguous()
        s, y1 = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        y2 = None if w2 is None else torch.empty_like(y1)
        mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
        rstd = torch.empty_like(mean)
        add_norm_forward(x, a, m, w1, b1, w2, b2, s, y1, y2, mean, rstd, eps)
        ctx.save_for_backward(s, mean, rstd, w1, w2)
        ctx.dtype_of_a = None if a is None else a.dtype
        ctx.has_m = m is not None
        return (s, y1) if y2 is None else (s, y1, y2)

    @staticmethod
    def backward(ctx, ds, dy1, dy2=None):
        s, mean, rstd, w1, w2 = ctx.saved_tensors
        ds, dy1 = ds.contiguous(), dy1.contiguous()
        dy2 = None if dy2 is None else dy2.contiguous()

        # A few programs go over many rows each and keep the sums for dw and db in registers; one
        # sum over the programs follows. Atomic additions would come in another order every time.
        programs = 4
        if s.is_cuda:
            programs *= torch.cuda.get_device_properties(s.device).multi_processor_count
        sums = s.new_empty(programs, 2 if w2 is None else 4, s.shape[-1], dtype=torch.float32)
        dx = torch.empty_like(s)
        # the branches may be bfloat16 while the residual stream is float32
        dbranch = dx
        if ctx.dtype_of_a not in (None, s.dtype):
            dbranch = torch.empty_like(s, dtype=ctx.dtype_of_a)
        rounded = None if dbranch is dx else dbranch
        add_norm_backward(s, mean, rstd, w1, w2, ds, dy1, dy2, dx, rounded, sums)

        da = None if ctx.dtype_of_a is None else dbranch
        dm = dbranch if ctx.has_m else None
        dw1, db1, dw2, db2 = [*sums.sum(0), None, None][:4]
        return dx, da, dm, dw1, db1, dw2, db2, None, None


def row_tile(C):
    """(rows of a tile, its columns, warps): whole rows of C numbers, padded to a power of 2."""
    columns = triton.next_power_of_2(C)
    return max(1, 1024 // columns), columns, min(max(columns // 256, 4), 16)


@launcher('s', 'y1', 'y2', 'mean', 'rstd')
def add_norm_forward(x: Tensor, a: Optional[Tensor], m: Optional[Tensor], w1: Tensor, b1: Tensor,
                     w2: Optional[Tensor], b2: Optional[Tensor], s: Tensor, y1: Tensor,
                     y2: Optional[Tensor], mean: Tensor, rstd: Tensor, eps: float) -> None:
    rows, columns, warps = row_tile(x.shape[-1])
    grid = (triton.cdiv(mean.numel(), rows),)
    add_norm_kernel[grid](x, a, m, w1, b1, w2, b2, s, y1, y2, mean, rstd, mean.numel(), eps,
                          x.shape[-1], rows, columns, num_warps=warps)


@jit
def add_norm_kernel(X, A, M, W1, B1, W2, B2, S, Y1, Y2, Mean, Rstd, N, eps,
                    C: constexpr, ROWS: constexpr, COLS: constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row < N)[:, None] & (col < C)[None, :]
    at = tl.cast(row, tl.int64)[:, None] * C + col[None, :]                     # (ROWS, COLS)

    # the sum, then read as it was rounded: that is what the backward pass will see
    s = tl.load(X + at, inside, 0).to(tl.float32)
    if A is not None:
        s += tl.load(A + at, inside, 0).to(tl.float32)
    if M is not None:
        s += tl.load(M + at, inside, 0).to(tl.float32)
    s = s.to(S.dtype.element_ty)
    tl.store(S + at, s, inside)
    s = s.to(tl.float32)

    # mean and variance in two steps: a difference of squares would lose digits
    mean = tl.sum(s, 1) / C
    centred = tl.where(inside, s - mean[:, None], 0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(Mean + row, mean, row < N)
    tl.store(Rstd + row, rstd, row < N)

    n = centred * rstd[:, None]
    w = tl.load(W1 + col, col < C, 0).to(tl.float32)
    b = tl.load(B1 + col, col < C, 0).to(tl.float32)
    tl.store(Y1 + at, (n * w[None, :] + b[None, :]).to(Y1.dtype.element_ty), inside)
    if W2 is not None:
        w = tl.load(W2 + col, col < C, 0).to(tl.float32)
        b = tl.load(B2 + col, col < C, 0).to(tl.float32)
        tl.store(Y2 + at, (n * w[None, :] + b[None, :]).to(Y2.dtype.element_ty), inside)


@launcher('dx', 'rounded', 'sums')
def add_norm_backward(s: Tensor, mean: Tensor, rstd: Tensor, w1: Tensor, w2: Optional[Tensor],
                      ds: Tensor, dy1: Tensor, dy2: Optional[Tensor], dx: Tensor,
                      rounded: Optional[Tensor], sums: Tensor) -> None:
    rows, columns, warps = row_tile(s.shape[-1])
    grid = (sums.shape[0],)
    add_norm_backward_kernel[grid](s, mean, rstd, w1, w2, ds, dy1, dy2, dx, rounded, sums,
                                   mean.numel(), s.shape[-1], rows, columns, num_warps=warps)


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
        inside = (row < N)[:, None] & (col < C)[None, :]
        at = tl.cast(row, tl.int64)[:, None] * C + col[None, :]                 # (ROWS, COLS)
        mean = tl.load(Mean + row, row < N, 0)[:, None]
        rstd = tl.load(Rstd + row, row < N, 0)[:, None]
        n = tl.where(inside, (tl.load(S + at, inside, 0).to(tl.float32) - mean) * rstd, 0)
        # all loads come before the sums: one after them would wait for memory alone
        ds = tl.load(DS + at, inside, 0).to(tl.float32)
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


# ------------------------------------------------------------------------------
# FlashAttention: rotary and attention on the packed projection

class FlashAttention(torch.autograd.Function):
    """causal_attention on the packed projection (B, T, H, 3, D) -> (B, T, C), with no copies.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2). Scores S = q k^T / sqrt(D)
    exist only as tiles in registers. Along a row, its maximum m and its sum l of exp(S - m) are
    updated tile by tile (Milakov & Gimelshein 2018, arXiv:1805.02867), and what is summed already
    shrinks by exp(m_old - m_new). Kept for the backward pass: L = m + log l, so that
    P = exp(S - L) is one step. There, with delta = rowsum(dO o O) = rowsum(P o dP), the gradient
    of the scores is dS = P o (dP - delta). One kernel goes along the rows for dq, another along the
    columns for dk and dv. Each tile is computed twice, but no two programs add to one place.
    Exponentials are base 2, the one that GPUs have; log2(e) is in the scale.

    The projection is rotated in place: nothing else keeps it, since a linear layer does not need
    its output again. Where an edit of Attention.forward keeps it, autograd raises an error.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        # a linear layer's output is right already; what an edit makes of it may not be
        qkv = qkv.to(compute_dtype(qkv)).contiguous()
        B, T, H, _, D = qkv.shape
        rotate_packed_(qkv, cos, sin, False)
        o = qkv.new_empty(B, T, H * D)
        L = qkv.new_empty(B, H, padded_rows(T), dtype=torch.float32)
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


@launcher('qkv')
def rotate_packed_(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Rotate the first R dims of q and k in a packed (B, T, H, 3, D), in place."""
    B, T, H, _, D = qkv.shape
    N, half = 2 * B * T * H, cos.shape[-1] // 2
    if half:
        grid, columns = (triton.cdiv(N, 128),), triton.next_power_of_2(half)
        rotate_kernel[grid](qkv, cos, sin, N, T, H, D, half, columns, 128, -1 if inverse else 1)


@jit
def rotate_kernel(QKV, Cos, Sin, N, T, H: constexpr, D: constexpr, HALF: constexpr,
                  COLS: constexpr, ROWS: constexpr, SIGN: constexpr):
    # a row is one q or one k: of a sequence, a token, a head
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row < N)[:, None] & (col < HALF)[None, :]
    angle = (row // (2 * H) % T)[:, None] * (2 * HALF) + col[None, :]
    cos = tl.load(Cos + angle, inside, 0).to(tl.float32)
    sin = tl.load(Sin + angle, inside, 0).to(tl.float32) * SIGN
    head = tl.cast(row // 2, tl.int64) * (3 * D) + row % 2 * D
    first = QKV + head[:, None] + col[None, :]
    a = tl.load(first, inside, 0).to(tl.float32)
    b = tl.load(first + HALF, inside, 0).to(tl.float32)
    tl.store(first, (a * cos - b * sin).to(QKV.dtype.element_ty), inside)
    tl.store(first + HALF, (b * cos + a * sin).to(QKV.dtype.element_ty), inside)


# Tiles (queries, keys, warps, stages of the pipeline) of the forward, the dq and the dk dv kernel,
# by bytes of a number and head size. They are as large as fits without spilling registers (float32
# heads above 64 do spill) and in the 99 KB of shared memory that every GPU of compute capability
# 8.0 and up has.
# - Of s stages, s - 2 tiles are loaded ahead while one is worked on: 2 stages wait for every load.
# - Four warps share the rows of a product 64 at a time: too many warps for the rows repeat work.
# - Keys divide queries in the first two, and queries keys in the last, so that tiles meet the
#   diagonal with a corner. Queries of a kernel divide those of the kernel before it, which fills
#   the rows of L and delta that it reads.
ATTENTION_TILES = {
    (2, 64): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    (2, 128): ((128, 32, 8, 3), (64, 32, 4, 3), (32, 64, 4, 2)),
    (2, 256): ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    (4, 64): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (4, 128): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (4, 256): ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


def padded_rows(T):
    """Rows of L and delta: whole tiles, so loads need no mask. Past the end L = inf, so P = 0."""
    return -(-T // 128) * 128


def attention_tiles(qkv):
    """The tiles of the three kernels, and the head size padded to what a matrix unit takes."""
    padded = max(16, triton.next_power_of_2(qkv.shape[-1]))
    return ATTENTION_TILES[qkv.element_size(), max(64, padded)], padded


@launcher('o', 'L')
def attention_forward(qkv: Tensor, o: Tensor, L: Tensor) -> None:
    B, T, H, _, D = qkv.shape
    tiles, padded = attention_tiles(qkv)
    queries, keys, warps, stages = tiles[0]
    grid = triton.cdiv(T, queries), B * H
    attention_kernel[grid](qkv, o, L, T, L.shape[-1], D**-0.5 * math.log2(math.e), H, D, padded,
                           queries, keys, num_warps=warps, num_stages=stages)


@launcher('dqkv', 'delta')
def attention_backward(qkv: Tensor, o: Tensor, L: Tensor, do: Tensor, dqkv: Tensor,
                       delta: Tensor) -> None:
    B, T, H, _, D = qkv.shape
    tiles, padded = attention_tiles(qkv)
    sizes = T, L.shape[-1], D**-0.5, D**-0.5 * math.log2(math.e), H, D, padded
    queries, keys, warps, stages = tiles[1]
    grid = triton.cdiv(T, queries), B * H
    attention_dq_kernel[grid](qkv, o, L, do, dqkv, delta, *sizes, queries, keys,
                              num_warps=warps, num_stages=stages)
    # after it, since it writes delta
    queries, keys, warps, stages = tiles[2]
    grid = triton.cdiv(T, keys), B * H
    attention_dkv_kernel[grid](qkv, L, do, dqkv, delta, *sizes, queries, keys,
                               num_warps=warps, num_stages=stages)


@jit
def head_of(QKV, T, H: constexpr, D: constexpr):
    """This program's head of its sequence: the address of its first q in a (B, T, H, 3, D)."""
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    return QKV + tl.cast(sequence, tl.int64) * T * (3 * H * D) + head * (3 * D)


@jit
def output_of(O, T, H: constexpr, D: constexpr):
    """The same in a (B, T, H, D)."""
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    return O + tl.cast(sequence, tl.int64) * T * (H * D) + head * D


@jit
def tile(row, col, pitch, T, D: constexpr):
    """(offsets, mask) of rows `pitch` apart: none past the end of the sequence or of the head."""
    return row[:, None] * pitch + col[None, :], (row < T)[:, None] & (col < D)[None, :]


@jit
def attention_kernel(QKV, O, L, T, L_ROWS, scale2, H: constexpr, D: constexpr, COLS: constexpr,
                     QUERIES: constexpr, KEYS: constexpr):
    # the longest rows first, so that no program starts late with a long one
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    row, col = start + tl.arange(0, QUERIES), tl.arange(0, COLS)
    Q = head_of(QKV, T, H, D)
    at, inside = tile(row, col, 3 * H * D, T, D)
    q = tl.load(Q + at, inside, 0)                                              # (QUERIES, D)
    maximum = tl.full((QUERIES,), float('-inf'), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, COLS), tl.float32)

    # two loops: tiles before the diagonal need no mask
    for diagonal in tl.static_range(2):
        first = start if diagonal else 0
        last = tl.minimum(start + QUERIES, T) if diagonal else start
        for s in range(first, last, KEYS):
            key = s + tl.arange(0, KEYS)
            at_key, real = tile(key, col, 3 * H * D, T, D)
            k = tl.load(Q + D + at_key, real, 0)                                # (KEYS, D)
            v = tl.load(Q + 2 * D + at_key, real, 0)
            scores = tl.dot(q, tl.trans(k), input_precision='ieee')             # (QUERIES, KEYS)
            if diagonal:
                scores = tl.where(row[:, None] >= key[None, :], scores, float('-inf'))
            higher = tl.maximum(maximum, tl.max(scores, 1) * scale2)
            p, shrink = tl.exp2(scores * scale2 - higher[:, None]), tl.exp2(maximum - higher)
            total = total * shrink + tl.sum(p, 1)
            out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision='ieee')
            maximum = higher

    lse = tl.where(row < T, maximum + tl.log2(total), float('inf'))
    tl.store(L + tl.program_id(1) * L_ROWS + row, lse)
    at, inside = tile(row, col, H * D, T, D)
    out = (out / total[:, None]).to(O.dtype.element_ty)
    tl.store(output_of(O, T, H, D) + at, out, inside)


@jit
def attention_dq_kernel(QKV, O, L, DO, DQKV, Delta, T, L_ROWS, scale, scale2, H: constexpr,
                        D: constexpr, COLS: constexpr, QUERIES: constexpr, KEYS: constexpr):
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    row, col = start + tl.arange(0, QUERIES), tl.arange(0, COLS)
    Q = head_of(QKV, T, H, D)
    at, inside = tile(row, col, H * D, T, D)
    o = tl.load(output_of(O, T, H, D) + at, inside, 0)                          # (QUERIES, D)
    do = tl.load(output_of(DO, T, H, D) + at, inside, 0)
    at, inside = tile(row, col, 3 * H * D, T, D)
    q = tl.load(Q + at, inside, 0)
    lse = tl.load(L + tl.program_id(1) * L_ROWS + row)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(Delta + tl.program_id(1) * L_ROWS + row, delta)
    dq = tl.zeros((QUERIES, COLS), tl.float32)

    for diagonal in tl.static_range(2):
        first = start if diagonal else 0
        last = tl.minimum(start + QUERIES, T) if diagonal else start
        for s in range(first, last, KEYS):
            key = s + tl.arange(0, KEYS)
            at_key, real = tile(key, col, 3 * H * D, T, D)
            k = tl.load(Q + D + at_key, real, 0)                                # (KEYS, D)
            v = tl.load(Q + 2 * D + at_key, real, 0)
            scores = tl.dot(q, tl.trans(k), input_precision='ieee')             # (QUERIES, KEYS)
            p = tl.exp2(scores * scale2 - lse[:, None])
            if diagonal:
                p = tl.where(row[:, None] >= key[None, :], p, 0)
            dp = tl.dot(do, tl.trans(v), input_precision='ieee')
            ds = p * (dp - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision='ieee')

    tl.store(head_of(DQKV, T, H, D) + at, (dq * scale).to(DQKV.dtype.element_ty), inside)


@jit
def attention_dkv_kernel(QKV, L, DO, DQKV, Delta, T, L_ROWS, scale, scale2, H: constexpr,
                         D: constexpr, COLS: constexpr, QUERIES: constexpr, KEYS: constexpr):
    start = tl.program_id(0) * KEYS
    key, col = start + tl.arange(0, KEYS), tl.arange(0, COLS)
    Q = head_of(QKV, T, H, D)
    at, inside = tile(key, col, 3 * H * D, T, D)
    k = tl.load(Q + D + at, inside, 0)                                          # (KEYS, D)
    v = tl.load(Q + 2 * D + at, inside, 0)
    dk, dv = tl.zeros((KEYS, COLS), tl.float32), tl.zeros((KEYS, COLS), tl.float32)

    # queries at the diagonal, then those after it
    for after in tl.static_range(2):
        first = start + KEYS if after else start
        last = T if after else tl.minimum(start + KEYS, T)
        for s in range(first, last, QUERIES):
            row = s + tl.arange(0, QUERIES)
            at_q, real = tile(row, col, 3 * H * D, T, D)
            at_o, _ = tile(row, col, H * D, T, D)
            q = tl.load(Q + at_q, real, 0)                                      # (QUERIES, D)
            do = tl.load(output_of(DO, T, H, D) + at_o, real, 0)
            lse = tl.load(L + tl.program_id(1) * L_ROWS + row)
            delta = tl.load(Delta + tl.program_id(1) * L_ROWS + row)
            scores = tl.dot(k, tl.trans(q), input_precision='ieee')             # (KEYS, QUERIES)
            p = tl.exp2(scores * scale2 - lse[None, :])
            if not after:
                p = tl.where(row[None, :] >= key[:, None], p, 0)
            dv += tl.dot(p.to(do.dtype), do, input_precision='ieee')
            dp = tl.dot(v, tl.trans(do), input_precision='ieee')
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision='ieee')

    DK = head_of(DQKV, T, H, D) + D
    tl.store(DK + at, (dk * scale).to(DQKV.dtype.element_ty), inside)
    tl.store(DK + D + at, dv.to(DQKV.dtype.element_ty), inside)


# ------------------------------------------------------------------------------
# HeadLoss: output matrix and cross entropy

LOSS_ROWS = 16384               # rows of logits at a time; times V = 50304 in bfloat16: 1.6 GB


class HeadLoss(torch.autograd.Function):
    """cross_entropy(x W^T, targets) for x (N, C) and W (V, C), LOSS_ROWS rows at a time.

    The gradient of the logits, softmax(logits) - onehot(target), takes their place as soon as the
    loss is known, and goes into dx and dW at once: the idea of Liger Kernel (Hsu et al. 2024,
    arXiv:2410.10989). The backward pass multiplies by the factor that arrives there, divided by N,
    so that fp16 sees it together with its loss scale. Chunks are large, since each reads and writes
    all of dW. Logits never exist in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradient, reduction):
        w, losses, dx = weight.to(x.dtype), [], []
        dw = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        for x_rows, target_rows in zip(x.split(LOSS_ROWS), targets.split(LOSS_ROWS)):
            logits = x_rows @ w.T                                               # (rows, V)
            losses.append(x.new_empty(len(logits), dtype=torch.float32))
            cross_entropy_(logits, target_rows, losses[-1], with_gradient)
            if with_gradient:                       # logits now contains their gradient
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
    cross_entropy_kernel[(rows,)](logits, targets, losses, V, block, with_gradient, num_warps=8)


@jit
def cross_entropy_kernel(Logits, Targets, Losses, V: constexpr, BLOCK: constexpr,
                         WITH_GRADIENT: constexpr):
    row = tl.program_id(0)
    Logits += tl.cast(row, tl.int64) * V
    target = tl.load(Targets + row)
    # a token that does not exist gives a loss of NaN
    right = tl.load(Logits + target, (target >= 0) & (target < V), float('nan')).to(tl.float32)
    target = target.to(tl.int32)
    log2e = 1.4426950408889634

    # one pass over the row for its maximum and the sum of its exponentials
    maximum, total = float('-inf'), 0.0
    for s in range(0, V, BLOCK):
        col = s + tl.arange(0, BLOCK)
        x = tl.load(Logits + col, col < V, float('-inf')).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(x, 0))
        shrink = tl.exp2((maximum - higher) * log2e)
        total = total * shrink + tl.sum(tl.exp2((x - higher) * log2e), 0)
        maximum = higher
    tl.store(Losses + row, tl.log(total) + (maximum - right))

    # in another pass the logits become their gradient
    if WITH_GRADIENT:
        for s in range(0, V, BLOCK):
            col = s + tl.arange(0, BLOCK)
            x = tl.load(Logits + col, col < V, float('-inf')).to(tl.float32)
            p = tl.exp2((x - maximum) * log2e - tl.log2(total))
            tl.store(Logits + col, (p - (col == target)).to(Logits.dtype.element_ty), col < V)


# ------------------------------------------------------------------------------
# The forward pass with these operations

def triton_loss(model, x, cos, sin, targets, reduction):
    """What GPTNeoX.forward computes from the embedded tokens x on: the loss."""
    branches = ()
    for layer in model.gpt_neox.layers:
        x, branches = model.call_layer(layer, x, cos, sin, branches)
    _, x = add_norm(x, branches, model.gpt_neox.final_layer_norm)
    x = x.to(compute_dtype(x)).flatten(0, 1)                                    # (N, C)
    loss = HeadLoss.apply(x, model.embed_out.weight, targets.flatten(), torch.is_grad_enabled(),
                          reduction)
    return loss.view_as(targets) if reduction == 'none' else loss


def triton_layer(layer, x, branches, cos, sin):
    """Layer.forward, but the residual sum is left to the AddNorm that reads it next.

    So x and its branches, 0 to 2 tensors that are still to be added to it, come in and go out.
    """
    if layer.use_parallel_residual:
        x, a, m = add_norm(x, branches, layer.input_layernorm, layer.post_attention_layernorm)
        return x, (layer.attention(a, cos, sin), layer.mlp(m))
    x, a = add_norm(x, branches, layer.input_layernorm)
    x, m = add_norm(x, (layer.attention(a, cos, sin),), layer.post_attention_layernorm)
    return x, (layer.mlp(m),)
