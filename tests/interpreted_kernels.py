"""The Triton kernels of model.py against float64. test_kernels.py runs this in another process.

The interpreter (TRITON_INTERPRET=1) runs the programs of a kernel one after another, on numpy
arrays. It finds wrong numbers, but no races. Inputs are random; MODEL_SEED=... repeats a failure.
"""
import math
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

import model
from model import Attention, FlashAttention, GPTNeoX, HeadLoss, add_norm
from support import fast_path
from support.sampling import generate
from test_fast_path import (ATTENTION_EDITS, DTYPES, INNER_EDITS, MESSAGE, OUTER_EDITS, check,
                            edit_causal_attention, edited_attention, follows, small_model)
from test_kernels import compiled_graphs
from test_model import (BF16, assert_same_weights, distance, error, gradients, random_config,
                        reference_attention, tables, tokens)
from test_model import random_model as model_of
from test_model import seed                             # noqa: F401, a fixture

assert model.triton.knobs.runtime.interpret, 'run pytest tests/test_kernels.py'
pytestmark = pytest.mark.usefixtures('seed', 'one_thread')
FP32, FP16 = torch.float32, torch.float16
# of the largest element; the half types round to 2^-11 and 2^-8
TOLERANCE = {FP32: 1e-6, FP16: 1.5e-3, BF16: 1.2e-2}


def exact_bf16():
    """Repair the interpreter, which keeps bfloat16 as its bits in uint16.

    Its dot multiplies those bits as integers. Its conversion from float32 cuts bits off, where GPUs
    round to the nearest even number.
    """
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        bits = t.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def cast_impl(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16
        rounded = np.where(np.isnan(source.data), 0x7fc0, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
    builder.cast_impl = cast_impl


exact_bf16()


def leaves(*tensors):
    """The same numbers twice, as they are and as float64, to compare their gradients."""
    tensors = [t.requires_grad_() for t in tensors]
    return tensors, [t.detach().double().requires_grad_() for t in tensors]


def incoming(kind, like):
    """A gradient as autograd may bring it: dense, one number expanded (of a sum), or strided."""
    if kind == 'stride 0':
        return torch.randn((), dtype=like.dtype).expand_as(like)
    dense = torch.randn_like(like)
    return dense.mT.contiguous().mT if kind == 'strides' else dense


# ------------------------------------------------------------------------------
# AddNorm

@pytest.mark.parametrize('kind', ['dense', 'stride 0', 'strides'])
@pytest.mark.parametrize('stream, branch', [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16),
                                            (FP32, FP16)])
@pytest.mark.parametrize('branches, norms', [(0, 2), (1, 1), (2, 1), (2, 2)])
def test_add_norm(branches, norms, stream, branch, kind):
    B, T, C = random.randint(1, 3), random.randint(1, 40), random.choice([16, 33, 96, 130, 1000])
    inputs = [torch.randn(B, T, C).to(branch) for _ in range(branches)]
    inputs, wide = leaves(torch.randn(B, T, C, dtype=stream) * 2 + 1, *inputs)
    eps = random.choice([1e-5, 1e-2])
    layers = [torch.nn.LayerNorm(C, eps=eps) for _ in range(norms)]
    parameters = [p for layer in layers for p in layer.parameters()]
    for p in parameters:
        torch.nn.init.normal_(p)
    exact = [p.detach().double().requires_grad_() for p in parameters]

    with torch.autocast('cpu', branch, enabled=branch != FP32):
        got = add_norm(inputs[0], inputs[1:], *layers)
    s = sum(wide)
    expected = [s] + [F.layer_norm(s, (C,), w, b, eps) for w, b in zip(exact[::2], exact[1::2])]
    incomings = [incoming(kind, t) for t in got]
    torch.autograd.backward(got, incomings)
    torch.autograd.backward(expected, [g.double() for g in incomings])

    assert [t.dtype for t in got] == [stream] + [branch] * norms
    for a, b in zip(got, expected):
        assert error(a, b) < TOLERANCE[branch]
    for a, b in zip(inputs + parameters, wide + exact):
        assert a.grad.dtype == a.dtype and error(a.grad, b.grad) < TOLERANCE[branch]


def test_add_norm_of_rows_far_from_zero():
    """A rounded mean, or a variance computed as a difference of squares, would be off."""
    x, norm = torch.randn(4, 1, 300) + 1000, torch.nn.LayerNorm(300)
    expected = F.layer_norm(x.double(), (300,))
    assert error(add_norm(x, (), norm)[1], expected) < 1e-4         # x is rounded to 1000 * 2^-24
    x = x.bfloat16()
    expected = F.layer_norm(x.double(), (300,))
    assert error(add_norm(x, (), norm)[1], expected) < TOLERANCE[BF16]


# ------------------------------------------------------------------------------
# FlashAttention

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('D, share', [(64, 0.25), (32, 1.0), (24, 0.5), (128, 0.25), (64, 0)])
def test_rotary_touches_its_dims_only_and_its_inverse_undoes_it(D, share, dtype):
    B, T, H, R = 2, random.randint(1, 40), 3, int(D * share)
    cos, sin = tables(T + 5, D, share)
    qkv = torch.randn(B, T, H, 3, D).to(dtype)
    got = qkv.clone()
    model.rotate_packed_(got, cos[:T], sin[:T], False)
    q_and_k = qkv[..., :2, :].double().transpose(1, 3)                          # (B, 2, H, T, D)
    expected = model.rotate(q_and_k, cos[:T].double(), sin[:T].double()).transpose(1, 3)
    assert error(got[..., :2, :], expected) < TOLERANCE[dtype]
    assert torch.equal(got[..., R:], qkv[..., R:])
    assert torch.equal(got[..., 2, :], qkv[..., 2, :])
    model.rotate_packed_(got, cos[:T], sin[:T], True)
    assert error(got, qkv.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize('dtype, T, D, share, kind', [
    (FP32, 1, 64, 0.25, 'dense'), (FP32, 32, 32, 0.25, 'dense'), (FP32, 33, 64, 0.25, 'stride 0'),
    (FP32, 65, 64, 1.0, 'strides'), (FP32, 100, 20, 0.5, 'dense'), (FP32, 63, 80, 0.25, 'dense'),
    (FP32, 40, 128, 0.25, 'strides'), (FP32, 37, 256, 0.25, 'dense'), (FP32, 50, 8, 0, 'stride 0'),
    (FP16, 130, 64, 0.25, 'dense'), (FP16, 200, 32, 0.25, 'strides'), (FP16, 70, 96, 0.5, 'dense'),
    (BF16, 129, 64, 0.25, 'stride 0'), (BF16, 300, 64, 0.25, 'dense'), (BF16, 64, 16, 0.5, 'dense'),
    (BF16, 150, 128, 0.25, 'strides'), (BF16, 67, 256, 0.25, 'dense'), (BF16, 128, 80, 1, 'dense')])
def test_attention(dtype, T, D, share, kind):
    B, H = random.choice([(1, 2), (2, 1), (2, 2)])
    cos, sin = tables(T, D, share)
    (qkv,), (wide,) = leaves(torch.randn(B, T, H, 3, D).to(dtype))
    got = FlashAttention.apply(qkv.clone(), cos, sin)
    expected = reference_attention(wide, cos, sin)
    gradient = incoming(kind, got)
    got.backward(gradient)
    expected.backward(gradient.double())
    assert got.dtype == dtype and error(got, expected) < TOLERANCE[dtype]
    assert error(qkv.grad, wide.grad) < TOLERANCE[dtype]
    if T > 1:                                           # a token alone has dq = dk = 0
        for i in range(3):
            assert error(qkv.grad[..., i, :], wide.grad[..., i, :]) < TOLERANCE[dtype], 'qkv'[i]


def test_attention_with_large_scores():
    """The largest scores of rows differ by hundreds: unless they are subtracted, exp overflows."""
    cos, sin = tables(50, 64, 0.25)
    scale = torch.tensor([20.0, 20.0, 1.0])[:, None]
    (qkv,), (wide,) = leaves(torch.randn(1, 50, 1, 3, 64) * scale)
    got, expected = FlashAttention.apply(qkv.clone(), cos, sin), reference_attention(wide, cos, sin)
    got.sum().backward()
    expected.sum().backward()
    # scores of 2000 are rounded to 2000 * 2^-24
    assert error(got, expected) < 1e-3 and error(qkv.grad, wide.grad) < 1e-3


def test_attention_computes_in_the_type_of_autocast():
    """A norm before it may return float32, in which the kernels are many times slower."""
    qkv = torch.randn(1, 20, 2, 3, 16, requires_grad=True)
    with torch.autocast('cpu', BF16):
        y = FlashAttention.apply(qkv, *tables(20, 16, 0.5))
    y.sum().backward()
    assert y.dtype == BF16 and qkv.grad.dtype == FP32


@pytest.mark.parametrize('T', [1, 31, 127, 128, 129])
def test_rows_past_the_end_contribute_nothing(T):
    """L and delta have whole tiles of rows, which later kernels read without a mask."""
    qkv, o = torch.randn(1, T, 1, 3, 64), torch.randn(1, T, 64)
    L = torch.full((1, 1, model.padded_rows(T)), math.nan)
    delta = L.clone()
    model.attention_forward(qkv, o, L)
    model.attention_backward(qkv, o, L, torch.randn_like(o), torch.empty_like(qkv), delta)
    queries = model.ATTENTION_TILES[4, 64][0][0]
    end = math.ceil(T / queries) * queries
    assert L[..., :T].isfinite().all()
    assert (L[..., T:end] == math.inf).all() and (delta[..., T:end] == 0).all()


# ------------------------------------------------------------------------------
# HeadLoss

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('N, C, V, rows', [(13, 24, 97, 5), (8, 16, 128, 16384), (5, 40, 33, 5)])
def test_head_loss(N, C, V, rows, dtype, monkeypatch):
    monkeypatch.setattr(model, 'LOSS_ROWS', rows)
    targets, scale = torch.randint(V, (N,)), 2.0**14 if dtype == FP16 else 0.25
    (x, w), (wide_x, wide_w) = leaves(torch.randn(N, C).to(dtype),
                                      torch.randn(V, C).to(dtype) * 0.5)
    got = HeadLoss.apply(x, w, targets, True, 'mean')
    # Half precision rounds the logits. Of those, the loss and its gradient are exact.
    rounded = (x @ w.T).detach().double()
    logits = wide_x @ wide_w.T
    logits = logits + (rounded - logits).detach()
    losses = F.cross_entropy(logits, targets, reduction='none')
    (got * scale).backward()
    (losses.mean() * scale).backward()
    assert got.dtype == FP32 and error(got, losses.mean()) < 1e-6
    for a, b in ((x, wide_x), (w, wide_w)):
        assert a.grad.dtype == dtype and error(a.grad, b.grad) < TOLERANCE[dtype]
    with torch.no_grad():
        assert error(HeadLoss.apply(x, w, targets, False, 'none'), losses) < 1e-6


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_wide_vocabulary_takes_several_blocks(dtype):
    logits, targets = (torch.randn(3, 20001) * 3).to(dtype), torch.randint(20001, (3,))
    losses, wide = torch.empty(3), logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction='none')
    expected.sum().backward()
    model.cross_entropy_(logits, targets, losses, True)     # the logits become their gradient
    assert error(losses, expected) < 1e-6 and error(logits, wide.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize('wrong', [-100, -1, 97, 2**40])
def test_the_loss_of_a_token_that_does_not_exist_is_nan(wrong):
    losses, targets = torch.empty(3), torch.tensor([5, wrong, 0])
    model.cross_entropy_(torch.randn(3, 97), targets, losses, True)
    assert losses.isnan().tolist() == [False, True, False]


def test_nan_stays_nan():
    """With one NaN in one of two sequences, only what depends on it is NaN."""
    x = torch.randn(2, 40, 48)
    x[0, 7, 3] = math.nan
    y = add_norm(x, (), torch.nn.LayerNorm(48))[1]
    assert torch.equal(y.isnan().any(-1), x.isnan().any(-1))
    token, qkv = torch.arange(40), torch.randn(2, 40, 1, 3, 48)
    for which in range(3):
        bad = qkv.clone()
        bad[0, 7, 0, which, 3] = math.nan
        first, second = FlashAttention.apply(bad, *tables(40, 48, 0.25)).isnan().any(-1)
        # rotary may carry a NaN in k to every later query
        expected = token == 7 if which == 0 else token >= 7
        assert not second.any() and torch.equal(first & (token >= 7), expected)
    losses = torch.empty(2)
    logits = torch.tensor([[1, math.nan, 2], [1, 2, 3]])
    model.cross_entropy_(logits, torch.tensor([0, 0]), losses, True)
    assert losses.isnan().tolist() == [True, False]


def test_operators_change_what_they_say_and_nothing_else():
    x, row, w = torch.randn(1, 9, 32), torch.randn(1, 9), torch.randn(32)
    qkv, L = torch.randn(1, 9, 2, 3, 16), torch.randn(1, 2, 128)
    logits, ids = torch.randn(3, 11), torch.tensor([3, 0, 10])
    new = torch.clone
    for operator, args in [
            (model.add_norm_forward, (x, x, x, w, w, w, w, new(x), new(x), new(x), row, new(row),
                                      1e-5)),
            (model.add_norm_backward, (x, row, row, w, w, x, x, x, new(x), new(x),
                                       torch.zeros(4, 4, 32))),
            (model.rotate_packed_, (new(qkv), torch.randn(9, 4), torch.randn(9, 4), True)),
            (model.attention_forward, (qkv, new(x), new(L))),
            (model.attention_backward, (qkv, x, L, x, new(qkv), new(L))),
            (model.cross_entropy_, (logits, ids, torch.zeros(3), True))]:
        torch.library.opcheck(operator, args)


# ------------------------------------------------------------------------------
# The whole model

def random_model(**fixed):
    """A model of two layers, and two rows of tokens."""
    shape = dict(num_hidden_layers=2, max_position_embeddings=random.randint(4, 70))
    net = model_of(random_config(**(shape | fixed)))
    return net, tokens(net.config), tokens(net.config)


@pytest.mark.parametrize('parallel', [True, False])
def test_a_model_trains_on_the_same_gradients(parallel):
    net, idx, targets = random_model(use_parallel_residual=parallel)
    ours = gradients(net, idx, targets, 'triton')
    assert net.fast
    exact = gradients(net.double(), idx, targets)
    for name in exact:
        part = ours[name], exact[name]
        if name.endswith('query_key_value.bias'):       # that of k shifts all scores: gradient 0
            part = [g.view(-1, 3, net.config.head_size)[:, ::2] for g in part]
        assert error(*part) < 2e-5, name                # float32 by PyTorch is off by as much


@pytest.mark.parametrize('dtype', [BF16, FP16])
def test_half_precision_is_as_exact_as_by_pytorch(dtype):
    net, idx, targets = random_model(hidden_size=32, num_attention_heads=2, rotary_pct=0.5)
    exact = gradients(net, idx, targets)
    triton = distance(gradients(net, idx, targets, 'triton', dtype), exact)
    assert 0 < triton < 1.5 * distance(gradients(net, idx, targets, 'torch', dtype), exact) < 0.2


@pytest.mark.parametrize('dtype', [FP32, BF16])
def test_layers_compile_in_two_graphs_and_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(model, 'LOSS_ROWS', 9)
    net, idx, targets = random_model(num_hidden_layers=3, max_position_embeddings=12)
    eager, compiled, graphs = compiled_graphs(net, idx, targets, 'triton', dtype)
    for name in eager:
        assert torch.equal(eager[name], compiled[name]), name
    assert len(graphs) == 4                             # of the first layer, and of all others
    for outside in ('embedding', 'index_put', 'cross_entropy'):
        assert not any(outside in graph for graph in graphs), outside


@torch.no_grad()
def test_evaluation_and_generation():
    net, idx, targets = random_model(num_hidden_layers=1)
    results = []
    for kernels in ('triton', 'torch'):
        fast_path.choose(net, kernels)
        results.append((net(idx, targets, reduction='none')[1], net(idx)[0],
                        generate(net, idx[:, :3], 3, temperature=0)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_losses_that_are_weighted_later_have_the_gradients_of_the_plain_model():
    net, idx, targets = small_model()
    exact = gradients(net, idx, targets)
    fast_path.choose(net, 'triton')
    net.zero_grad()
    net(idx, targets, reduction='none')[1].mean().backward()
    for name, p in net.named_parameters():
        assert error(p.grad, exact[name].double()) < 1e-4 or exact[name].norm() < 1e-5, name


def test_models_with_kernels_keep_their_names_and_can_be_copied():
    net, idx, targets = small_model()
    names = list(net.state_dict())
    expected = gradients(net, idx, targets, 'triton')
    twin = pickle.loads(pickle.dumps(net))
    assert twin.fast and list(twin.state_dict()) == names
    assert_same_weights(twin, net)
    assert distance(gradients(twin, idx, targets, 'triton'), expected) == 0
    fast_path.choose(twin, 'torch')
    assert not twin.fast


# ------------------------------------------------------------------------------
# The check of the fast path

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('edit', OUTER_EDITS)
def test_edits_around_attention_are_stopped(edit, dtype, monkeypatch):
    owner, forward = OUTER_EDITS[edit]
    net, idx, targets = small_model()
    monkeypatch.setattr(owner, 'forward', forward)
    assert 'gradients differ by' in check(net, 'triton', dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('edit', ATTENTION_EDITS)
def test_edits_of_the_attention_module_are_followed(edit, dtype, monkeypatch):
    monkeypatch.setattr(Attention, 'forward', ATTENTION_EDITS[edit])
    net, idx, targets = small_model()
    assert check(net, 'triton', dtype) == ''
    if edit != 'dropout':
        assert follows(net, idx, targets, 'triton', dtype)


@pytest.mark.parametrize('edit', INNER_EDITS)
def test_edits_of_causal_attention_are_stopped(edit, monkeypatch):
    net, idx, targets = small_model()
    edit_causal_attention(monkeypatch, INNER_EDITS[edit])
    assert 'gradients differ by' in check(net, 'triton')


# FlashAttention rotates the projection in place, so what else reads it would read it rotated.
@pytest.mark.parametrize('forward, words', [
    (edited_attention(torch.tanh), 'It fails: .*inplace'),
    (edited_attention(lambda qkv: qkv, lambda y, qkv: y * qkv[..., 0, :].flatten(2)), 'differ by')])
def test_edits_that_read_the_projection_again_are_stopped(forward, words, monkeypatch):
    net, idx, targets = small_model()
    monkeypatch.setattr(Attention, 'forward', forward)
    with pytest.raises(AssertionError, match=words):
        assert check(net, 'triton') == ''


class WithAnotherNorm(GPTNeoX):

    def __init__(self, config):
        super().__init__(config)
        for layer in self.gpt_neox.layers:
            layer.input_layernorm = torch.nn.RMSNorm(config.hidden_size)


def test_another_kind_of_norm_is_stopped(monkeypatch):
    net, *_ = small_model()
    monkeypatch.setattr(fast_path, 'GPTNeoX', WithAnotherNorm)      # as if model.py said so
    assert 'It fails: ' in check(WithAnotherNorm(net.config), 'triton')


def test_a_class_of_ones_own_runs_by_pytorch():
    net = WithAnotherNorm(small_model()[0].config)
    assert 'a class of your own' in fast_path.choose(net, 'triton') and not net.fast
    assert check(net, 'triton') == ''


def test_kernels_that_are_wrong_in_one_type_are_stopped(monkeypatch):
    real = model.attention_backward

    def wrong(qkv, o, L, do, dqkv, delta):
        real(qkv, o, L, do, dqkv, delta)
        if qkv.dtype == BF16:
            dqkv[..., 1, :] = 0
    monkeypatch.setattr(model, 'attention_backward', wrong)
    net, idx, targets = small_model()
    assert check(net, 'triton') == ''
    assert 'Gradients in torch.bfloat16 differ by' in check(net, 'triton', BF16)


def test_no_model_raises_a_false_alarm():
    for _ in range(9):
        heads = random.choice([1, 2])
        net, *_ = small_model(hidden_size=heads * random.choice([4, 16]), num_attention_heads=heads,
                              vocab_size=random.randint(5, 200),
                              max_position_embeddings=random.randint(1, 40))
        print(net.config)
        assert check(net, 'triton', dtype=random.choice(DTYPES)) == ''


# ------------------------------------------------------------------------------
# Training

SMALL = dict(hidden_size=16, num_attention_heads=1, block_size=12, batch_size=4, max_steps=4,
             warmup=1, eval_every=9, eval_windows=2, kernels='triton')


@pytest.mark.parametrize('edit', ['a branch is dropped', 'a branch is 5% larger', 'dropout'])
def test_a_run_stops_before_its_first_step_and_trains_on_the_plain_path(edit, config, monkeypatch,
                                                                        capsys):
    import train
    owner, forward = OUTER_EDITS[edit]
    monkeypatch.setattr(owner, 'forward', forward)
    run = config('a', **SMALL, dtype=random.choice(['fp32', 'bf16']))
    assert train.main([run]) == 2
    assert MESSAGE in capsys.readouterr().err
    assert train.main([run, '--kernels=torch']) == 0


def test_a_run_resumes_bit_for_bit(config, monkeypatch):
    import train
    from conftest import crash, same_run
    small = SMALL | {'save_every': 2}
    assert train.main([config('whole', **small)]) == 0
    crash([config('cut', **small)], 3, monkeypatch)
    assert train.main([config('cut', **small)]) == 0
    same_run('out/whole', 'out/cut', 4)


def test_two_processes_train_as_one(config, forked):
    from conftest import losses
    assert forked([config('one', **SMALL)])[0] == [0]
    assert forked([config('two', **SMALL)], world=2)[0] == [0, 0]
    assert losses('out/two') == pytest.approx(losses('out/one'), rel=1e-5)
