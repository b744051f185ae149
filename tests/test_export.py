"""Weights in and out: Hugging Face directories of every kind as a start, checked against chance, and as an end."""
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import metrics, saved

import data
import eval
import model as model_py
import train
from model import PYTHIA, GPTNeoX, GPTNeoXConfig, load_hf, save_hf

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPE = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=384, max_position_embeddings=32)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(eval, 'plot', lambda folders, out: None)


@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers', reason='what is to open our directories is missing')


def random_model(**changes):
    seed = random.randrange(10 ** 6)
    print('seed', seed)
    torch.manual_seed(seed)
    model = GPTNeoX(GPTNeoXConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens():
    return torch.randint(257, (2, 32))


@pytest.fixture
def says(capsys):
    """says(program, argv...) -> what it prints; it must end well."""
    def run(program, *argv):
        capsys.readouterr()
        assert not program.main(list(argv))
        return capsys.readouterr().out
    return run


@pytest.fixture
def fails(capsys):
    """fails(program, argv..., words): one message with these words, exit code 2."""
    def run(program, *argv, words):
        capsys.readouterr()
        assert program.main(list(argv)) == 2
        err = capsys.readouterr().err
        assert 'Traceback' not in err and all(word in err for word in words), err
    return run


# -----------------------------------------------------------------------------
# Weights in

@pytest.mark.parametrize('size', PYTHIA)
def test_every_pythia_size_on_the_meta_device(size, tmp_path, monkeypatch, transformers):
    """The released config.json, and the names and shapes that transformers gives such a model; no memory needed."""
    p = PYTHIA[size]
    raw = {'architectures': ['GPTNeoXForCausalLM'], 'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'gelu',
           'hidden_size': p.width, 'initializer_range': 0.02, 'intermediate_size': 4 * p.width,
           'layer_norm_eps': 1e-05, 'max_position_embeddings': 2048, 'model_type': 'gpt_neox',
           'num_attention_heads': p.heads, 'num_hidden_layers': p.layers, 'rotary_emb_base': 10000,
           'rotary_pct': 0.25, 'tie_word_embeddings': False, 'torch_dtype': 'float16', 'use_cache': True,
           'use_parallel_residual': True, 'vocab_size': p.vocab}
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    with torch.device('meta'):
        theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig.from_pretrained(tmp_path))
    monkeypatch.setattr(model_py, 'read_hf_tensors', lambda path: theirs.state_dict())
    ours = load_hf(tmp_path)
    assert ours.embed_out.weight.shape == (p.vocab, p.width) and not ours.cos.is_meta
    assert ours.num_params() == theirs.num_parameters() and ours.config == GPTNeoXConfig.pythia(size)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_files_of_any_precision_become_float32(dtype, kind, tmp_path, transformers):
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=400)).to(dtype)
    theirs.save_pretrained(tmp_path)
    if kind == 'bin':
        torch.save(safetensors.torch.load_file(tmp_path / 'model.safetensors'), tmp_path / 'pytorch_model.bin')
        (tmp_path / 'model.safetensors').unlink()
    ours = load_hf(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    idx = torch.randint(400, (2, 50))
    torch.testing.assert_close(ours(idx)[0], theirs.float()(idx).logits, rtol=0, atol=1e-5)


@pytest.fixture
def start(config, tmp_path):
    """start('b', key=value, ...) writes a config that starts from weights in 'hf', and gives its name."""
    shape = dict.fromkeys(('hidden_size', 'num_hidden_layers', 'num_attention_heads'))
    return lambda name, **changes: config(name, **{**shape, 'init_from': 'hf', 'max_steps': 2, 'warmup': 0, **changes})


def test_more_rows_than_tokens_and_the_loss_against_chance(start, says):
    """Random weights are at chance; what they have learnt is not, and a tokenizer that they do not know is worse."""
    save_hf(random_model(vocab_size=500), 'hf')                     # 257 tokens, padded to anything
    out = says(train, start('a', max_steps=40))
    assert f'chance, ln 500: {math.log(500):.2f}' in out and 'WARNING: on no validation set' in out
    assert saved('out/a', 40)['model']['vocab_size'] == 500
    says(eval, 'export', 'out/a', 'hf2')
    first = metrics('out/a', 'eval')[-1]['val']
    out = says(train, start('b', init_from='hf2'))
    assert (f'before the first step: old {first["old"]["loss"]:.2f}, new {first["new"]["loss"]:.2f} nats per token '
            f'(chance, ln 500: {math.log(500):.2f})') in out
    assert 'WARNING' not in out and first['old']['loss'] < math.log(500) - 1
    tensors = safetensors.torch.load_file('hf2/model.safetensors')
    tensors['gpt_neox.embed_in.weight'] = tensors['gpt_neox.embed_in.weight'].flip(0)
    tensors['embed_out.weight'] = tensors['embed_out.weight'].flip(0)
    safetensors.torch.save_file(tensors, 'hf2/model.safetensors')
    assert 'WARNING: on no validation set' in says(train, start('c', init_from='hf2'))
    assert 'chance' not in says(train, start('d', init_from='hf2', val_data=[]))


def test_the_other_gelu(start, says, fails):
    """A stage may switch it, is told so, resumes with it and exports it; a branch may not."""
    save_hf(random_model(), 'hf')
    assert 'from here on' not in says(train, start('erf', hidden_act='gelu'))
    out = says(train, start('tanh', hidden_act='gelu_fast', max_steps=6))
    assert "hidden_act: 'gelu' in hf, 'gelu_fast' from here on" in out
    erf, tanh = (metrics(f'out/{name}', 'eval')[0]['val']['old']['loss'] for name in ('erf', 'tanh'))
    assert 0 < abs(erf - tanh) < 0.01
    weights = saved('out/tanh', 6)['weights']
    Path('out/tanh/ckpt_00000006.pt').unlink()
    assert 'from here on' not in says(train, 'tanh.py')                         # resumes at step 5
    assert all(torch.equal(t, weights[name]) for name, t in saved('out/tanh', 6)['weights'].items())
    says(eval, 'export', 'out/tanh', 'out/hf')
    assert json.loads(Path('out/hf/config.json').read_text())['hidden_act'] == 'gelu_fast'
    assert 'from here on' not in says(train, start('next', init_from='out/hf'))
    assert saved('out/next', 2)['model']['hidden_act'] == 'gelu_fast'
    fails(train, start('b', init_from='', branch_from='out/tanh/ckpt_00000005.pt', hidden_act='gelu', max_steps=8),
          words=['hidden_act'])
    fails(train, start('b', hidden_size=64), words=['hidden_size', 'another size'])
    fails(train, start('b', hidden_act='relu'), words=['relu', 'gelu_fast'])


# -----------------------------------------------------------------------------
# Weights out

@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, 'run')
    return 'run'


def test_the_same_logits(run, says, transformers):
    ours = eval.load_run(run)[1]
    out = says(eval, 'export', run, 'new/hf')
    assert 'no tokenizer.json' in out and 'fp32' in out and 'model.safetensors' in out
    assert sorted(path.name for path in Path('new').iterdir()) == ['hf']
    idx = tokens()
    assert torch.equal(eval.load_run('new/hf')[1](idx)[0], ours(idx)[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained('new/hf')
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == theirs.config.bos_token_id == 256
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], rtol=0, atol=1e-5)
    says(eval, 'export', f'{run}/ckpt_00000005.pt', 'earlier')
    assert not torch.equal(load_hf('earlier')(idx)[0], ours(idx)[0])
    says(eval, 'export', 'new/hf', 'again')                         # from a Hugging Face directory to another
    assert Path('again/model.safetensors').read_bytes() == Path('new/hf/model.safetensors').read_bytes()


@pytest.mark.parametrize('name, dtype', [('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_in_half_the_bytes(name, dtype, run, says):
    says(eval, 'export', run, 'hf', '--dtype', name)
    found, expected = safetensors.torch.load_file('hf/model.safetensors'), eval.load_run(run)[1].state_dict()
    assert json.loads(Path('hf/config.json').read_text())['torch_dtype'] == str(dtype).removeprefix('torch.')
    assert all(torch.equal(t, expected[key].to(dtype)) for key, t in found.items()) and found.keys() == expected.keys()


def test_what_is_refused(run, fails, tmp_path):
    Path('full').mkdir()
    Path('full/mine.txt').write_text('mine')
    fails(eval, 'export', run, 'full', words=['full', 'nothing is overwritten'])
    assert [path.name for path in Path('full').iterdir()] == ['mine.txt']
    fails(eval, 'export', 'nowhere', 'hf', words=['nowhere'])
    fails(eval, 'export', run, 'hf', '--tokenizer', 'nowhere', words=['nowhere'])
    state = torch.load(f'{run}/ckpt_00000030.pt', weights_only=True)
    state['weights']['embed_out.weight'][0, 0] = 1e5
    torch.save(state, 'large.pt')
    fails(eval, 'export', 'large.pt', 'hf', '--dtype', 'fp16', words=['fp16', 'too large', 'bf16'])
    state['model']['vocab_size'], state['tokenizer'] = 128, 'bytes'
    state['weights'] = {k: t[:128] if 'embed' in k else t for k, t in state['weights'].items()}
    torch.save(state, 'small.pt')
    fails(eval, 'export', 'small.pt', 'hf', '--tokenizer', 'bytes', words=['257', '128'])
    assert not Path('hf').exists()


# -----------------------------------------------------------------------------
# Tokenizers, on their way through

TEXTS = ['abc  def', ' e\u0301 \n\n    x', '日本 7.', '<|endoftext|>'[:-1]]


@pytest.fixture
def tokenized(bpe, start, says):
    """A run on shards of the small tokenizer, started from a Hugging Face directory; its name."""
    tokenizer, folder = data.get_tokenizer(str(bpe)), Path('data/text')
    folder.mkdir(parents=True)
    ids = tokenizer.encode(Path(__file__).read_text() + ' '.join(TEXTS) * 50)
    for split in ('train', 'val'):
        data.write_shard(folder / f'{split}.bin', ids, vocab_size=tokenizer.vocab_size, eot=tokenizer.eot,
                         tokenizer=tokenizer.name)
    (folder / 'summary.json').write_text(json.dumps({'tokenizer': tokenizer.name}))
    shutil.copy(bpe / 'tokenizer.json', 'data/text')
    save_hf(random_model(), 'hf')
    says(train, start('run', train_data={'text': 1.0}, val_data=['text'], data_dir='data'))
    shutil.rmtree('data')
    return 'out/run'


def test_a_run_takes_its_tokenizer_along(tokenized, bpe, says, transformers):
    """From the shards' folder to the run, to samples, to the exported directory, and into the next stage."""
    tokenizer = data.get_tokenizer(str(bpe))
    argv = ['--prompt', 'abc  def', '--tokens', '5', '--device', 'cpu']
    assert says(eval, 'sample', tokenized, *argv).startswith('abc  def')
    out = says(eval, 'export', tokenized, 'exported')
    assert 'tokenizer.json' in out and 'no tokenizer.json' not in out
    theirs = transformers.AutoTokenizer.from_pretrained('exported')
    for text in TEXTS:
        assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs(text)['input_ids']) == tokenizer.decode(tokenizer.encode(text).tolist())
    assert theirs.eos_token_id == tokenizer.eot == json.loads(Path('exported/config.json').read_text())['eos_token_id']
    assert says(eval, 'sample', 'exported', *argv) == says(eval, 'sample', tokenized, *argv)
    Path('exported/special_tokens_map.json').write_text('{"eos_token": "<|endoftext|>"}')
    says(eval, 'export', 'exported', 'again')                       # of a directory, what is in it
    for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
        assert Path('again', name).read_bytes() == Path('exported', name).read_bytes()


def test_the_parents_tokenizer(start, bpe, says):
    """A run on shards that name no tokenizer takes its parent's along; a run of bytes does not."""
    save_hf(random_model(), 'hf')
    shutil.copy(bpe / 'tokenizer.json', 'hf')
    Path('hf/special_tokens_map.json').write_text('{}')
    Path('data/x').mkdir(parents=True)
    for split in ('train', 'val'):
        data.write_shard(f'data/x/{split}.bin', range(300), vocab_size=384)
    knobs = dict(train_data={'x': 1.0}, val_data=['x'], data_dir='data')
    says(train, start('a', **knobs))
    says(train, start('b', init_from='out/a/ckpt_00000002.pt', **knobs))
    says(train, start('c', init_from='a.py', **knobs))
    for run in ('a', 'b', 'c'):
        assert Path('out', run, 'tokenizer.json').read_bytes() == (bpe / 'tokenizer.json').read_bytes()
        assert Path('out', run, 'special_tokens_map.json').read_text() == '{}'
        argv = ['sample', f'out/{run}', '--tokens', '3', '--prompt', 'abc', '--device', 'cpu']
        assert says(eval, *argv).startswith('abc')
    says(train, start('bytes'))
    assert not Path('out/bytes/tokenizer.json').exists()
    shutil.copy(bpe / 'tokenizer.json', 'out/bytes')                # nor would it be believed
    assert 'no tokenizer.json' in says(eval, 'export', 'out/bytes', 'exported')


def test_a_tokenizer_by_name(tokenized, bpe, says, fails):
    shutil.copytree(tokenized, 'bare')
    Path('bare/tokenizer.json').unlink()
    fails(eval, 'sample', 'bare', words=['--tokenizer'])
    assert 'no tokenizer.json' in says(eval, 'export', 'bare', 'without')
    assert not Path('without/tokenizer.json').exists()
    assert says(eval, 'sample', 'bare', '--tokenizer', str(bpe), '--device', 'cpu')
    says(eval, 'export', 'bare', 'with', '--tokenizer', str(bpe / 'tokenizer.json'))
    assert Path('with/tokenizer.json').read_bytes() == (bpe / 'tokenizer.json').read_bytes()
    fails(eval, 'sample', 'without', words=['without', '--tokenizer'])


def test_losses_of_a_hugging_face_directory(run, corpora, says, fails):
    said = says(eval, 'loss', run, '--windows', '0', '--sets', 'old', 'new', '--data_dir', str(corpora))
    says(eval, 'export', run, 'hf')
    argv = ['loss', 'hf', '--data_dir', str(corpora), '--device', 'cpu']
    assert says(eval, *argv, '--sets', 'old', 'new').splitlines()[1:] == said.splitlines()[1:]
    fails(eval, *argv, words=['--sets'])
