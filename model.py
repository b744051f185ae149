"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), the model of Pythia (Biderman et al. 2023, 2304.01373).

Read top to bottom: configuration, operations, modules, optimizer, Hugging Face files, sampling.

Shapes:  B batch   T tokens of a sequence   C hidden_size   H heads   D = C / H head size   R rotary dims
         F intermediate_size (4 C)   V vocab_size
"""
import json
import math
import os
import pickle
import shutil
import tempfile
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError


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
# Operations: what the modules below compute, as plain functions.

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


class BlockedAttention(torch.autograd.Function):
    """Causal attention of (3, B, H, T, D) by batched matrix products over blocks of queries -> (B, H, T, D).

    For training on a CPU, where PyTorch's SDPA has a slow backward pass. Queries s .. e see keys 0 .. e only,
    so that blocks skip nearly half of the products; the probabilities P are kept for the backward pass
    (H T^2 / 2 a sequence), where SDPA recomputes them. In bfloat16, scores are rounded before the softmax,
    which SDPA does not. With S = q k^T / sqrt(D), P = softmax(S), y = P v and gradients d_:
    dv = P^T dy,  dP = dy v^T,  dS = P (dP - rowsum(P dP)),  dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D).
    """
    BLOCK = 64

    @staticmethod
    def forward(ctx, qkv):
        q, k, v = qkv.flatten(1, 2)                                 # (B H, T, D) each
        T, scale, y = q.shape[1], q.shape[2] ** -0.5, torch.empty_like(q)
        future = torch.full((BlockedAttention.BLOCK,) * 2, -math.inf, dtype=q.dtype, device=q.device).triu(1)
        kept = []
        for s in range(0, T, BlockedAttention.BLOCK):
            e = min(s + BlockedAttention.BLOCK, T)
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
        for s, P in zip(range(0, T, BlockedAttention.BLOCK), kept):
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
    Elsewhere SDPA: on GPUs it is the fast one, and its memory does not grow with T^2.
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


def cross_entropy(logits, targets, reduction='mean'):
    """Loss in nats per token, computed in float32 (float64 stays). logits (B, T, V), targets (B, T).

    reduction 'mean': over all tokens (end-of-text is learned too, as in gpt-neox); 'none': (B, T).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss.view_as(targets) if reduction == 'none' else loss


# -----------------------------------------------------------------------------
# Modules. Parameter names are the keys of Hugging Face's GPTNeoXForCausalLM files.

class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(C, 3 * C)                # rows: head 0's q, k, v, then head 1's, ...
        self.dense = nn.Linear(C, C)

    def forward(self, x, cos, sin, past=None):
        """x (B, T, C), past (k, v) of the tokens before it or None -> (B, T, C), (k, v) including x."""
        B, T, C = x.shape
        qkv = self.query_key_value(x).view(B, T, self.num_heads, 3, -1)     # (B, T, H, 3, D)
        qkv = SplitHeads.apply(qkv, cos, sin)                       # (3, B, H, T, D)
        if past is None:
            y, present = causal_attention(qkv), (qkv[1], qkv[2])    # (B, H, T, D)
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

    def forward(self, x, cos, sin, past=None):
        attended, present = self.attention(self.input_layernorm(x), cos, sin, past)
        if self.use_parallel_residual:
            x = x + attended + self.mlp(self.post_attention_layernorm(x))
        else:
            x = x + attended
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x, present


class GPTNeoX(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
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
        cos, sin = self.cos[start:end], self.sin[start:end]         # (T, R)
        x = self.gpt_neox.embed_in(idx)                             # (B, T, C)
        for i, layer in enumerate(self.gpt_neox.layers):
            x, present = layer(x, cos, sin, cache[i] if cache else None)
            if cache:                                               # otherwise let go of the keys and values
                cache[i] = present
        logits = self.embed_out(self.gpt_neox.final_layer_norm(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return None, cross_entropy(logits, targets, reduction)

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
