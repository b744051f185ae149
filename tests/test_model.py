"""model.py against transformers and against formulas in float64: the model, sampling, weight files.

Configurations, weights and inputs are random, and differ in every run. A failing test prints its
seed; MODEL_SEED=... repeats it. Triton is tested in test_kernels.py, edits in test_fast_path.py.
"""
import json
import math
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import UserError
import train
from model import GELU_KINDS, PYTHIA, GPTNeoX, GPTNeoXConfig, cross_entropy, rotary_tables
from support import fast_path
from support.cpu_attention import CpuAttention, cpu_attention
from support.huggingface import load_hf, save_hf
from support.sampling import CachedAttention, generate, sample_token

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def seed():
    seed = int(os.environ.get('MODEL_SEED', random.randrange(2**32)))
    print(f'MODEL_SEED={seed}')
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers', reason='it is the model to compare with')


def random_config(**fixed):
    head_size, heads = random.choice([4, 8, 12, 16, 20, 32]), random.randint(1, 4)
    shares = [share for share in (0, 0.25, 0.5, 0.75, 1.0) if int(head_size * share) % 2 == 0]
    drawn = dict(vocab_size=random.randint(5, 150), hidden_size=head_size * heads,
                 num_attention_heads=heads, num_hidden_layers=random.randint(1, 3),
                 max_position_embeddings=random.randint(4, 150),
                 intermediate_size=random.choice([None, random.randint(1, 90)]),
                 rotary_pct=random.choice(shares), rotary_emb_base=random.choice([10000, 500]),
                 layer_norm_eps=random.choice([1e-5, 1e-3]),
                 hidden_act=random.choice(list(GELU_KINDS)),
                 use_parallel_residual=random.random() < 0.5)
    return GPTNeoXConfig(**(drawn | fixed))


def random_model(config):
    """A model whose parameters are far from their initial values: no bias is 0, no norm is 1."""
    model = GPTNeoX(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def tokens(config, B=2, T=None):
    return torch.randint(config.vocab_size, (B, T or config.max_position_embeddings))


def gradients(model, idx, targets, kernels='torch', dtype=torch.float32):
    """{'loss': loss, name: gradient} of a model on one path, with products in dtype."""
    fast_path.choose(model, kernels, 'cpu', dtype)
    model.zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype in (torch.float16, BF16)):
        loss = model(idx, targets)[1]
    loss.backward()
    return {'loss': loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def distance(a, b):
    """|a - b| / |b| of two results of gradients()."""
    difference = sum((a[name].double() - b[name]).square().sum() for name in b)
    return (difference / sum(b[name].double().square().sum() for name in b)).sqrt().item()


def error(got, expected):
    """The largest error, relative to the largest number."""
    assert got.shape == expected.shape
    largest = expected.abs().max().clamp(min=1e-30)
    return ((got.double() - expected).abs().max() / largest).item()


def assert_same_weights(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def model_of_transformers(model, transformers):
    """transformers' model with the same weights. No file is written."""
    config = transformers.GPTNeoXConfig(**vars(model.config))
    theirs = transformers.GPTNeoXForCausalLM(config)
    theirs.load_state_dict({name.replace('embed_out', 'lm_head'): tensor
                            for name, tensor in model.state_dict().items()})
    return theirs.to(model.embed_out.weight.dtype)


# ------------------------------------------------------------------------------
# The model and its gradients

@pytest.mark.plain_model
@pytest.mark.parametrize('kernels', ['torch', 'auto'])
@pytest.mark.parametrize('parallel', [True, False])
@pytest.mark.parametrize('gelu', ['gelu', 'gelu_fast'])
@pytest.mark.parametrize('share', [0.25, 1.0])
def test_logits_loss_and_every_gradient_equal_transformers(kernels, parallel, gelu, share, seed,
                                                           transformers):
    config = random_config(use_parallel_residual=parallel, hidden_act=gelu, rotary_pct=share,
                           hidden_size=32, num_attention_heads=random.choice([1, 2, 4]))
    print(config)
    model = random_model(config).double()
    theirs = model_of_transformers(model, transformers)
    idx, targets = tokens(config), tokens(config)
    logits = theirs(idx).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    expected = {'loss': loss} | {name.replace('lm_head', 'embed_out'): p.grad
                                 for name, p in theirs.named_parameters()}

    ours = gradients(model, idx, targets, kernels)
    assert (model(idx)[0] - logits).abs().max() < 1e-9
    assert ours.keys() == expected.keys()
    for name in expected:
        assert (ours[name] - expected[name]).abs().max() < 1e-9, name
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


def reference_attention(qkv, cos, sin):
    """Causal attention with rotary embedding, formula by formula, on the whole T x T square."""
    B, T, H, _, D = qkv.shape
    R = cos.shape[-1]
    q, k, v = qkv.permute(3, 0, 2, 1, 4)                                        # (B, H, T, D) each

    def rotate(x):
        a, b, rest = x.split([R // 2, R // 2, D - R], dim=-1)
        c, s = cos[:T, :R // 2].double(), sin[:T, :R // 2].double()
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)

    scores = rotate(q) @ rotate(k).mT / math.sqrt(D)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)


def tables(T, D, share):
    """cos and sin (T, R)."""
    return rotary_tables(GPTNeoXConfig(9, D, 1, 1, max_position_embeddings=T, rotary_pct=share))


# bfloat16 also rounds the scores, which are up to 4 here
@pytest.mark.parametrize('dtype, bound', [(torch.double, 1e-12), (torch.float32, 2e-6),
                                          (torch.float16, 5e-3), (BF16, 4e-2)])
@pytest.mark.parametrize('T', [1, 63, 64, 65, 200, 1030])    # above 1,024 it is PyTorch's
def test_attention_on_a_cpu_equals_its_formula_in_float64(T, dtype, bound, seed):
    cos, sin = tables(T, 16, random.choice([0, 0.25, 1.0]))
    if dtype == torch.double:
        cos, sin = cos.double(), sin.double()
    qkv = torch.randn(2, T, 3, 3, 16).to(dtype).requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    y, expected = cpu_attention(qkv, cos, sin), reference_attention(wide, cos, sin)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == qkv.grad.dtype == dtype
    assert error(y, expected) < bound
    assert error(qkv.grad, wide.grad) < bound


def test_attention_on_a_cpu_passes_gradcheck(seed):
    cos, sin = (table.double() for table in tables(70, 8, 0.5))
    qkv = torch.randn(1, 70, 1, 3, 8, dtype=torch.double, requires_grad=True)   # two query blocks
    assert torch.autograd.gradcheck(lambda x: CpuAttention.apply(x, cos, sin), qkv,
                                    fast_mode=True)


@pytest.mark.parametrize('kernels', ['torch', 'auto'])
def test_no_token_sees_the_future(kernels, seed):
    model = random_model(random_config(max_position_embeddings=100)).double()
    fast_path.choose(model, kernels)
    idx = tokens(model.config, B=1)
    changed, cut = idx.clone(), random.randrange(1, 100)
    changed[:, cut:] = tokens(model.config, B=1)[:, cut:]
    assert torch.equal(model(idx)[0][:, :cut], model(changed)[0][:, :cut])


@pytest.mark.parametrize('kernels', ['torch', 'auto'])
@pytest.mark.parametrize('dtype, bound', [(BF16, 0.02), (torch.float16, 0.004)])
def test_half_precision_is_near_float32_and_repeats_bit_for_bit(dtype, bound, kernels, seed):
    config = GPTNeoXConfig(96, 64, 2, 4, max_position_embeddings=130)
    model, idx, targets = GPTNeoX(config), tokens(config), tokens(config)
    exact = gradients(model, idx, targets)
    rounded = gradients(model, idx, targets, kernels, dtype)
    again = gradients(model, idx, targets, kernels, dtype)
    assert rounded['loss'].dtype == torch.float32
    assert all(torch.equal(rounded[name], again[name]) for name in exact)
    assert 0 < distance(rounded, exact) < bound


def test_loss_per_token_averages_to_the_loss(seed):
    model = random_model(random_config())
    idx, targets = tokens(model.config), tokens(model.config)
    logits, loss = model(idx, targets, reduction='none')
    assert logits is None and loss.shape == targets.shape
    expected = -model(idx)[0].log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(idx, targets)[1], loss.mean())


def test_the_loss_of_half_precision_logits_is_summed_in_float32(seed):
    logits, targets = torch.randn(2, 3, 5000).bfloat16(), torch.randint(5000, (2, 3))
    loss = cross_entropy(logits, targets)
    exact = F.cross_entropy(logits.double().view(6, -1), targets.view(6))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------
# Sizes, initial weights, optimizer

# Pythia's model cards; 14m and 31m by the formula 2 V C + L (12 C^2 + 13 C) + 2 C.
PUBLISHED = {'14m': 14067712, '31m': 30494720, '70m': 70426624, '160m': 162322944,
             '410m': 405334016, '1b': 1011781632, '1.4b': 1414647808, '2.8b': 2775208960,
             '6.9b': 6857302016, '12b': 11846072320}


@pytest.mark.plain_model
def test_parameter_counts_are_the_published_ones():
    assert PYTHIA.keys() == PUBLISHED.keys()
    with torch.device('meta'):
        for size, count in PUBLISHED.items():
            assert GPTNeoX(GPTNeoXConfig.pythia(size)).num_params() == count, size


@pytest.mark.plain_model
def test_initial_standard_deviations(seed):
    C, L = 256, 6
    for name, p in GPTNeoX(GPTNeoXConfig(500, C, L, 4)).named_parameters():
        if name.endswith('bias'):
            assert not p.any(), name
        elif 'norm' in name:
            assert (p == 1).all(), name
        else:
            into_residual = name.endswith(('attention.dense.weight', 'dense_4h_to_h.weight'))
            std = 2 / (L * math.sqrt(C)) if into_residual else math.sqrt(2 / (5 * C))
            six_sigma = 6 / math.sqrt(p.numel())
            assert abs(p.mean().item() / std) < six_sigma, name
            assert abs(p.std().item() / std - 1) < six_sigma / math.sqrt(2), name


@pytest.mark.plain_model
def test_flops_follow_the_stated_convention():
    with torch.device('meta'):
        model = GPTNeoX(GPTNeoXConfig.pythia('410m'))
    products = 6 * (405334016 - 50304 * 1024)
    assert model.flops_per_token() == products + 12 * 24 * 1024 * 2048
    assert model.flops_per_token(100) == products + 12 * 24 * 1024 * 100


def test_the_optimizer_is_adamw_and_decays_matrices_only(seed):
    model = random_model(random_config())
    optimizer = train.Method(train.Config(learning_rate=1e-2)).optimizer(model)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    idx = tokens(model.config)
    model(idx, idx)[1].backward()
    optimizer.step()
    # Loshchilov & Hutter 2019, algorithm 2: the first step is g / |g|
    for name, p in model.named_parameters():
        decay = 0.1 if name.endswith('weight') and 'norm' not in name else 0
        g = p.grad.double()
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------
# Generation

def generate_uncached(model, idx, n, **sampling):
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.max_position_embeddings:])
        idx = torch.cat((idx, sample_token(logits[:, -1], **sampling)), dim=1)
    return idx


@pytest.mark.parametrize('prompt', [1, 5, 30])      # the block is 12: all cross it or start beyond
def test_generation_with_a_cache_equals_generation_without(prompt, seed):
    model = random_model(random_config(max_position_embeddings=12, vocab_size=60)).double()
    idx = tokens(model.config, B=3, T=prompt)
    sampling = dict(temperature=0.9, top_k=40, top_p=0.95)
    with torch.no_grad():
        greedy = generate_uncached(model, idx, 20, temperature=0)
        assert torch.equal(generate(model, idx, 20, temperature=0), greedy)
        ours = generate(model, idx, 20, **sampling, generator=torch.Generator().manual_seed(seed))
        expected = generate_uncached(model, idx, 20, **sampling,
                                     generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ours, expected) and torch.equal(ours[:, :prompt], idx)


def test_a_cache_takes_several_tokens_at_once(seed):
    model = random_model(random_config(max_position_embeddings=20)).double()
    idx, parts, done = tokens(model.config), [], 0
    expected = model(idx)[0]
    for layer in model.gpt_neox.layers:
        layer.attention.attend = CachedAttention()
    for part in idx.split([3, 1, 9, 7], dim=1):
        parts.append(model(part, position=done)[0])
        done += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-9)
    with pytest.raises(UserError, match='21 tokens'):
        model(idx[:, :1], position=20)


@pytest.mark.parametrize('sampling, expected', [
    (dict(), [0.5, 0.05, 0.3, 0.15]),
    (dict(temperature=0.5), [0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
    (dict(temperature=0), [1, 0, 0, 0]),
    (dict(top_k=2), [0.625, 0, 0.375, 0]),
    (dict(top_k=99), [0.5, 0.05, 0.3, 0.15]),
    (dict(top_p=0.49), [1, 0, 0, 0]),
    (dict(top_p=0.51), [0.625, 0, 0.375, 0]),       # the token that crosses p is kept
    (dict(top_p=1.0), [0.5, 0.05, 0.3, 0.15]),
    (dict(top_k=2, top_p=0.6), [1, 0, 0, 0])])      # of what top_k left, the first is 0.625
def test_sampling_frequencies(sampling, expected, seed):
    logits = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log()
    before, n = logits.clone(), 20000
    drawn = sample_token(logits.expand(n, -1), **sampling)
    frequencies, expected = torch.bincount(drawn[:, 0], minlength=4) / n, torch.tensor(expected)
    assert ((frequencies > 0) == (expected > 0)).all()
    assert (frequencies - expected).abs().max() < 6 * 0.5 / math.sqrt(n)    # 6 standard errors
    assert torch.equal(logits, before)


# ------------------------------------------------------------------------------
# Hugging Face directories

@pytest.mark.plain_model
def test_transformers_reads_what_we_save(tmp_path, seed, transformers):
    model = random_model(random_config())
    save_hf(model, tmp_path / 'new' / 'model')
    theirs, info = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / 'new' / 'model',
                                                                   output_loading_info=True)
    assert not (info['missing_keys'] or info['unexpected_keys'] or info['mismatched_keys'])
    idx = tokens(model.config)
    logits = theirs.double()(idx).logits
    torch.testing.assert_close(model.double()(idx)[0], logits, rtol=0, atol=1e-9)


@pytest.mark.plain_model
@pytest.mark.parametrize('largest', ['1GB', 256])
def test_we_read_what_transformers_saves_whole_or_in_shards(largest, tmp_path, seed, transformers):
    model = random_model(random_config())
    model_of_transformers(model, transformers).save_pretrained(tmp_path, max_shard_size=largest)
    assert (tmp_path / 'model.safetensors.index.json').exists() == (largest == 256)
    read = load_hf(tmp_path)
    assert read.config == model.config
    assert_same_weights(read, model)


@pytest.fixture
def saved(tmp_path, seed):
    """A model, its directory, and its tensors, for tests that write them back changed."""
    model = random_model(random_config(num_hidden_layers=2))
    save_hf(model, tmp_path / 'm')
    return model, tmp_path / 'm', safetensors.torch.load_file(tmp_path / 'm/model.safetensors')


def change_config(path, **changes):
    raw = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps(raw | changes))


def test_saving_and_loading_change_nothing(saved):
    model, path, _ = saved
    read = load_hf(path)
    assert_same_weights(read, model)
    assert read.config == model.config
    assert torch.equal(read.cos, model.cos) and torch.equal(read.sin, model.sin)
    assert all(p.requires_grad for p in read.parameters())
    save_hf(read, path.parent / 'again', files={'tokenizer.json': b'{}'})
    names = sorted(os.listdir(path.parent / 'again'))
    assert names == ['config.json', 'model.safetensors', 'tokenizer.json']
    for name in names[:2]:
        assert (path.parent / 'again' / name).read_bytes() == (path / name).read_bytes()


def test_half_precision_is_saved_as_it_is_and_read_as_float32(tmp_path, seed):
    model = random_model(random_config()).half()
    save_hf(model, tmp_path / 'm', eot=3, dtype=torch.float16)
    raw = json.loads((tmp_path / 'm/config.json').read_text())
    assert raw['torch_dtype'] == 'float16' and raw['bos_token_id'] == raw['eos_token_id'] == 3
    read = load_hf(tmp_path / 'm')
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert_same_weights(read, model.float())


@pytest.mark.parametrize('edit, words', [
    ('norm', 'GPTNeoXForCausalLM differ by'), ('gelu', 'GPTNeoXForCausalLM differ by'),
    ('extra', 'has no gpt_neox.extra')])
def test_what_transformers_would_not_compute_is_not_exported(edit, words, tmp_path, seed):
    model = random_model(random_config(hidden_act='gelu', hidden_size=32, num_attention_heads=2))
    if edit == 'norm':
        for layer in model.gpt_neox.layers:                         # a norm of another kind
            layer.input_layernorm.forward = lambda x: F.rms_norm(x, x.shape[-1:])
    elif edit == 'gelu':
        for layer in model.gpt_neox.layers:
            layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.dense_4h_to_h(
                F.relu(mlp.dense_h_to_4h(x))**2)
    else:
        model.gpt_neox.extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=words):
        save_hf(model, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def write_bin(path, tensors, shards=1):
    """Replace model.safetensors by one pytorch_model.bin or by shards and their index."""
    (path / 'model.safetensors').unlink(missing_ok=True)
    if shards == 1:
        torch.save(tensors, path / 'pytorch_model.bin')
        return
    files = {name: f'pytorch_model-{i % shards + 1}.bin' for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: t for name, t in tensors.items() if files[name] == file}, path / file)
    index = {'metadata': {}, 'weight_map': files}
    (path / 'pytorch_model.bin.index.json').write_text(json.dumps(index))


@pytest.mark.parametrize('shards', [1, 3])
def test_old_bin_files_and_their_buffers(shards, saved):
    model, path, tensors = saved
    for i in range(2):
        tensors[f'gpt_neox.layers.{i}.attention.bias'] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors[f'gpt_neox.layers.{i}.attention.masked_bias'] = torch.tensor(-1e9)
        tensors[f'gpt_neox.layers.{i}.attention.rotary_emb.inv_freq'] = torch.ones(4)
    write_bin(path, tensors, shards)
    assert_same_weights(load_hf(path), model)


def test_names_of_transformers_5(saved):
    model, path, tensors = saved
    tensors['lm_head.weight'] = tensors.pop('embed_out.weight')
    safetensors.torch.save_file(tensors, path / 'model.safetensors')
    share, base = model.config.rotary_pct, model.config.rotary_emb_base
    change_config(path, rotary_pct=None, rotary_emb_base=None, rope_parameters={
        'rope_type': 'default', 'rope_theta': base, 'partial_rotary_factor': share})
    assert_same_weights(load_hf(path), model)
    assert load_hf(path).config == model.config


def test_dropout_is_ignored_with_a_note(saved, capsys):
    model, path, _ = saved
    change_config(path, attention_dropout=0.1, hidden_dropout=0.0)
    assert_same_weights(load_hf(path), model)
    note = f'{path}/config.json: attention_dropout = 0.1 is ignored. This model has no dropout.\n'
    assert capsys.readouterr().out == note


# ------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize('fields, words', [
    (dict(hidden_size=30), 'hidden_size 30 is not a multiple of num_att'),
    (dict(hidden_size=32, rotary_pct=0.4), 'rotates 3 of 8 dims.*even'),
    (dict(rotary_pct=1.5), 'rotary_pct 1.5'),
    (dict(rotary_emb_base=0), 'rotary_emb_base'),
    (dict(hidden_act='relu'), "hidden_act is 'relu'.*gelu_fast"),
    (dict(num_hidden_layers=0), 'num_hidden_layers is 0'),
    (dict(vocab_size=2.5), 'vocab_size is 2.5'),
    (dict(layer_norm_eps='small'), "layer_norm_eps is 'small'")])
def test_impossible_configurations(fields, words):
    with pytest.raises(UserError, match=words):
        GPTNeoXConfig.pythia('14m', **fields)
    with pytest.raises(UserError, match="'3b'.*2.8b"):
        GPTNeoXConfig.pythia('3b')


def test_sequences_that_are_too_long_or_empty(seed):
    model = GPTNeoX(random_config(max_position_embeddings=7))
    model(tokens(model.config, T=7))
    with pytest.raises(UserError, match='8 tokens.*block size 7'):
        model(tokens(model.config, T=8))
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(UserError, match='hold no token'):
            model(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize('sampling', [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0),
                                      dict(top_p=1.1)])
def test_impossible_sampling(sampling):
    with pytest.raises(UserError, match=f'{list(sampling)[0]} .* must be'):
        sample_token(torch.zeros(1, 4), **sampling)


def fails_to_load(path, *words):
    """load_hf raises one UserError that contains all words -> its message."""
    with pytest.raises(UserError) as error:
        load_hf(path)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit_are_named(saved):
    _, path, tensors = saved
    del tensors['gpt_neox.layers.0.attention.dense.bias']
    tensors['gpt_neox.layers.7.attention.dense.bias'] = torch.ones(3)
    tensors['gpt_neox.final_layer_norm.bias'] = torch.ones(1, 2, 3)
    safetensors.torch.save_file(tensors, path / 'model.safetensors')
    fails_to_load(path, f'{path}: the weights do not fit', 'layers.0.attention.dense.bias',
                  'layers.7.attention.dense.bias', 'final_layer_norm.bias')
    write_bin(path, {'model': tensors})
    fails_to_load(path, 'pytorch_model.bin: model is not a tensor')


def test_a_model_without_its_head_is_one_line(saved):
    _, path, tensors = saved
    tensors = {name.removeprefix('gpt_neox.'): tensor for name, tensor in tensors.items()}
    del tensors['embed_out.weight']
    safetensors.torch.save_file(tensors, path / 'model.safetensors')
    message = fails_to_load(path, str(path), 'embed_out.weight is missing', 'GPTNeoXForCausalLM')
    assert '\n' not in message


@pytest.mark.parametrize('changes, words', [
    (dict(model_type='llama'), "model_type is 'llama'"),
    (dict(rope_scaling={'type': 'linear', 'factor': 2.0}), "rope_type is 'linear'"),
    (dict(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e4}), "rope_type is 'yarn'"),
    (dict(rope_parameters=[1]), 'rotary parameters'),
    (dict(tie_word_embeddings=True), 'tie_word_embeddings is True'),
    (dict(attention_bias=False), 'attention_bias is False'),
    (dict(hidden_act='silu'), "hidden_act is 'silu'"),
    (dict(hidden_size=None), 'hidden_size is None'),
    (dict(rotary_pct='all'), "rotary_pct is 'all'")])
def test_other_architectures_are_refused_and_the_file_is_named(changes, words, saved):
    _, path, _ = saved
    change_config(path, **changes)
    fails_to_load(path, f'{path}/config.json: ', words)


def test_missing_and_broken_directories(saved):
    _, path, _ = saved
    fails_to_load(path / 'absent', 'absent/config.json')
    text = (path / 'config.json').read_text()
    for broken in (text[:-9], '[]', '[' * 10**5, '{"model_type": "gpt_neox"}', '\ud800'):
        (path / 'config.json').write_text(broken, errors='surrogatepass')
        fails_to_load(path, f'{path}/config.json: ')
    (path / 'config.json').write_text(text)
    (path / 'model.safetensors').unlink()
    fails_to_load(path, 'there is no model.safetensors')


@pytest.mark.parametrize('file', ['gone.safetensors', '../model.safetensors', '/etc/passwd', '..',
                                  '', 7])
def test_an_index_leads_to_files_of_its_directory_only(file, saved):
    _, path, tensors = saved
    (path / 'model.safetensors').rename(path / 'a.safetensors')
    safetensors.torch.save_file(tensors, path.parent / 'model.safetensors')     # must not be read
    files = {name: 'a.safetensors' for name in tensors} | {'embed_out.weight': file}
    (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': files}))
    fails_to_load(path, str(path))
    (path / 'model.safetensors.index.json').write_text('{}')
    fails_to_load(path, 'there is no weight_map')


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_truncated_files(kind, saved):
    _, path, tensors = saved
    if kind == 'bin':
        write_bin(path, tensors)
    file = next(path.glob(f'*.{kind}'))
    whole = file.read_bytes()
    for length in (0, 5, random.randrange(6, len(whole)), len(whole) - 1):
        file.write_bytes(whole[:length])
        fails_to_load(path, f'{file}: damaged')


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), 'w')


def test_weights_that_are_not_plain_numbers(saved):
    model, path, tensors = saved
    head = tensors['embed_out.weight']
    scale = dict(scale=0.1, zero_point=0, dtype=torch.qint8)
    for wrong in (head.to(torch.int8), head.to(torch.complex64), head.to_sparse(), head.to('meta'),
                  torch.quantize_per_tensor(head, **scale), 'x'):
        write_bin(path, {**tensors, 'embed_out.weight': wrong})
        fails_to_load(path, 'embed_out.weight is not a tensor of floating-point numbers')
    for wrong in (math.nan, math.inf):
        write_bin(path, {**tensors, 'embed_out.weight': torch.full_like(head, wrong)})
        fails_to_load(path, 'the weights contain NaN or infinity')
    write_bin(path, {**tensors, 1: head})
    fails_to_load(path, 'Unexpected key')
    write_bin(path, [head])
    fails_to_load(path, 'found list, not tensors')
    for dtype in (torch.float16, torch.float64, torch.float8_e4m3fn):
        write_bin(path, {**tensors, 'embed_out.weight': head.to(dtype)})
        load_hf(path)


@pytest.mark.parametrize('changes, expected', [
    (dict(vocab_size=2**25), 'vocab_size'), (dict(num_hidden_layers=10**5), 'layers'),
    (dict(use_parallel_residual='no'), 'use_parallel_residual'),
    (dict(hidden_size=True), 'hidden_size')])
def test_a_shape_that_cannot_be(changes, expected):
    with pytest.raises(UserError, match=expected):
        GPTNeoXConfig(**changes)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(saved):
    _, path, tensors = saved
    target = path / 'it_ran'
    pickle.loads(pickle.dumps(Malicious(target))).close()
    assert target.exists()                              # it runs where pickles are trusted
    target.unlink()
    write_bin(path, tensors | {'embed_out.weight': Malicious(target)})
    fails_to_load(path, 'pytorch_model.bin: damaged, truncated, or not only tensors (Unpick')
    assert not target.exists()


def test_nothing_is_overwritten(saved):
    model, path, _ = saved
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for taken in (path, path / 'config.json'):
        with pytest.raises(UserError, match='already exists'):
            save_hf(model, taken)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (path.parent / 'empty').mkdir()
    save_hf(model, path.parent / 'empty')
    assert_same_weights(load_hf(path.parent / 'empty'), model)


def test_a_failed_save_leaves_nothing(tmp_path, seed, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save', full)
    with pytest.raises(OSError, match='No space'):
        save_hf(GPTNeoX(random_config()), tmp_path / 'm')
    assert os.listdir(tmp_path) == []
