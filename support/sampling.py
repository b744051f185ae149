"""Text from a model: sampling token by token, with a cache of keys and values.

Nobody needs this to understand a run.
"""
import math

import torch
import torch.nn.functional as F

from configurator import require
from model import rotate


class CachedAttention:
    """causal_attention for tokens that follow others, whose keys and values it keeps."""

    def __init__(self):
        self.k = self.v = None                                                  # (B, H, S, D)

    def __call__(self, qkv, cos, sin):
        q, k, v = qkv.permute(3, 0, 2, 1, 4)                                    # (B, H, T, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        T, S = q.shape[2], k.shape[2]
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return y.transpose(1, 2).flatten(2)                                     # (B, T, C)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Continue idx (B, T) by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

    Sampling is described in sample_token. Keys and values are cached until the block is full. After
    that each token is computed from the last `block size` tokens: without the oldest token, all
    later ones change in every layer but the first, so no cached key stays right.
    """
    block_size = model.config.max_position_embeddings
    modules = [layer.attention for layer in model.gpt_neox.layers]
    before = [module.attend for module in modules]
    cached = 0                                          # tokens whose keys are known
    try:
        for module in modules:
            module.attend = CachedAttention()
        for _ in range(max_new_tokens):
            if idx.shape[1] <= block_size:
                logits, _ = model(idx[:, cached:], position=cached)
                cached = idx.shape[1]
            else:
                for module, attend in zip(modules, before):
                    module.attend = attend
                logits, _ = model(idx[:, -block_size:])
            token = sample_token(logits[:, -1], temperature, top_k, top_p, generator)
            idx = torch.cat((idx, token), dim=1)
    finally:
        for module, attend in zip(modules, before):
            module.attend = attend
    return idx


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token per row of logits (B, V) -> (B, 1).

    temperature 0 takes the likeliest token. Otherwise top_k keeps the k likeliest, then top_p the
    fewest whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751).
    """
    require(temperature == 0 or temperature > 1e-6, f'temperature {temperature} must be 0 or above '
            '1e-6')
    require(top_k is None or top_k >= 1, f'top_k {top_k} must be at least 1')
    require(top_p is None or 0 < top_p <= 1, f'top_p {top_p} must be above 0 and at most 1')
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    logits, order = logits.sort(dim=-1, descending=True)                        # likeliest first
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probs = logits.softmax(dim=-1)                                              # (B, V)
    if top_p is not None:
        probs[probs.cumsum(dim=-1) - probs >= top_p] = 0        # those before it already reach p
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))
