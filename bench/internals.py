"""All that the benches use from inside model.py: they take it from here and from nowhere else.

When model.py changes inside, change this file. Beyond it the benches know only GPTNeoX (its
gpt_neox.layers), GPTNeoXConfig, PYTHIA, parameter_groups, and support/.
"""
import contextlib
from unittest import mock

import torch
import torch.nn.functional as F

import model
from model import (FlashAttention, HeadLoss, add_norm, causal_attention, cross_entropy,
                   parameter_groups, rotary_tables, rotate, rotate_packed_)

# The Triton kernels of attention, in the order of their tiles in model.ATTENTION_TILES.
ATTENTION_KERNELS = ('attention_kernel', 'attention_dq_kernel', 'attention_dkv_kernel')
FORWARD, DQ, DKV = range(3)


# ------------------------------------------------------------------------------
# The operations by PyTorch, called like those by Triton

def plain_add_norm(x, branches, *norms):
    for branch in branches:
        x = x + branch
    return x, *(norm(x) for norm in norms)


class PlainHeadLoss:

    @staticmethod
    def apply(x, weight, targets, with_gradient, reduction):
        return cross_entropy(F.linear(x, weight)[None], targets[None], reduction)


@contextlib.contextmanager
def parts(net, attend=FlashAttention.apply, norms=add_norm, loss=HeadLoss):
    """Inside, a model on the fast path computes these parts by these functions."""
    for layer in net.gpt_neox.layers:
        layer.attention.attend = attend
    with mock.patch.object(model, 'add_norm', norms), mock.patch.object(model, 'HeadLoss', loss):
        yield


# ------------------------------------------------------------------------------
# Tiles of attention: (queries, keys, warps, stages of the pipeline)

def tile_key(head_size):
    """Where model.ATTENTION_TILES has the tiles for 2-byte numbers and this head size."""
    return 2, max(64, model.triton.next_power_of_2(head_size))


def tile_in_use(head_size, place):
    return model.ATTENTION_TILES[tile_key(head_size)][place]


def use_tile(head_size, place, tile):
    """A context in which one of ATTENTION_KERNELS runs with that tile."""
    tiles = list(model.ATTENTION_TILES[tile_key(head_size)])
    tiles[place] = tile
    return mock.patch.dict(model.ATTENTION_TILES, {tile_key(head_size): tuple(tiles)})


def tile_fits(place, tile):
    """Keys divide queries in the forward and dq kernels, queries divide keys in the dkv kernel.

    The queries of a kernel also have to divide those of the kernel before it, unless T is a
    multiple of 128, as it is where tiles are timed.
    """
    queries, keys, _, _ = tile
    return keys % queries == 0 if place == DKV else queries % keys == 0


class Keeper:
    """A kernel that keeps what Triton compiled for its last launch."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled = self.kernel[grid](*args, **options)
        return launch

    def resources(self):
        """Registers of a thread, words that it spills, shared memory of a program in KB.

        Empty for what the interpreter ran, which compiles nothing.
        """
        if not hasattr(self.compiled, 'n_regs'):
            return {}
        return {'registers': self.compiled.n_regs, 'spills': self.compiled.n_spills,
                'shared_kb': self.compiled.metadata.shared / 1024}


def keep_compiled(place):
    """A context in which an attention kernel is a Keeper, which it yields."""
    name = ATTENTION_KERNELS[place]
    return mock.patch.object(model, name, Keeper(getattr(model, name)))


def make_optimizer(net, device):
    """AdamW as in train.py."""
    return torch.optim.AdamW(parameter_groups(net, 0.1), lr=1e-4, betas=(0.9, 0.95), eps=1e-8,
                             fused=device in ('cpu', 'cuda'))
