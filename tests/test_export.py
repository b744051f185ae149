"""Weights in and out: Hugging Face directories of every kind as a start, and as an end."""
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import metrics, saved

import eval
import train
from corpora.formats import write_shard
from corpora.shards import write_summary
from corpora.tokenizer import load_tokenizer
from model import PYTHIA, GPTNeoX, GPTNeoXConfig
from support import huggingface
from support.huggingface import load_hf, save_hf

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPE = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=384,
             max_position_embeddings=32)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(eval, 'plot', lambda *args: None)


@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers', reason='it opens the directories that we write')


def random_model(**changes):
    seed = random.randrange(10**6)
    print('seed', seed)
    torch.manual_seed(seed)
    model = GPTNeoX(GPTNeoXConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def prints(capsys):
    """prints(program, argv...) -> what it prints. It must succeed."""
    def run(program, *argv):
        capsys.readouterr()
        assert not program.main(list(argv)), capsys.readouterr().err
        return capsys.readouterr().out
    return run


@pytest.fixture
def fails(capsys):
    """fails(program, argv..., words): exit code 2 and one message that contains these words."""
    def run(program, *argv, words):
        capsys.readouterr()
        assert program.main(list(argv)) == 2
        err = capsys.readouterr().err
        assert 'Traceback' not in err and all(word in err for word in words), err
    return run


# ------------------------------------------------------------------------------
# Weights in

@pytest.mark.plain_model
@pytest.mark.parametrize('size', PYTHIA)
def test_every_pythia_size_has_the_tensors_of_transformers(size, tmp_path, monkeypatch,
                                                          transformers):
    """From the released config.json, on the meta device: no memory is needed."""
    layers, width, heads, vocab = PYTHIA[size]
    raw = {'architectures': ['GPTNeoXForCausalLM'], 'bos_token_id': 0, 'eos_token_id': 0,
           'hidden_act': 'gelu', 'hidden_size': width, 'initializer_range': 0.02,
           'intermediate_size': 4 * width, 'layer_norm_eps': 1e-05, 'model_type': 'gpt_neox',
           'max_position_embeddings': 2048, 'num_attention_heads': heads, 'rotary_pct': 0.25,
           'num_hidden_layers': layers, 'rotary_emb_base': 10000, 'tie_word_embeddings': False,
           'torch_dtype': 'float16', 'use_parallel_residual': True, 'vocab_size': vocab}
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    with torch.device('meta'):
        theirs = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig.from_pretrained(tmp_path))
    # transformers 5.23 has a new name for the output matrix, but not in the files it writes
    tensors = {name.replace('lm_head', 'embed_out'): t for name, t in theirs.state_dict().items()}
    monkeypatch.setattr(huggingface, 'read_hf_tensors', lambda path: tensors.items())
    ours = load_hf(tmp_path)
    assert ours.embed_out.weight.shape == (vocab, width) and not ours.cos.is_meta
    assert ours.num_params() == theirs.num_parameters()
    assert ours.config == GPTNeoXConfig.pythia(size)


@pytest.mark.plain_model
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_files_of_any_precision_become_float32(dtype, kind, tmp_path, transformers):
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=400)).to(dtype)
    theirs.save_pretrained(tmp_path)
    if kind == 'bin':
        tensors = safetensors.torch.load_file(tmp_path / 'model.safetensors')
        torch.save(tensors, tmp_path / 'pytorch_model.bin')
        (tmp_path / 'model.safetensors').unlink()
    ours = load_hf(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    idx = torch.randint(400, (2, 50))
    torch.testing.assert_close(ours(idx)[0], theirs.float()(idx).logits, rtol=0, atol=1e-5)


@pytest.fixture
def start(config):
    """start('b', key=value, ...) writes a config that starts from weights in 'hf'."""
    shape = dict.fromkeys(('hidden_size', 'num_hidden_layers', 'num_attention_heads'))

    def write(name, **changes):
        return config(name, **{**shape, 'init_from': 'hf', 'max_steps': 2, 'warmup': 0, **changes})
    return write


def test_the_first_losses_are_compared_with_chance(start, prints):
    """Random weights are at chance, trained ones are better, and a wrong tokenizer is not."""
    warning = 'WARNING: on no validation set'
    save_hf(random_model(vocab_size=500), 'hf')         # 257 tokens, padded to any number of rows
    out = prints(train, start('a', max_steps=40))
    assert f'chance would be ln 500 = {math.log(500):.2f}' in out and warning in out
    assert saved('out/a', 40)['model']['shape']['vocab_size'] == 500
    prints(eval, 'export', 'out/a', 'hf2')
    first = metrics('out/a', 'eval')[-1]['val']
    out = prints(train, start('b', init_from='hf2'))
    assert f'step 0: old {first["old"]["loss"]:.4f}  new {first["new"]["loss"]:.4f}' in out
    assert warning not in out and first['old']['loss'] < math.log(500) - 1
    tensors = safetensors.torch.load_file('hf2/model.safetensors')
    for name in ('gpt_neox.embed_in.weight', 'embed_out.weight'):
        tensors[name] = tensors[name].flip(0)
    safetensors.torch.save_file(tensors, 'hf2/model.safetensors')
    assert warning in prints(train, start('c', init_from='hf2'))
    assert warning not in prints(train, start('d', init_from='hf2', val_data=[]))


def test_a_stage_may_change_the_gelu(start, prints, fails):
    """Released Pythia configs say exact, but tanh trained them. A branch must not change it."""
    save_hf(random_model(), 'hf')
    prints(train, start('erf', hidden_act='gelu'))
    prints(train, start('tanh', hidden_act='gelu_fast', max_steps=6))
    erf, tanh = (metrics(f'out/{name}', 'eval')[0]['val']['old']['loss']
                 for name in ('erf', 'tanh'))
    assert 0 < abs(erf - tanh) < 0.01
    weights = saved('out/tanh', 6)['model']['weights']
    Path('out/tanh/ckpt_00000006.pt').unlink()
    prints(train, 'tanh.py')                            # resumes at step 5
    again = saved('out/tanh', 6)['model']['weights']
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    prints(eval, 'export', 'out/tanh', 'out/hf')
    assert json.loads(Path('out/hf/config.json').read_text())['hidden_act'] == 'gelu_fast'
    prints(train, start('next', init_from='out/hf'))
    assert saved('out/next', 2)['model']['shape']['hidden_act'] == 'gelu_fast'
    branch = start('b', init_from='', branch_from='out/tanh/ckpt_00000005.pt', hidden_act='gelu',
                   max_steps=8)
    fails(train, branch, words=['hidden_act'])
    fails(train, start('b', hidden_size=64), words=['hidden_size', '32', '64'])
    fails(train, start('b', hidden_act='relu'), words=['relu', 'gelu_fast'])


# ------------------------------------------------------------------------------
# Weights out

@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A finished run, copied to `run` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, 'run')
    return 'run'


@pytest.mark.plain_model
def test_transformers_computes_the_same_logits(run, prints, transformers):
    ours = eval.load_run(run)[1]
    out = prints(eval, 'export', run, 'new/hf')
    assert 'fp32' in out and 'model.safetensors' in out
    assert [path.name for path in Path('new').iterdir()] == ['hf']
    idx = torch.randint(257, (2, 32))
    assert torch.equal(eval.load_run('new/hf')[1](idx)[0], ours(idx)[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained('new/hf')
    assert theirs.dtype == torch.float32
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == 256
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], rtol=0, atol=1e-5)
    prints(eval, 'export', f'{run}/ckpt_00000025.pt', 'earlier')
    assert not torch.equal(load_hf('earlier')(idx)[0], ours(idx)[0])
    prints(eval, 'export', 'new/hf', 'again')           # from one Hugging Face directory to another
    for name in ('model.safetensors', 'config.json', 'tokenizer.json'):
        assert Path('again', name).read_bytes() == Path('new/hf', name).read_bytes()


@pytest.mark.parametrize('name, dtype', [('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_export_in_half_the_bytes(name, dtype, run, prints):
    prints(eval, 'export', run, 'hf', '--dtype', name)
    found = safetensors.torch.load_file('hf/model.safetensors')
    expected = eval.load_run(run)[1].state_dict()
    kind = json.loads(Path('hf/config.json').read_text())['torch_dtype']
    assert kind == str(dtype).removeprefix('torch.') and found.keys() == expected.keys()
    assert all(torch.equal(t, expected[key].to(dtype)) for key, t in found.items())


def test_what_export_refuses(run, fails):
    Path('full').mkdir()
    Path('full/mine.txt').write_text('mine')
    fails(eval, 'export', run, 'full', words=['full', 'not empty'])
    assert [path.name for path in Path('full').iterdir()] == ['mine.txt']
    fails(eval, 'export', 'nowhere', 'hf', words=['nowhere'])
    fails(eval, 'export', run, 'hf', '--tokenizer', 'nowhere', words=['nowhere'])
    state = saved(run, 30)
    state['model']['weights']['embed_out.weight'][0, 0] = 1e5
    torch.save(state, 'large.pt')
    fails(eval, 'export', 'large.pt', 'hf', '--dtype', 'fp16',
          words=['float16', 'too large', 'bf16'])
    state['model']['shape']['vocab_size'] = 128
    for name in ('gpt_neox.embed_in.weight', 'embed_out.weight'):
        state['model']['weights'][name] = state['model']['weights'][name][:128]
    torch.save(state, 'small.pt')
    fails(eval, 'export', 'small.pt', 'hf', '--tokenizer', 'bytes', words=['257', '128'])
    assert not Path('hf').exists()


# ------------------------------------------------------------------------------
# Tokenizers

TEXTS = ['abc  def', ' e\u0301 \n\n    x', '日本 7.', '<|endoftext|>'[:-1], '\x00\x7f\u20ac']


def same_tokenizer(theirs, ours):
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eot


def test_bytes_open_in_transformers_with_our_ids(run, prints, transformers):
    out = prints(eval, 'export', run, 'hf')
    assert 'tokenizer.json' in out and 'no tokenizer' not in out
    same_tokenizer(transformers.AutoTokenizer.from_pretrained('hf'), load_tokenizer('bytes'))
    assert eval.load_run('hf')[0] == {}
    argv = ['--prompt', 'abc', '--tokens', '9', '--device', 'cpu']
    assert prints(eval, 'sample', 'hf', *argv) == prints(eval, 'sample', run, *argv)


@pytest.fixture
def tokenized(bpe, start, prints):
    """A run on shards of the small BPE tokenizer, started from a Hugging Face directory."""
    tokenizer, folder = load_tokenizer(str(bpe)), Path('data/text')
    folder.mkdir(parents=True)
    ids = tokenizer.encode(Path(__file__).read_text() + ' '.join(TEXTS) * 50)
    for split in ('train', 'val'):
        write_shard(folder / f'{split}.bin', ids, vocab_size=tokenizer.vocab_size,
                         eot=tokenizer.eot, tokenizer=tokenizer.name)
    write_summary(folder, {'tokenizer': tokenizer.name}, {})
    shutil.copy(bpe / 'tokenizer.json', folder)
    save_hf(random_model(), 'hf')
    prints(train, start('run', train_data={'text': 1.0}, val_data=['text'], data_dir='data'))
    shutil.rmtree('data')
    return 'out/run'


def test_a_run_keeps_its_tokenizer(tokenized, bpe, prints, transformers):
    """From beside the shards to the run, to samples, to the exported directory."""
    argv = ['--prompt', 'abc  def', '--tokens', '5', '--device', 'cpu']
    sample = prints(eval, 'sample', tokenized, *argv)
    assert sample.startswith('abc  def')
    prints(eval, 'export', tokenized, 'exported')
    theirs, ours = transformers.AutoTokenizer.from_pretrained('exported'), load_tokenizer(str(bpe))
    same_tokenizer(theirs, ours)
    assert json.loads(Path('exported/config.json').read_text())['eos_token_id'] == ours.eot
    assert prints(eval, 'sample', 'exported', *argv) == sample
    prints(eval, 'export', 'exported', 'again')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        assert Path('again', name).read_bytes() == Path('exported', name).read_bytes()


def test_a_stage_takes_the_tokenizer_of_its_parent(start, bpe, prints):
    """If its shards name none. A run on bytes takes none, and ignores a file that it finds."""
    save_hf(random_model(), 'hf')
    shutil.copy(bpe / 'tokenizer.json', 'hf')
    Path('data/x').mkdir(parents=True)
    for split in ('train', 'val'):
        write_shard(f'data/x/{split}.bin', range(300), vocab_size=384)
    knobs = dict(train_data={'x': 1.0}, val_data=['x'], data_dir='data')
    prints(train, start('a', **knobs))
    prints(train, start('b', init_from='out/a/ckpt_00000002.pt', **knobs))
    prints(train, start('c', init_from='a.py', **knobs))
    for run in ('a', 'b', 'c'):
        copied = Path('out', run, 'tokenizer.json').read_bytes()
        assert copied == (bpe / 'tokenizer.json').read_bytes()
    argv = ['sample', 'out/c', '--tokens', '3', '--prompt', 'abc', '--device', 'cpu']
    assert prints(eval, *argv).startswith('abc')
    save_hf(random_model(), 'plain')
    prints(train, start('bytes', init_from='plain'))
    assert not Path('out/bytes/tokenizer.json').exists()
    shutil.copy(bpe / 'tokenizer.json', 'out/bytes')
    prints(eval, 'export', 'out/bytes', 'exported')
    assert load_tokenizer('exported').name == 'bytes'


def test_a_tokenizer_by_name(tokenized, bpe, prints, fails):
    Path(tokenized, 'tokenizer.json').unlink()
    fails(eval, 'sample', tokenized, words=['--tokenizer'])
    assert 'without gets no tokenizer' in prints(eval, 'export', tokenized, 'without')
    assert not Path('without/tokenizer.json').exists()
    assert prints(eval, 'sample', tokenized, '--tokenizer', str(bpe), '--device', 'cpu')
    prints(eval, 'export', tokenized, 'with', '--tokenizer', str(bpe / 'tokenizer.json'))
    copied = Path('with/tokenizer.json').read_bytes()
    assert copied == (bpe / 'tokenizer.json').read_bytes()
    fails(eval, 'sample', 'without', words=['without', '--tokenizer'])
