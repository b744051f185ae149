"""projects/self_replay.py: what it samples, the shard it writes, and training on that."""
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import data
import eval
from configurator import UserError
from conftest import contents, crash, ends_well, metrics, ROOT, same_run, stage
from model import GPTNeoX, GPTNeoXConfig
from projects.self_replay import main, sample_streams
from support import checkpoints
from support.huggingface import save_hf


pytestmark = pytest.mark.usefixtures('fast', 'one_thread')


def tiny(vocab_size, block_size=8):
    shape = GPTNeoXConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2,
                          num_attention_heads=2, intermediate_size=32,
                          max_position_embeddings=block_size)
    return GPTNeoX(shape)


def is_drawn_from(counts, probs):
    """Whether Pearson's chi-square of counts (rows, n) is within 6 deviations of its mean."""
    expected = counts.sum(1, keepdims=True) * probs
    chi_square = ((counts - expected)**2 / expected).sum()
    freedom = len(counts) * (counts.shape[1] - 1)
    return chi_square < freedom + 6 * np.sqrt(2 * freedom)


def constant(model, probs):
    """Give a model the same next-token probabilities everywhere."""
    with torch.no_grad():
        norm = model.gpt_neox.final_layer_norm
        norm.weight.zero_()
        norm.bias.copy_(torch.eye(len(norm.bias))[0])
        model.embed_out.weight.zero_()
        model.embed_out.weight[:, 0] = torch.as_tensor(probs).log()


def test_streams_have_the_probabilities_of_a_known_chain():
    """A model whose next token depends on the last one alone, in a known way."""
    states, width = 6, 16
    chain = np.random.default_rng().dirichlet([2] * states, states) * 0.9 + 0.1 / states
    model = tiny(states)
    with torch.no_grad():
        for layer in model.gpt_neox.layers:
            for p in (layer.attention.dense, layer.mlp.dense_4h_to_h):
                p.weight.zero_()
                p.bias.zero_()
        one_hot = torch.eye(states, width)
        model.gpt_neox.embed_in.weight.copy_(one_hot)
        # the norm scales a one-hot vector and moves it by a constant, which the bias undoes
        scale = 1 / (one_hot[0].var(unbiased=False) + model.config.layer_norm_eps).sqrt()
        model.gpt_neox.final_layer_norm.bias.fill_(scale / width)
        model.embed_out.weight[:, :states] = torch.from_numpy(chain).log().T / scale
    ids = sample_streams(model, 3, 40, 200).numpy()
    assert ids.shape == (40, 200) and set(ids[:, 0]) == {3}
    pairs = np.zeros((states, states))
    np.add.at(pairs, (ids[:, :-1].ravel(), ids[:, 1:].ravel()), 1)
    assert is_drawn_from(pairs, chain)
    assert not is_drawn_from(pairs, chain[::-1])


@pytest.mark.parametrize('block_size', [1, 7, 8])
def test_every_token_follows_at_least_half_a_block_of_its_stream(block_size):
    """The likeliest tokens, one at a time and without a cache."""
    model, length = tiny(40, block_size=block_size), random.randint(1, 4 * block_size + 3)
    ids = sample_streams(model, 5, 3, length, temperature=0)
    begin, expected = 0, torch.full((3, 1), 5)
    for n in range(1, length):
        if n - begin > block_size:
            begin = n - max(block_size // 2, 1)
        with torch.no_grad():
            logits, _ = model(expected[:, begin:])
        expected = torch.cat((expected, logits[:, -1].argmax(1, keepdim=True)), dim=1)
    assert torch.equal(ids, expected)


def sample(run, name, *options, tokens=600):
    main([str(run), f'--name={name}', f'--tokens={tokens}', '--batch=4', *options])
    return Path('data', name, 'train_00000.bin')


def test_a_seed_decides_every_byte(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b, c = (sample(finished, name, f'--seed={seed}') for name, seed in
               (('a', 5), ('b', 5), ('c', 6)))
    assert contents(a.parent) == contents(b.parent) != contents(c.parent)
    assert 'data/c: 600 tokens, on which the loss of' in capsys.readouterr().out


def test_padding_is_never_sampled(finished, tmp_path, monkeypatch):
    """A model that would nearly always draw an id above the vocabulary."""
    monkeypatch.chdir(tmp_path)
    state, model = eval.load_run(finished)
    probs = np.random.default_rng().uniform(0.1, 1, model.config.vocab_size)
    probs[257:] = 1e4
    constant(model, probs)
    checkpoints.save_weights('padded.pt', model, state)
    shard = data.open_shard(sample('padded.pt', 'own', tokens=20_000))
    assert (shard.count, shard.vocab_size, shard.eot) == (20_000, 257, 256)
    assert shard.tokens[0] == shard.tokens[5_000] == shard.tokens[15_000] == 256
    drawn = np.delete(shard.tokens, range(0, 20_000, 5_000))    # without what begins a stream
    counts = np.bincount(drawn, minlength=257)
    assert is_drawn_from(counts[None], probs[None, :257] / probs[:257].sum())


def test_a_stage_replays_it_and_resumes(config, corpora, finished, monkeypatch):
    name = f'own_{random.getrandbits(40)}'                  # corpora are shared with other tests
    main([str(finished), f'--name={name}', '--tokens=3000', '--batch=4', f'--data_dir={corpora}'])
    source = data.Source(name, data.find_shards(name, 'train', corpora), 32)
    assert len(source) == 2999 // 32 and source.read([0])[0, 0] == 256
    options = dict(init_from=str(finished), replay_data={name: 1.0}, replay=0.25)
    ends_well(stage(config, 'b', **options))
    ends_well(stage(config, 'real', **options | {'replay_data': {'old': 1.0}}))
    assert metrics('out/b', 'train') != metrics('out/real', 'train')
    interrupted = stage(config, 'c', **options)
    crash([interrupted], 7, monkeypatch)
    ends_well(interrupted)
    same_run('out/b', 'out/c', 12)


def test_an_interrupted_sampling_leaves_nothing_in_the_way(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupt(*paths):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr('os.replace', interrupt)
        sample(finished, 'own')
    assert contents('data/own') == {}
    assert data.open_shard(sample(finished, 'own')).count == 600


def test_a_hugging_face_directory_needs_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_hf(tiny(300, block_size=32), 'hf')
    with pytest.raises(UserError, match='Name the folder with its tokenizer.json: --tokenizer'):
        sample('hf', 'own')
    assert data.open_shard(sample('hf', 'own', '--tokenizer=bytes')).tokens.max() <= 256


@pytest.mark.parametrize('options, words', [
    (['--tokens=128'], 'expected more than --batch 4 times the block size 32'),
    (['--batch=0'], 'expected more than --batch 0 times'),
    (['--temperature=-1'], 'temperature -1.0 must be 0 or above'),
    (['--name=old'], 'old already contains text to train on. Delete it, or choose')])
def test_what_it_refuses(finished, corpora, options, words):
    before = contents(corpora / 'old')
    with pytest.raises(UserError, match=re.escape(words)):
        main([str(finished), '--name=refused', '--tokens=600', '--batch=4',
              f'--data_dir={corpora}', *options])
    assert contents(corpora / 'old') == before and not (corpora / 'refused').exists()


def test_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'projects.self_replay', 'out/none', '--name=own'],
                          text=True, capture_output=True, cwd=tmp_path,
                          env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith('projects.self_replay: out/none')
    assert len(done.stderr.splitlines()) == 1
