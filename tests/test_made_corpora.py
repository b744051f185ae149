"""projects/ without a Method: generated corpora, parts of a corpus, and certified training."""
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
from configurator import UserError
from corpora.formats import tokenizer_hash
from corpora.shards import hash_of
from projects import certified, data_volume, no_language

pytestmark = pytest.mark.usefixtures('one_thread')


def documents(path):
    """The texts of a shard of bytes."""
    parts = bytes(np.minimum(data.open_shard(path).tokens, 255).astype(np.uint8)).split(b'\xff')
    return [part.decode() for part in parts[:-1]]


# ------------------------------------------------------------------------------
# no_language

def closes_in_order(text):
    """Whether brackets are nested, by taking innermost pairs out until nothing is left."""
    before = None
    while text != before:
        before = text
        for kind in no_language.SMALL:
            text = text.replace(kind + kind.upper(), '')
    return text == ''


@pytest.mark.parametrize('repetition', range(5))
def test_brackets_are_paired_and_only_nested_ones_are_nested(repetition):
    draw, length = random.Random(random.random()), random.randint(60, 300)
    inner, crossing = no_language.nested(draw, length), no_language.flat(draw, length)
    for text in (inner, crossing):
        opened = Counter()
        for letter in text:
            opened[letter.lower()] += 1 if letter.islower() else -1
            assert opened[letter.lower()] >= 0
        assert not any(opened.values()) and abs(len(text) - length) <= 2
    assert closes_in_order(inner) and not closes_in_order(crossing)


def test_a_walk_has_four_ways_on_and_noise_has_zipfs_frequencies():
    draw, following = random.Random(1), {}
    text = no_language.walk(draw, 20000)
    for one, other in zip(text, text[1:]):
        following.setdefault(one, set()).add(other)
    assert max(map(len, following.values())) == 4
    counts = Counter(no_language.noise(draw, 50000))
    assert counts['a'] / counts['d'] == pytest.approx(4, rel=0.15)


def test_generated_corpora_are_shards(tmp_path):
    words = [f'--data_dir={tmp_path}', '--documents=40', '--length=50']
    no_language.main(words)
    before = {path: path.read_bytes() for path in tmp_path.glob('*/*.bin')}
    no_language.main(words)
    assert before == {path: path.read_bytes() for path in tmp_path.glob('*/*.bin')}
    assert {path.name for path in tmp_path.iterdir()} == set(no_language.LANGUAGES)
    for name in no_language.LANGUAGES:
        texts = documents(tmp_path / name / 'train_00000.bin')
        assert 30 <= len(texts) <= 40 and all(len(text) >= 48 for text in texts)


# ------------------------------------------------------------------------------
# data_volume

def test_parts_are_nested_and_hold_out_what_the_corpus_holds_out(corpora, tmp_path, capsys):
    shutil.copytree(corpora / 'old', tmp_path / 'old')
    data_volume.main([f'--data_dir={tmp_path}', '--corpus=old', '--parts=[4,2]'])
    whole = documents(corpora / 'old/train_00000.bin')
    held_out = documents(corpora / 'old/val_00000.bin')
    half = documents(tmp_path / 'old/1of2/train_00000.bin')
    quarter = documents(tmp_path / 'old/1of4/train_00000.bin')
    assert set(quarter) < set(half) < set(whole) and not set(half) & set(held_out)
    share = sum(hash_of(text.encode()) < (0.05 + 0.95 / 2) * 2**64 for text in whole)
    assert len(half) == share
    assert f'old/1of2: {share} of {len(whole)} documents' in capsys.readouterr().out


# ------------------------------------------------------------------------------
# certified

@pytest.mark.parametrize('normalise', [True, False])
def test_bounds_hold_for_every_image_in_the_box(normalise):
    torch.manual_seed(random.randrange(10**6))
    net = certified.Net(certified.Config(normalise=normalise, width=20)).double()
    x, y, eps = torch.rand(30, 64).double(), torch.randint(10, (30,)), 0.07
    net(x, eps, y)                                      # moves the running statistics
    net.eval()
    logits, worst, boxes = net(x, eps, y)
    assert (logits - logits.gather(1, y[:, None]) <= worst).all()
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    for _ in range(50):
        inside = torch.where(torch.rand_like(x) < 0.5, low, high)
        other, _, _ = net(inside, 0.0, y)
        assert (other - other.gather(1, y[:, None]) <= worst + 1e-12).all()
    exact, bound, _ = net(x, 0.0, y)                    # a box that is a point has exact bounds
    torch.testing.assert_close(bound, exact - exact.gather(1, y[:, None]))


def test_the_initialisation_keeps_boxes_from_growing():
    torch.manual_seed(random.randrange(10**6))
    x, y = torch.rand(200, 64), torch.randint(10, (200,))
    growth = {}
    for keeps in (True, False):
        cfg = certified.Config(initialise=keeps, normalise=False, width=500, depth=5)
        _, _, boxes = certified.Net(cfg)(x, 0.01, y)
        growth[keeps] = (boxes[-1][1].mean() / boxes[1][1].mean()).item()
    assert 0.5 < growth[True] < 2 and growth[False] > 100


def test_the_penalty_is_that_of_the_paper():
    torch.manual_seed(random.randrange(10**6))
    boxes = [(torch.randn(8, 5), torch.rand(8, 5)) for _ in range(3)]
    expected = []
    for center, radius in boxes[1:]:
        c, r = center.numpy(), radius.numpy()
        terms = [0.5 - boxes[0][1].numpy().mean() / r.mean()]
        for value in (c, (c - c.mean())**2):
            one, other = abs(value[c > r].sum()), abs(value[c < -r].sum())
            terms.append(0.5 - min(one / other, other / one))
        expected.append(sum(max(0, term) for term in terms) / 0.5)
    assert certified.warmup_penalty(boxes, 0.5).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_short_run_learns_digits():
    pytest.importorskip('sklearn', reason='it has the digits: pip install scikit-learn')
    images, labels = certified.load_digits()
    cfg = certified.Config(eps=0.01, epochs=8, warmup=2, width=40, depth=2, batch_size=32)
    error, verified = certified.run(cfg, images, labels)
    assert error < 0.2 and error <= verified < 0.6
    torch.manual_seed(9)
    assert certified.run(cfg, images, labels) == (error, verified)
    assert certified.run(replace(cfg, seed=2), images, labels) != (error, verified)


# ------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize('module, argv, words', [
    (no_language, ['--length=5'], 'length = 5: expected at least 20'),
    (data_volume, ['--parts=[4,1]'], 'expected numbers above 1'),
    (data_volume, ['--corpus=missing'], "no train shards of 'missing'"),
    (certified, ['--eps=0'], 'eps = 0.0: expected more than 0'),
    (certified, ['--batch_size=5000', '--epochs=1'], 'batch_size = 5000'),
    (certified, ['--warmup=99'], 'Shorten the others'),
    (certified, ['--epsilon=1'], "Did you mean 'eps'?")])
def test_bad_input_gets_one_message(module, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if module is certified:
        monkeypatch.setattr(certified, 'load_digits', lambda: (torch.rand(300, 64),
                                                               torch.zeros(300).long()))
    with pytest.raises(UserError, match=re.escape(words)):
        module.main(argv)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match='pip install scikit-learn'):
        certified.load_digits()


@pytest.mark.parametrize('name', ['no_language', 'data_volume', 'certified'])
def test_as_a_program(name, tmp_path):
    done = subprocess.run([sys.executable, '-m', f'projects.{name}', '--nonsense=1'], text=True,
                          capture_output=True, cwd=tmp_path, env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith(f'projects.{name}: --nonsense')
    assert 'Traceback' not in done.stderr and not list(Path(tmp_path).iterdir())
