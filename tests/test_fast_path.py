"""Edits of the model, as a student makes them: the fast path follows them, or the run stops.

Edits are made by monkeypatching. Here the fast path is that of a CPU; interpreted_kernels.py makes
the same edits with Triton.
"""
import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from configurator import UserError
from model import Attention, GPTNeoX, GPTNeoXConfig, Layer
from support import cpu_attention, fast_path
from test_model import BF16, assert_same_weights, distance, gradients, random_model, tokens
from test_model import seed                             # noqa: F401, a fixture

MESSAGE = 'it does not follow an edit. Train with --kernels=torch'
DTYPES = [torch.float32, BF16, torch.float16]
plain_layer, plain_model = Layer.forward, GPTNeoX.forward

pytestmark = pytest.mark.usefixtures('seed', 'one_thread')


# ------------------------------------------------------------------------------
# Edits of Layer.forward and of GPTNeoX.forward: the CPU's path follows them, Triton's does not

def below_the_if(edit):
    """Layer.forward with an edit of the lines that stand below its `if`."""
    def forward(self, x, cos, sin, branches=None):
        if branches is not None:
            return model.triton_layer(self, x, branches, cos, sin)
        return edit(self, x, cos, sin)
    return forward


@below_the_if
def layer_without_mlp(self, x, cos, sin):
    return x + self.attention(self.input_layernorm(x), cos, sin)


@below_the_if
def layer_with_larger_mlp(self, x, cos, sin):
    attended = self.attention(self.input_layernorm(x), cos, sin)
    return x + attended + 1.05 * self.mlp(self.post_attention_layernorm(x))


@below_the_if
def layer_with_dropout(self, x, cos, sin):
    return F.dropout(plain_layer(self, x, cos, sin), 0.1)


def model_with_z_loss(self, idx, targets=None, reduction='mean'):
    if targets is None or self.fast:                    # the edit stands below this `if`
        return plain_model(self, idx, targets, reduction)
    logits = plain_model(self, idx)[0].float()
    z_loss = 1e-4 * logits.logsumexp(-1).square().mean()
    return None, model.cross_entropy(logits, targets, reduction) + z_loss


OUTER_EDITS = {'a branch is dropped': (Layer, layer_without_mlp),
               'a branch is 5% larger': (Layer, layer_with_larger_mlp),
               'dropout': (Layer, layer_with_dropout),
               'z-loss': (GPTNeoX, model_with_z_loss)}


# ------------------------------------------------------------------------------
# Edits of Attention.forward, which calls self.attend: both paths follow them

def edited_attention(change, change_output=lambda y, qkv: y):
    """Attention.forward with changes before and after self.attend."""
    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = change(self.query_key_value(x).view(B, T, self.num_heads, 3, -1))
        return change_output(self.dense(self.attend(qkv, cos, sin)), qkv)
    return forward


def qk_norm(qkv):
    q, k, v = qkv.unbind(3)
    q, k = q.float(), k.float()                         # as autocast does for norms on a GPU
    return torch.stack((F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:]), v), dim=3)


def qk_norm_in_another_layout(qkv):
    q, k, v = qkv.unbind(3)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return torch.stack((q, k, v)).permute(1, 2, 3, 0, 4)


ATTENTION_EDITS = {
    'QK-norm': edited_attention(qk_norm),
    'QK-norm, strided': edited_attention(qk_norm_in_another_layout),
    'values are added': edited_attention(lambda qkv: qkv, lambda y, qkv: y + qkv[..., 2, :].mean()),
    'dropout': edited_attention(lambda qkv: qkv, lambda y, qkv: F.dropout(y, 0.1))}


# ------------------------------------------------------------------------------
# Edits of causal_attention: no fast path follows them

def attention_with(scale=1.0, window=None, rotate=model.rotate, change_keys=lambda k: k):
    def causal_attention(qkv, cos, sin):
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        q, k = rotate(q, cos, sin), change_keys(rotate(k, cos, sin))
        T, D = q.shape[2:]
        visible = torch.ones(T, T, dtype=torch.bool).tril()
        if window is not None:
            visible = visible.triu(1 - window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale * D**-0.5)
        return y.transpose(1, 2).flatten(2)
    return causal_attention


def attention_with_another_argument(qkv, cos, sin, temperature):
    return attention_with(temperature)(qkv, cos, sin)


INNER_EDITS = {'scores are 5% larger': attention_with(scale=1.05),
               'a window': attention_with(window=8),
               'no rotary': attention_with(rotate=lambda x, cos, sin: x),
               'keys get no gradient': attention_with(change_keys=torch.Tensor.detach)}


# ------------------------------------------------------------------------------

def small_model(**fixed):
    """A model and two rows of tokens."""
    shape = dict(vocab_size=random.choice([40, 97]), hidden_size=32, num_hidden_layers=2,
                 num_attention_heads=2, max_position_embeddings=12, rotary_pct=0.5,
                 use_parallel_residual=random.random() < 0.5)
    net = random_model(GPTNeoXConfig(**(shape | fixed)))
    return net, tokens(net.config), tokens(net.config)


def check(net, kernels='auto', dtype=torch.float32):
    """'' when the check passes for the class and shape of a model, else its message."""
    try:
        fast_path.check(type(net), net.config, kernels, 'cpu', dtype)
    except UserError as error:
        assert MESSAGE in str(error)
        return str(error)
    return ''


def edit_causal_attention(monkeypatch, edited):
    """As an edit of the file does, wherever the function is used."""
    for module in (model, fast_path, cpu_attention):
        monkeypatch.setattr(module, 'causal_attention', edited)


def follows(net, idx, targets, kernels, dtype):
    """Loss and gradients of a path are as near the exact ones as those of the plain path."""
    exact = gradients(net, idx, targets)
    plain = gradients(net, idx, targets, 'torch', dtype)
    fast = gradients(net, idx, targets, kernels, dtype)
    return distance(fast, exact) < 3 * distance(plain, exact) + 1e-5


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('edit', OUTER_EDITS)
def test_edits_around_attention_train_as_written(edit, dtype, monkeypatch):
    owner, forward = OUTER_EDITS[edit]
    net, idx, targets = small_model()
    before = gradients(net, idx, targets)['loss']
    monkeypatch.setattr(owner, 'forward', forward)
    assert check(net, dtype=dtype) == ''
    assert gradients(net, idx, targets, 'auto')['loss'] != before


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('edit', ATTENTION_EDITS)
def test_edits_of_the_attention_module_are_followed(edit, dtype, monkeypatch):
    monkeypatch.setattr(Attention, 'forward', ATTENTION_EDITS[edit])
    net, idx, targets = small_model()
    assert check(net, dtype=dtype) == ''
    if edit != 'dropout':
        assert follows(net, idx, targets, 'auto', dtype)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('edit', INNER_EDITS)
def test_edits_of_causal_attention_are_stopped(edit, dtype, monkeypatch):
    net, idx, targets = small_model()
    assert check(net, dtype=dtype) == ''
    edit_causal_attention(monkeypatch, INNER_EDITS[edit])
    assert 'gradients differ by' in check(net, dtype=dtype)
    assert check(net, 'torch', dtype) == ''


def test_edits_of_both_that_the_fast_path_cannot_run_are_stopped(monkeypatch):
    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = self.query_key_value(x).view(B, T, self.num_heads, 3, -1)
        return self.dense(self.attend(qkv, cos, sin, 0.9))
    net, idx, targets = small_model()
    monkeypatch.setattr(Attention, 'forward', forward)
    edit_causal_attention(monkeypatch, attention_with_another_argument)
    assert 'It fails: ' in check(net)


def test_an_error_in_the_plain_model_stays_that_error(monkeypatch):
    monkeypatch.setattr(Layer, 'forward', lambda self, x, *rest: self.mlp(x[..., 1:]))
    net, idx, targets = small_model()
    with pytest.raises(RuntimeError, match='mat1 and mat2'):
        check(net)


def test_random_numbers_that_torch_does_not_draw_need_the_plain_path(monkeypatch):
    monkeypatch.setattr(Layer, 'forward', lambda self, x, cos, sin:
                        np.random.rand() * plain_layer(self, x, cos, sin))
    net, idx, targets = small_model()
    assert check(net) != ''
    assert check(net, 'torch') == ''


def test_the_check_multiplies_in_full_precision_and_leaves_the_setting():
    torch.set_float32_matmul_precision('medium')
    try:
        assert check(small_model()[0]) == ''
        assert torch.get_float32_matmul_precision() == 'medium'
    finally:
        torch.set_float32_matmul_precision('highest')


def test_no_model_raises_a_false_alarm():
    for _ in range(30):
        heads, size = random.choice([1, 2, 3]), random.choice([4, 8, 16])
        net, *_ = small_model(hidden_size=heads * size, num_attention_heads=heads,
                              vocab_size=random.randint(5, 400),
                              num_hidden_layers=random.randint(1, 4),
                              max_position_embeddings=random.randint(1, 130))
        print(net.config)
        assert check(net, dtype=random.choice(DTYPES)) == ''


def test_the_sequences_of_the_check_are_as_long_as_the_block(monkeypatch):
    """An edit may act on late positions alone."""
    edit_causal_attention(monkeypatch, attention_with(window=100))
    assert check(small_model(max_position_embeddings=90)[0]) == ''
    assert check(small_model(max_position_embeddings=120)[0]) != ''


def test_a_subclass_keeps_its_forward():
    class MyLayer(Layer):
        forward = layer_with_larger_mlp

    class MyModel(GPTNeoX):
        forward = model_with_z_loss
    net = MyModel(small_model()[0].config)
    net.gpt_neox.layers[1] = MyLayer(net.config)
    fast_path.choose(net)
    assert [type(net), type(net.gpt_neox.layers[1])] == [MyModel, MyLayer]
    assert check(net) == ''


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_models_with_a_fast_path_can_be_copied(duplicate):
    net, idx, targets = small_model()
    expected = gradients(net, idx, targets, 'auto')
    twin = duplicate(net)
    assert_same_weights(twin, net)
    assert distance(gradients(twin, idx, targets, 'auto'), expected) == 0


def test_a_copy_computes_with_other_weights_by_the_same_path():
    net, idx, targets = small_model()
    fast_path.choose(net)
    others = {name: p + 0.1 for name, p in net.state_dict().items()}
    twin = fast_path.copy_of(net, GPTNeoX(net.config), others)
    assert twin.fast == net.fast
    assert [layer.attention.attend for layer in twin.gpt_neox.layers] == [
        layer.attention.attend for layer in net.gpt_neox.layers]
    assert not torch.equal(twin(idx)[0], net(idx)[0])
    net.load_state_dict(others)
    assert torch.equal(twin(idx)[0], net(idx)[0])


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_a_run_stops_before_its_first_step_and_trains_on_the_plain_path(dtype, config, monkeypatch,
                                                                        tmp_path, capsys):
    import train
    edit_causal_attention(monkeypatch, INNER_EDITS['a window'])
    run = config('a', max_steps=6, dtype=dtype)
    assert train.main([run]) == 2
    assert MESSAGE in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'a').exists()
    assert train.main([run, '--kernels=torch']) == 0
