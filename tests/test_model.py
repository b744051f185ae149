"""model.py against transformers' GPTNeoXForCausalLM, its file formats both ways, sampling, and bad input.

Configurations and weights are drawn anew in every run; a failing test prints its seed, and MODEL_SEED=...
repeats it.
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
from model import (GELU_KINDS, PYTHIA, BlockedAttention, GPTNeoX, GPTNeoXConfig, ModelError, SplitHeads,
                   configure_optimizer, cross_entropy, load_hf, rotary_tables, sample_token, save_hf)

torch.set_num_threads(2)


@pytest.fixture
def seed():
    seed = int(os.environ.get('MODEL_SEED', random.randrange(2**32)))
    print(f'MODEL_SEED={seed}')
    random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers', reason='the implementation to compare with is missing')


def random_config(**fixed):
    head_size, heads = random.choice([4, 8, 12, 16, 20, 32]), random.randint(1, 4)
    pct = random.choice([pct for pct in (0, 0.25, 0.5, 0.75, 1.0) if int(head_size * pct) % 2 == 0])
    drawn = dict(vocab_size=random.randint(5, 150), hidden_size=head_size * heads, num_attention_heads=heads,
                 num_hidden_layers=random.randint(1, 3), max_position_embeddings=random.randint(4, 150),
                 intermediate_size=random.choice([None, random.randint(1, 90)]), rotary_pct=pct,
                 rotary_emb_base=random.choice([10000, 500]), layer_norm_eps=random.choice([1e-5, 1e-3]),
                 hidden_act=random.choice(list(GELU_KINDS)), use_parallel_residual=random.random() < 0.5)
    return GPTNeoXConfig(**{**drawn, **fixed})


def random_model(config):
    """Every parameter far from its initial value, so that no bias or norm is trivially 0 or 1."""
    model = GPTNeoX(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def tokens(config, B=2, T=None):
    return torch.randint(config.vocab_size, (B, T or config.max_position_embeddings))


def theirs_of(model, transformers):
    """transformers' model with the same weights, built in memory: no file format involved."""
    c = model.config
    hf = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, intermediate_size=c.intermediate_size,
        hidden_act=c.hidden_act, rotary_pct=c.rotary_pct, rotary_emb_base=c.rotary_emb_base,
        layer_norm_eps=c.layer_norm_eps, max_position_embeddings=c.max_position_embeddings,
        use_parallel_residual=c.use_parallel_residual))
    hf.load_state_dict({k.replace('embed_out', 'lm_head'): v for k, v in model.state_dict().items()})
    return hf.to(model.embed_out.weight.dtype)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- the function and its gradient --------------------------------------------------------------------------

@pytest.mark.parametrize('repeat', range(12))
def test_logits_loss_and_every_gradient_equal_transformers(repeat, seed, transformers):
    config = random_config(use_parallel_residual=repeat % 2 == 0)
    print(config)
    ours = random_model(config).double()
    theirs = theirs_of(ours, transformers)
    idx, targets = tokens(config), tokens(config)
    logits = theirs(idx).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert (ours(idx)[0] - logits).abs().max() < 1e-9
    assert (ours(idx, targets)[1] - loss).abs() < 1e-9
    ours(idx, targets)[1].backward()
    loss.backward()
    gradients = {k.replace('lm_head', 'embed_out'): p.grad for k, p in theirs.named_parameters()}
    assert gradients.keys() == {k for k, _ in ours.named_parameters()}
    assert max(g.abs().max() for g in gradients.values()) > 1e-3        # the comparison below is of something
    for name, p in ours.named_parameters():
        assert (p.grad - gradients[name]).abs().max() < 1e-9, name


def test_the_operations_pass_gradcheck(seed):
    config = random_config(hidden_size=8, num_attention_heads=1, rotary_pct=0.5, max_position_embeddings=70)
    cos, sin = (t.double() for t in rotary_tables(config))
    qkv = torch.randn(1, 70, 1, 3, 8, dtype=torch.double, requires_grad=True)   # two blocks of queries
    assert torch.autograd.gradcheck(lambda x: BlockedAttention.apply(SplitHeads.apply(x, cos, sin)), qkv)


@pytest.mark.parametrize('T', [1, 63, 64, 65, 200])
def test_blocked_attention_equals_sdpa(T, seed):
    qkv = torch.randn(3, 2, 3, T, 8, dtype=torch.double, requires_grad=True)
    dy = torch.randn(2, 3, T, 8, dtype=torch.double)
    expected = F.scaled_dot_product_attention(*qkv, is_causal=True)
    gradient, = torch.autograd.grad(expected, qkv, dy)
    got = BlockedAttention.apply(qkv)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, qkv, dy)[0], gradient, rtol=0, atol=1e-12)


def test_long_sequences_take_the_other_attention_and_agree(seed):
    model = random_model(random_config(num_hidden_layers=1, max_position_embeddings=1030)).double()
    idx = tokens(model.config, B=1)
    torch.testing.assert_close(model(idx)[0][:, :1024], model(idx[:, :1024])[0], rtol=0, atol=1e-9)


def test_no_token_sees_the_future(seed):
    model = random_model(random_config(max_position_embeddings=100)).double()
    idx = tokens(model.config, B=1)
    cut = random.randrange(1, 100)
    other = idx.clone()
    other[:, cut:] = tokens(model.config, B=1)[:, cut:]
    assert torch.equal(model(idx)[0][:, :cut], model(other)[0][:, :cut])


def test_bf16_autocast_is_near_float32_and_repeats_bit_for_bit(seed):
    config = GPTNeoXConfig(96, 64, 2, 4, max_position_embeddings=130)
    model, idx, targets = GPTNeoX(config), tokens(config), tokens(config)

    def gradients(dtype):
        model.zero_grad()
        with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
            loss = model(idx, targets)[1]
        loss.backward()
        assert loss.dtype == torch.float32
        return torch.cat([loss.detach()[None]] + [p.grad.flatten() for p in model.parameters()])

    exact, rounded = gradients(torch.float32), gradients(torch.bfloat16)
    assert torch.equal(exact, gradients(torch.float32)) and torch.equal(rounded, gradients(torch.bfloat16))
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_loss_per_token_averages_to_the_loss(seed):
    model = random_model(random_config())
    idx, targets = tokens(model.config), tokens(model.config)
    logits, loss = model(idx, targets, reduction='none')
    assert logits is None and loss.shape == targets.shape
    expected = -model(idx)[0].log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(idx, targets)[1], loss.mean())


def test_half_precision_logits_are_summed_in_float32(seed):
    logits, targets = torch.randn(2, 3, 5000).bfloat16(), torch.randint(5000, (2, 3))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(logits.double().view(6, -1), targets.view(6))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)     # bfloat16 sums are off by 1e-3


# --- sizes, initialisation, optimizer -----------------------------------------------------------------------

# Published totals: Pythia's model cards (14m, 31m: the same formula, 2 V d + L (12 d^2 + 13 d) + 2 d).
PUBLISHED = {'14m': 14067712, '31m': 30494720, '70m': 70426624, '160m': 162322944, '410m': 405334016,
             '1b': 1011781632, '1.4b': 1414647808, '2.8b': 2775208960, '6.9b': 6857302016, '12b': 11846072320}


def test_parameter_counts_are_the_published_ones():
    assert PYTHIA.keys() == PUBLISHED.keys()
    for size, count in PUBLISHED.items():
        with torch.device('meta'):
            assert GPTNeoX(GPTNeoXConfig.pythia(size)).num_params() == count, size


def test_state_dict_has_exactly_the_names_of_the_files():
    with torch.device('meta'):
        names = set(GPTNeoX(GPTNeoXConfig.pythia('410m')).state_dict())
    per_layer = [f'{part}.{kind}' for kind in ('weight', 'bias') for part in (
        'input_layernorm', 'post_attention_layernorm', 'attention.query_key_value', 'attention.dense',
        'mlp.dense_h_to_4h', 'mlp.dense_4h_to_h')]
    assert names == {f'gpt_neox.layers.{i}.{name}' for i in range(24) for name in per_layer} | {
        'gpt_neox.embed_in.weight', 'gpt_neox.final_layer_norm.weight', 'gpt_neox.final_layer_norm.bias',
        'embed_out.weight'}


def test_initial_standard_deviations(seed):
    C, L = 256, 6
    for name, p in GPTNeoX(GPTNeoXConfig(500, C, L, 4)).named_parameters():
        if name.endswith('bias'):
            assert not p.any(), name
        elif 'layernorm' in name or 'layer_norm' in name:
            assert (p == 1).all(), name
        else:
            wang = name.endswith(('attention.dense.weight', 'dense_4h_to_h.weight'))
            std = 2 / (L * math.sqrt(C)) if wang else math.sqrt(2 / (5 * C))
            assert abs(p.std().item() / std - 1) < 6 / math.sqrt(2 * p.numel()), name     # 6 standard errors
            assert abs(p.mean().item()) < 6 * std / math.sqrt(p.numel()), name


def test_flops_follow_the_stated_convention():
    with torch.device('meta'):
        model = GPTNeoX(GPTNeoXConfig.pythia('410m'))
    assert model.flops_per_token() == 6 * (405334016 - 50304 * 1024) + 12 * 24 * 1024 * 2048
    assert model.flops_per_token() - model.flops_per_token(1024) == 12 * 24 * 1024 * 1024


def test_optimizer_decays_matrices_only_and_equals_plain_adamw(seed):
    model = random_model(random_config())
    optimizer = configure_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.1, 'cpu')
    decayed = {id(p) for p in optimizer.param_groups[0]['params']}
    assert [g['weight_decay'] for g in optimizer.param_groups] == [0.1, 0]
    assert decayed == {id(p) for n, p in model.named_parameters() if n.endswith('weight') and 'norm' not in n}
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    idx = tokens(model.config)
    model(idx, idx)[1].backward()
    optimizer.step()
    for name, p in model.named_parameters():    # Loshchilov & Hutter 2019, algorithm 2: at first g/|g|
        g = p.grad.double()
        expected = before[name] * (1 - 1e-2 * (0.1 if id(p) in decayed else 0)) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


# --- Hugging Face directories -------------------------------------------------------------------------------

def test_what_we_save_transformers_reads(tmp_path, seed, transformers):
    ours = random_model(random_config())
    save_hf(ours, tmp_path / 'new' / 'model')
    assert sorted(os.listdir(tmp_path / 'new')) == ['model']                # no temporary directory stays
    theirs, info = transformers.GPTNeoXForCausalLM.from_pretrained(
        tmp_path / 'new/model', output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    idx = tokens(ours.config)
    torch.testing.assert_close(ours.double()(idx)[0], theirs.double()(idx).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize('shards', ['one file', 'sharded'])
def test_what_transformers_saves_we_read(shards, tmp_path, seed, transformers):
    ours = random_model(random_config())
    theirs = theirs_of(ours, transformers)
    theirs.save_pretrained(tmp_path, max_shard_size=256 if shards == 'sharded' else '1GB')
    assert (tmp_path / 'model.safetensors.index.json').exists() == (shards == 'sharded')
    read = load_hf(tmp_path)
    assert read.config == ours.config
    assert_same_weights(read, ours)
    idx = tokens(ours.config)
    torch.testing.assert_close(read.double()(idx)[0], theirs.double()(idx).logits, rtol=0, atol=1e-9)


def test_save_then_load_changes_nothing(tmp_path, seed):
    model = random_model(random_config())
    save_hf(model, tmp_path / 'a')
    read = load_hf(tmp_path / 'a')
    assert_same_weights(model, read)
    assert read.config == model.config and all(p.requires_grad for p in read.parameters())
    assert torch.equal(read.cos, model.cos) and torch.equal(read.sin, model.sin)
    save_hf(model, tmp_path / 'a2')
    assert (tmp_path / 'a/model.safetensors').read_bytes() == (tmp_path / 'a2/model.safetensors').read_bytes()


def test_config_json_has_the_old_names_and_the_dtype(tmp_path, seed):
    model = random_model(random_config()).half()
    save_hf(model, tmp_path / 'a')
    raw = json.loads((tmp_path / 'a/config.json').read_text())
    assert raw['rotary_pct'] == model.config.rotary_pct
    assert raw['rotary_emb_base'] == model.config.rotary_emb_base
    assert raw['torch_dtype'] == 'float16' and raw['bos_token_id'] == raw['eos_token_id'] == 0
    assert raw['architectures'] == ['GPTNeoXForCausalLM'] and raw['tie_word_embeddings'] is False
    assert 'embed_out.weight' in safetensors.torch.load_file(tmp_path / 'a/model.safetensors')
    assert {p.dtype for p in load_hf(tmp_path / 'a').parameters()} == {torch.float32}
    assert_same_weights(load_hf(tmp_path / 'a'), model.float())


@pytest.fixture
def saved(tmp_path, seed):
    """A saved model, its directory, and its tensors to write back altered."""
    model = random_model(random_config(num_hidden_layers=2))
    save_hf(model, tmp_path / 'm')
    return model, tmp_path / 'm', safetensors.torch.load_file(tmp_path / 'm/model.safetensors')


def write_bin_shards(path, tensors, shards=1):
    (path / 'model.safetensors').unlink()
    if shards == 1:
        return torch.save(tensors, path / 'pytorch_model.bin')
    files = {name: f'pytorch_model-{i % shards + 1}-of-{shards}.bin' for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: t for name, t in tensors.items() if files[name] == file}, path / file)
    (path / 'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': files}))


@pytest.mark.parametrize('shards', [1, 3])
def test_old_bin_files_and_their_buffers(shards, saved):
    model, path, tensors = saved
    for i in range(2):
        tensors[f'gpt_neox.layers.{i}.attention.bias'] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors[f'gpt_neox.layers.{i}.attention.masked_bias'] = torch.tensor(-1e9)
        tensors[f'gpt_neox.layers.{i}.attention.rotary_emb.inv_freq'] = torch.ones(4)
    write_bin_shards(path, tensors, shards)
    assert_same_weights(load_hf(path), model)


def test_head_under_its_other_name(saved):
    model, path, tensors = saved
    tensors['lm_head.weight'] = tensors.pop('embed_out.weight')
    safetensors.torch.save_file(tensors, path / 'model.safetensors')
    assert_same_weights(load_hf(path), model)


def test_both_rope_spellings(saved):
    model, path, _ = saved
    raw = json.loads((path / 'config.json').read_text())
    pct, base = raw.pop('rotary_pct'), raw.pop('rotary_emb_base')
    raw['rope_parameters'] = {'rope_type': 'default', 'rope_theta': base, 'partial_rotary_factor': pct}
    (path / 'config.json').write_text(json.dumps(raw))
    assert load_hf(path).config == model.config


def test_loaded_weights_do_not_hang_on_the_file(saved):
    model, path, tensors = saved
    read = load_hf(path)
    (path / 'model.safetensors').write_bytes(b'\0' * (path / 'model.safetensors').stat().st_size)
    assert_same_weights(read, model)


# --- bad input ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fields, words', [
    (dict(hidden_size=30, num_attention_heads=4), ['hidden_size 30', 'num_attention_heads 4']),
    (dict(hidden_size=32, num_attention_heads=4, rotary_pct=0.4), ['rotary_pct 0.4', '3 dims', 'even']),
    (dict(rotary_pct=1.5), ['rotary_pct 1.5']),
    (dict(hidden_act='relu'), ['relu', 'gelu_fast']),
    (dict(num_hidden_layers=0, vocab_size=2.5), ['num_hidden_layers is 0', 'vocab_size is 2.5']),
    (dict(layer_norm_eps=0), ['layer_norm_eps']),
])
def test_impossible_configurations(fields, words):
    with pytest.raises(ModelError) as error:
        GPTNeoXConfig(**fields)
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


def test_unknown_pythia_size():
    with pytest.raises(ModelError, match="'3b'.*2.8b"):
        GPTNeoXConfig.pythia('3b')


def test_too_long_a_sequence(seed):
    model = GPTNeoX(random_config(max_position_embeddings=7))
    model(tokens(model.config, T=7))
    with pytest.raises(ModelError, match='8 tokens.*block size 7'):
        model(tokens(model.config, T=8))


def test_missing_extra_and_misshapen_tensors_are_listed_together(saved):
    _, path, tensors = saved
    del tensors['gpt_neox.layers.0.attention.dense.bias']
    del tensors['embed_out.weight']
    tensors['gpt_neox.layers.7.attention.dense.bias'] = torch.ones(3)
    tensors['gpt_neox.final_layer_norm.bias'] = torch.ones(3)
    tensors['gpt_neox.final_layer_norm.weight'] = tensors['gpt_neox.final_layer_norm.weight'].to(torch.int8)
    safetensors.torch.save_file(tensors, path / 'model.safetensors')
    with pytest.raises(ModelError) as error:
        load_hf(path)
    for words in ('missing gpt_neox.layers.0.attention.dense.bias', 'missing embed_out.weight',
                  'unexpected gpt_neox.layers.7.attention.dense.bias (3,)',
                  'gpt_neox.final_layer_norm.bias is torch.float32 (3,)',
                  'gpt_neox.final_layer_norm.weight is torch.int8'):
        assert words in str(error.value)


@pytest.mark.parametrize('change, words', [
    ({'model_type': 'llama'}, "model_type is 'llama'"),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_type is 'linear'"),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, "rope_type is 'yarn'"),
    ({'hidden_act': 'silu'}, "hidden_act is 'silu'"),
    ({'tie_word_embeddings': True}, 'tie_word_embeddings is True'),
    ({'attention_bias': False}, 'attention_bias is False'),
    ({'hidden_size': None}, 'hidden_size'),
])
def test_other_architectures_are_refused(change, words, saved):
    _, path, _ = saved
    raw = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps({**raw, **change}))
    with pytest.raises(ModelError) as error:
        load_hf(path)
    assert words in str(error.value)


def test_missing_and_broken_config_and_weights(saved):
    _, path, _ = saved
    with pytest.raises(ModelError, match='config.json'):
        load_hf(path / 'absent')
    text = (path / 'config.json').read_text()
    for broken in (text[:-9], '[]', '{"model_type": "gpt_neox"}'):
        (path / 'config.json').write_text(broken)
        with pytest.raises(ModelError, match='config.json'):
            load_hf(path)
    (path / 'config.json').write_text(text)
    (path / 'model.safetensors').unlink()
    with pytest.raises(ModelError, match='no model.safetensors'):
        load_hf(path)


@pytest.mark.parametrize('file, words', [('gone.safetensors', 'gone.safetensors, which is not there'),
                                         ('../model.safetensors', 'of the same directory'),
                                         ('/etc/passwd', 'of the same directory'),
                                         ('..', 'of the same directory'), (7, 'weight_map')])
def test_indices_that_lead_elsewhere(file, words, saved):
    _, path, tensors = saved
    (path / 'model.safetensors').rename(path / 'a.safetensors')
    safetensors.torch.save_file(tensors, path.parent / 'model.safetensors')     # there, and not to be read
    index = {name: 'a.safetensors' for name in tensors} | {'embed_out.weight': file}
    (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
    with pytest.raises(ModelError) as error:
        load_hf(path)
    assert words in str(error.value)


def test_a_tensor_in_two_shards(saved):
    _, path, tensors = saved
    (path / 'model.safetensors').rename(path / 'a.safetensors')
    safetensors.torch.save_file({'embed_out.weight': tensors['embed_out.weight']}, path / 'b.safetensors')
    index = {name: 'a.safetensors' for name in tensors} | {'embed_out.weight': 'b.safetensors'}
    (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
    with pytest.raises(ModelError, match='embed_out.weight in more than one shard'):
        load_hf(path)


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_files_cut_short(kind, saved):
    _, path, tensors = saved
    if kind == 'bin':
        write_bin_shards(path, tensors)
    file, = path.glob('*.' + kind)
    whole = file.read_bytes()
    for length in (0, 5, random.randrange(6, len(whole)), len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f'{file.name}: damaged'):
            load_hf(path)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), 'w')


def test_a_pickle_that_would_run_code_is_refused_unrun(saved):
    _, path, tensors = saved
    target = path / 'it_ran'
    pickle.loads(pickle.dumps(Malicious(target))).close()
    assert target.exists()                                      # the bait works where pickles are trusted
    target.unlink()
    write_bin_shards(path, {**tensors, 'embed_out.weight': Malicious(target)})
    with pytest.raises(ModelError, match='holds more than tensors'):
        load_hf(path)
    assert not target.exists()


def test_nothing_is_overwritten(saved):
    model, path, _ = saved
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(ModelError, match='nothing is overwritten'):
        save_hf(model, path)
    with pytest.raises(ModelError, match='nothing is overwritten'):
        save_hf(model, path / 'config.json')
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    (path.parent / 'empty').mkdir()
    save_hf(model, path.parent / 'empty')
    assert_same_weights(load_hf(path.parent / 'empty'), model)


def test_a_failed_save_leaves_nothing(tmp_path, seed, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(OSError, match='No space'):
        save_hf(GPTNeoX(random_config()), tmp_path / 'm')
    assert os.listdir(tmp_path) == []


# --- generation ---------------------------------------------------------------------------------------------

def generate_uncached(model, idx, n, **sampling):
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.max_position_embeddings:])
        idx = torch.cat((idx, sample_token(logits[:, -1], **sampling)), dim=1)
    return idx


@pytest.mark.parametrize('prompt', [1, 5, 30])      # block 12: 30 starts beyond it, the others cross it
def test_cached_generation_equals_uncached(prompt, seed):
    model = random_model(random_config(max_position_embeddings=12, vocab_size=60)).double()
    idx = tokens(model.config, B=3, T=prompt)
    with torch.no_grad():
        greedy = generate_uncached(model, idx, 20, temperature=0)
        assert torch.equal(model.generate(idx, 20, temperature=0), greedy)
        a = model.generate(idx, 20, 0.9, 40, 0.95, torch.Generator().manual_seed(seed))
        b = generate_uncached(model, idx, 20, temperature=0.9, top_k=40, top_p=0.95,
                              generator=torch.Generator().manual_seed(seed))
    assert torch.equal(a, b) and torch.equal(a[:, :prompt], idx) and a.shape == (3, prompt + 20)


def test_greedy_generation_equals_transformers(seed, transformers):
    model = random_model(random_config(max_position_embeddings=40)).double()
    idx = tokens(model.config, B=1, T=6)
    theirs = theirs_of(model, transformers)
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=30, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(idx, 30, temperature=0), expected)


def test_several_tokens_after_a_cache(seed):
    model = random_model(random_config(max_position_embeddings=20)).double()
    idx, cache = tokens(model.config), model.new_cache()
    parts = [model(part, cache=cache)[0] for part in idx.split([3, 1, 9, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[0], rtol=0, atol=1e-9)
    with pytest.raises(ModelError, match='21 tokens'):
        model(idx[:, :1], cache=cache)


def frequencies(logits, n=20000, **sampling):
    drawn = sample_token(logits.expand(n, -1), **sampling)
    return torch.bincount(drawn[:, 0], minlength=logits.shape[-1]) / n


@pytest.mark.parametrize('sampling, expected', [
    (dict(), [0.5, 0.05, 0.3, 0.15]),
    (dict(temperature=0.5), [0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
    (dict(top_k=2), [0.625, 0, 0.375, 0]),
    (dict(top_k=99), [0.5, 0.05, 0.3, 0.15]),
    (dict(top_p=0.49), [1, 0, 0, 0]),
    (dict(top_p=0.51), [0.625, 0, 0.375, 0]),               # the token that crosses p is kept
    (dict(top_p=1.0), [0.5, 0.05, 0.3, 0.15]),
    (dict(top_k=2, top_p=0.6), [1, 0, 0, 0]),       # top_p counts what top_k left: 0.625 reaches 0.6
    (dict(temperature=0), [1, 0, 0, 0]),
])
def test_sampling_frequencies(sampling, expected, seed):
    got = frequencies(torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log(), **sampling)
    expected = torch.tensor(expected)
    assert ((got > 0) == (expected > 0)).all()
    assert (got - expected).abs().max() < 6 * 0.5 / math.sqrt(20000)        # 6 standard errors


def test_sampling_does_not_change_its_logits(seed):
    logits = torch.randn(2, 9)
    before = logits.clone()
    sample_token(logits, temperature=1.0, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize('sampling', [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1)])
def test_impossible_sampling(sampling):
    with pytest.raises(ModelError, match='temperature'):
        sample_token(torch.zeros(1, 4), **sampling)
