"""Results of the Triton kernels of model.py against float64. test_kernels.py runs this file, with TRITON_INTERPRET=1.

The interpreter runs the programs of a kernel one after another, on numpy arrays. It finds wrong numbers, not races.
Inputs are drawn anew in every run; a failing test prints its seed, and MODEL_SEED=... repeats it.
"""
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from model import FlashAttention, Fused, GPTNeoX, GPTNeoXConfig, HeadLoss, add_norm, rotary_tables

assert model.triton.knobs.runtime.interpret, 'run pytest tests/test_kernels.py, or set TRITON_INTERPRET=1'
torch.set_num_threads(1)
TRITON = Fused(True, True, True)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FP32: 1e-6, FP16: 1.5e-3, BF16: 1.2e-2}       # of the largest element; the two halves round to 2^-11, 2^-8


def exact_bf16():
    """Mend the interpreter, which keeps bfloat16 as its bits in uint16: its dot multiplies those as integers, and its
    conversion cuts bits off where GPUs round to the nearest even."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        bits = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16
        return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7fc0, bits).astype(np.uint16), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
    builder.cast_impl = cast_impl


exact_bf16()


@pytest.fixture(autouse=True)
def seed():
    seed = int(os.environ.get('MODEL_SEED', random.randrange(2**32)))
    print(f'MODEL_SEED={seed}')
    random.seed(seed)
    torch.manual_seed(seed)


def error(got, expected):
    assert got.shape == expected.shape
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def leaves(*tensors):
    """The same numbers twice: as they are, and as float64; gradients of both are to be compared."""
    tensors = [t.requires_grad_() for t in tensors]
    return tensors, [t.detach().double().requires_grad_() for t in tensors]


def incoming(kind, like):
    """A gradient as autograd may bring it: dense, one number expanded (of a sum), or with strides of its own."""
    if kind == 'stride 0':
        return torch.randn((), dtype=like.dtype).expand_as(like)
    dense = torch.randn_like(like)
    return dense.mT.contiguous().mT if kind == 'strides' else dense


# --- residual sum and LayerNorm -----------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['dense', 'stride 0', 'strides'])
@pytest.mark.parametrize('stream, branch', [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16), (FP32, FP16)])
@pytest.mark.parametrize('branches, norms', [(0, 2), (1, 1), (2, 1), (2, 2)])
def test_add_norm(branches, norms, stream, branch, kind):
    B, T, C = random.randint(1, 3), random.randint(1, 40), random.choice([16, 33, 96, 130, 1000])
    (x, *added), wide = leaves(torch.randn(B, T, C, dtype=stream) * 2 + 1,
                               *(torch.randn(B, T, C).to(branch) for _ in range(branches)))
    layers = [torch.nn.LayerNorm(C, eps=random.choice([1e-5, 1e-2])) for _ in range(norms)]
    for layer in layers:
        layer.eps = layers[0].eps
        torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    with torch.autocast('cpu', branch if branch != FP32 else BF16, enabled=branch != FP32):
        got = add_norm(x, added, layers, TRITON)
    parameters = [p for layer in layers for p in layer.parameters()]
    exact = [p.detach().double().requires_grad_() for p in parameters]
    s = sum(wide)
    expected = s, *(F.layer_norm(s, (C,), w, b, layers[0].eps) for w, b in zip(exact[::2], exact[1::2]))
    assert [t.dtype for t in got] == [stream] + [branch] * norms
    gradients = [incoming(kind, t) for t in got]
    torch.autograd.backward(got, gradients)
    torch.autograd.backward(expected, [g.double() for g in gradients])
    for a, b in zip(got, expected):
        assert error(a, b) < TOLERANCE[branch]
    for a, b in zip([x, *added, *parameters], [*wide, *exact]):
        assert a.grad.dtype == a.dtype and error(a.grad, b.grad) < TOLERANCE[branch]


def test_add_norm_of_rows_far_from_zero():
    """A mean that is rounded, or a variance as a difference of squares, would be off."""
    x, norm = torch.randn(4, 1, 300) + 1000, torch.nn.LayerNorm(300)
    assert error(add_norm(x, (), (norm,), TRITON)[1], F.layer_norm(x.double(), (300,))) < 1e-4     # of x: 1000 2^-24
    x = x.bfloat16()
    assert error(add_norm(x, (), (norm,), TRITON)[1], F.layer_norm(x.double(), (300,))) < TOLERANCE[BF16]


# --- rotary and attention -----------------------------------------------------------------------------------------

def reference_attention(qkv, cos, sin):
    """Equation by equation, on the whole T x T square."""
    (B, T, H, _, D), R = qkv.shape, cos.shape[-1]
    q, k, v = qkv.permute(3, 0, 2, 1, 4)                            # (B, H, T, D)

    def rotate(x):
        a, b, rest = x.split([R // 2, R // 2, D - R], dim=-1)
        c, s = cos[:T, :R // 2].double(), sin[:T, :R // 2].double()
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)

    scores = rotate(q) @ rotate(k).mT / math.sqrt(D)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)


def tables(T, D, pct):
    return rotary_tables(GPTNeoXConfig(9, D, 1, 1, max_position_embeddings=T, rotary_pct=pct))


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16])
@pytest.mark.parametrize('D, pct', [(64, 0.25), (32, 1.0), (24, 0.5), (128, 0.25), (64, 0)])
def test_rotary_touches_its_dims_only_and_its_inverse_takes_it_back(D, pct, dtype):
    B, T, H, R = 2, random.randint(1, 40), 3, int(D * pct)
    cos, sin = tables(T + 5, D, pct)
    qkv = torch.randn(B, T, H, 3, D).to(dtype)
    got, a, b = qkv.clone(), *qkv.double()[..., :2, :R].chunk(2, dim=-1)
    model.rotate_packed_(got, cos[:T], sin[:T], False)
    c, s = cos[:T, None, None, :R // 2].double(), sin[:T, None, None, :R // 2].double()
    if R:
        assert error(got[..., :2, :R], torch.cat((a * c - b * s, b * c + a * s), dim=-1)) < TOLERANCE[dtype]
    assert torch.equal(got[..., R:], qkv[..., R:]) and torch.equal(got[..., 2, :], qkv[..., 2, :])
    model.rotate_packed_(got, cos[:T], sin[:T], True)
    assert error(got, qkv.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize('dtype, T, D, pct, kind', [
    (FP32, 1, 64, 0.25, 'dense'), (FP32, 32, 32, 0.25, 'dense'), (FP32, 33, 64, 0.25, 'stride 0'),
    (FP32, 65, 64, 1.0, 'strides'), (FP32, 100, 20, 0.5, 'dense'), (FP32, 63, 80, 0.25, 'dense'),
    (FP32, 40, 128, 0.25, 'strides'), (FP32, 37, 256, 0.25, 'dense'), (FP32, 50, 8, 0, 'stride 0'),
    (FP16, 130, 64, 0.25, 'dense'), (FP16, 200, 32, 0.25, 'strides'), (FP16, 70, 96, 0.5, 'dense'),
    (BF16, 129, 64, 0.25, 'stride 0'), (BF16, 300, 64, 0.25, 'dense'), (BF16, 128, 80, 1.0, 'dense'),
    (BF16, 150, 128, 0.25, 'strides'), (BF16, 67, 256, 0.25, 'dense'), (BF16, 64, 16, 0.5, 'dense')])
def test_attention(dtype, T, D, pct, kind):
    B, H = random.choice([(1, 2), (2, 1), (2, 2)])
    cos, sin = tables(T, D, pct)
    (qkv,), (wide,) = leaves(torch.randn(B, T, H, 3, D).to(dtype))
    got, expected = FlashAttention.apply(qkv.clone(), cos, sin), reference_attention(wide, cos, sin)
    gradient = incoming(kind, got)
    got.backward(gradient)
    expected.backward(gradient.double())
    assert got.dtype == dtype and error(got, expected) < TOLERANCE[dtype]
    for i in range(3 if T > 1 else 0):                              # dq, dk, dv; a token alone has dq = dk = 0
        assert error(qkv.grad[..., i, :], wide.grad[..., i, :]) < TOLERANCE[dtype], 'qkv'[i]
    assert error(qkv.grad, wide.grad) < TOLERANCE[dtype]


def test_attention_with_large_scores():
    """Peaks of rows that differ by hundreds: without taking them out, exp would overflow."""
    cos, sin = tables(50, 64, 0.25)
    (qkv,), (wide,) = leaves(torch.randn(1, 50, 1, 3, 64) * torch.tensor([20., 20., 1.])[:, None])
    got, expected = FlashAttention.apply(qkv.clone(), cos, sin), reference_attention(wide, cos, sin)
    got.sum().backward(), expected.sum().backward()
    assert error(got, expected) < 1e-4 and error(qkv.grad, wide.grad) < 1e-4    # scores of 1000 end at 1000 2^-24


# --- loss ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [FP32, FP16, BF16])
@pytest.mark.parametrize('N, C, V, rows', [(13, 24, 97, 5), (8, 16, 128, 16384), (5, 40, 33, 5)])
def test_head_loss(N, C, V, rows, dtype, monkeypatch):
    monkeypatch.setattr(model, 'LOSS_ROWS', rows)
    targets, scale = torch.randint(V, (N,)), 0.25 if dtype != FP16 else 2.0**14
    (x, weight), (wide_x, wide_weight) = leaves(torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype) * 0.5)
    got = HeadLoss.apply(x, weight, targets, True, 'mean')
    # Beyond fp32, the logits are rounded, here as there; the loss itself and its gradient are exact for those.
    rounded = wide_x @ wide_weight.T
    logits = rounded + ((x.detach() @ weight.detach().T).double() - rounded).detach()
    losses = F.cross_entropy(logits, targets, reduction='none')
    (got * scale).backward(), (losses.mean() * scale).backward()
    assert got.dtype == FP32 and error(got, losses.mean()) < 1e-6
    for a, b in (x, wide_x), (weight, wide_weight):
        assert a.grad.dtype == dtype and error(a.grad, b.grad) < TOLERANCE[dtype]
    with torch.no_grad():
        assert error(HeadLoss.apply(x, weight, targets, False, 'none'), losses) < 1e-6


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16])
def test_a_wide_vocabulary_in_several_blocks(dtype):
    logits, targets, losses = (torch.randn(3, 20001) * 3).to(dtype), torch.randint(20001, (3,)), torch.empty(3)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction='none')
    expected.sum().backward()
    model.cross_entropy_(logits, targets, losses, True)             # logits become their gradient
    assert error(losses, expected) < 1e-6 and error(logits, wide.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize('wrong', [-100, -1, 97, 2**40])
def test_no_such_token_is_a_loss_of_nan(wrong):
    losses, targets = torch.empty(3), torch.tensor([5, wrong, 0])
    model.cross_entropy_(torch.randn(3, 97), targets, losses, True)
    assert losses.isnan().tolist() == [False, True, False]


# --- NaN ----------------------------------------------------------------------------------------------------------

def test_nan_stays_nan():
    """One NaN in one of two sequences: what depends on it is NaN, and the other sequence is not."""
    x = torch.randn(2, 40, 48)
    x[0, 7, 3] = math.nan
    s, y = add_norm(x, (), (torch.nn.LayerNorm(48),), TRITON)
    assert torch.equal(y.isnan().any(-1), x.isnan().any(-1))
    qkv = torch.randn(2, 40, 1, 3, 48)
    for which in range(3):
        bad = qkv.clone()
        bad[0, 7, 0, which, 3] = math.nan
        y = FlashAttention.apply(bad, *tables(40, 48, 0.25))
        sees, first, second = torch.arange(40) >= 7, *y.isnan().any(-1)
        assert not second.any() and torch.equal(first & sees, torch.arange(40) == 7 if which == 0 else sees)
    losses = torch.empty(2)
    model.cross_entropy_(torch.tensor([[1, math.nan, 2], [1, 2, 3]]), torch.tensor([0, 0]), losses, True)
    assert losses.isnan().tolist() == [True, False]


# --- the whole model ----------------------------------------------------------------------------------------------

def random_model(**fixed):
    head_size, heads = random.choice([4, 12, 20, 32]), random.randint(1, 3)
    net = GPTNeoX(GPTNeoXConfig(**{**dict(
        vocab_size=random.randint(5, 150), hidden_size=head_size * heads, num_attention_heads=heads,
        num_hidden_layers=2, max_position_embeddings=random.randint(4, 70), rotary_pct=random.choice([0.5, 1.0]),
        layer_norm_eps=random.choice([1e-5, 1e-3])), **fixed}))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return net


def tokens(net, B=2):
    return torch.randint(net.config.vocab_size, (B, net.config.max_position_embeddings))


def gradients(net, kernels, *batch, forward=None, dtype=FP32):
    net.kernels = kernels
    net.zero_grad()
    with torch.autocast('cpu', dtype if dtype != FP32 else BF16, enabled=dtype != FP32):
        loss = (net if forward is None else forward)(*batch)[1]
    loss.backward()
    return {'loss': loss.detach(), **{name: p.grad for name, p in net.named_parameters()}}


@pytest.mark.parametrize('parallel', [True, False])
def test_a_model_trains_on_the_same_gradients(parallel):
    net = random_model(use_parallel_residual=parallel)
    idx, targets = tokens(net), tokens(net)
    ours = gradients(net, 'triton', idx, targets)
    exact = gradients(net.double(), 'torch', idx, targets)
    for name in exact:                                  # a bias of keys shifts all scores of a row: its gradient is 0
        part = ours[name], exact[name]
        if name.endswith('query_key_value.bias'):
            part = (g.view(-1, 3, net.config.head_size)[:, ::2] for g in part)
        assert error(*part) < 2e-5, name                # through two layers, fp32 by PyTorch is off as much


def test_a_model_in_bfloat16_is_as_near_as_by_pytorch():
    net = random_model(hidden_size=32, num_attention_heads=2, vocab_size=96)
    batch = tokens(net), tokens(net)
    triton, torch_ = (gradients(net, kernels, *batch, dtype=BF16) for kernels in ('triton', 'torch'))
    exact = gradients(net.double(), 'torch', *batch)

    def distance(g):
        return math.sqrt(sum((g[name].double() - exact[name]).square().sum() for name in exact)
                         / sum(exact[name].square().sum() for name in exact))
    assert 0 < distance(triton) < 1.5 * distance(torch_) < 0.1


@pytest.mark.parametrize('dtype', [FP32, BF16])
def test_layers_compiled_each_without_a_graph_break_and_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(model, 'LOSS_ROWS', 9)
    net = random_model()
    batch = tokens(net), tokens(net)
    eager = gradients(net, 'triton', *batch, dtype=dtype)
    for layer in net.gpt_neox.layers:
        layer.compile(backend='aot_eager', fullgraph=True)
    compiled = gradients(net, 'triton', *batch, dtype=dtype)
    for name in eager:
        assert torch.equal(eager[name], compiled[name]), name


@pytest.mark.parametrize('T', [1, 31, 127, 128, 129])
def test_rows_past_the_end_say_that_nothing_is_there(T):
    """L and delta have whole tiles of rows, which the kernels after them read without a mask."""
    qkv, o = torch.randn(1, T, 1, 3, 64), torch.randn(1, T, 64)
    L = torch.full((1, 1, model.padded_rows(T)), math.nan)
    delta = L.clone()
    model.attention_forward(qkv, o, L)
    model.attention_backward(qkv, o, L, torch.randn_like(o), torch.empty_like(qkv), delta)
    queries = model.ATTENTION_TILES[4, 64][0][0]
    end = -(-T // queries) * queries
    assert L[..., :T].isfinite().all() and (L[..., T:end] == math.inf).all() and (delta[..., T:end] == 0).all()


def test_operators_change_what_they_say_and_nothing_else():
    qkv, o, L, w = torch.randn(1, 9, 2, 3, 16), torch.randn(1, 9, 32), torch.randn(1, 2, 128), torch.randn(32)
    x, row = torch.randn(1, 9, 32), torch.randn(1, 9)
    for operator, args in (
            (model.add_norm_forward, (x, x, x, w, w, w, w, x.clone(), x.clone(), x.clone(), row, row.clone(), 1e-5)),
            (model.add_norm_backward, (x, row, row, w, w, x, x, x, x.clone(), x.clone(), torch.zeros(4, 4, 32))),
            (model.rotate_packed_, (qkv.clone(), torch.randn(9, 4), torch.randn(9, 4), True)),
            (model.attention_forward, (qkv, o.clone(), L.clone())),
            (model.attention_backward, (qkv, o, L, o, qkv.clone(), L.clone())),
            (model.cross_entropy_, (torch.randn(3, 11), torch.tensor([3, 0, 10]), torch.zeros(3), True))):
        torch.library.opcheck(operator, args)


def test_evaluation_and_generation(capsys, monkeypatch):
    monkeypatch.setattr(model, 'said', set())
    net = random_model(num_hidden_layers=1)
    idx, targets = tokens(net), tokens(net)
    results = []
    for net.kernels in ('triton', 'torch'):
        with torch.no_grad():
            results.append((net(idx, targets, reduction='none')[1], net(idx)[0], net.generate(idx[:, :3], 3, 0)))
        with pytest.MonkeyPatch.context() as patch:     # with gradients wanted, the loss per token is PyTorch's
            patch.setattr(HeadLoss, 'apply', None)
            assert net(idx, targets, reduction='none')[1].requires_grad
    assert capsys.readouterr().out.count("loss by PyTorch, where reduction = 'none'") == 1
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- training -----------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=16, num_attention_heads=1, block_size=12, batch_size=4, max_steps=4, warmup=1, eval_every=9,
             eval_windows=2, kernels='triton')


def test_a_run_resumes_bit_for_bit(config, monkeypatch):
    import train
    from conftest import losses, plain, saved
    small = {**SMALL, 'save_every': 2}
    assert train.main([config('whole', **small)]) == 0
    real = train.save_checkpoint

    def save_and_crash(*args):
        real(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, 'save_checkpoint', save_and_crash)
        assert train.main([config('cut', **small)]) == 130
    assert train.main([config('cut', **small)]) == 0
    a, b = saved('out/whole', 4), saved('out/cut', 4)
    assert plain(a['weights']) == plain(b['weights']) and plain(a['optimizer']) == plain(b['optimizer'])
    assert losses('out/whole') == losses('out/cut')
    with monkeypatch.context() as patch:                # and it is these kernels that trained
        patch.setattr(HeadLoss, 'apply', None)
        with pytest.raises(TypeError):
            train.main([config('none', **small)])


def test_two_processes_train_as_one(config, forked):
    from conftest import losses
    assert forked([config('one', **SMALL)])[0] == [0]
    assert forked([config('two', **SMALL)], world=2)[0] == [0, 0]
    assert losses('out/two') == pytest.approx(losses('out/one'), rel=1e-5)
