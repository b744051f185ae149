"""data.py: shards, the order of windows, mixtures, and all that can be wrong with data."""
import json
import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import schedules
import train
from configurator import UserError
from corpora.formats import tokenizer_hash, write_shard
from data import Mixture, Source, batch_rows, mix_weights, open_shard, permute
from support.files import write_whole

T = 8


@pytest.fixture
def shard(tmp_path):
    """Write a shard of the tokens 0, 1, 2, ..., so that a window begins with its own offset."""
    def make(name='a.bin', n=1000, vocab_size=65536, **header):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, np.arange(n) % vocab_size, vocab_size=vocab_size, **header)
        return str(path)
    return make


class Fake(SimpleNamespace):
    """A source of so many windows, without files."""

    def __init__(self, windows=10**9):
        super().__init__(block_size=T, windows=windows)

    def __len__(self):
        return self.windows


def mixture_of(*phases):
    """A mixture of sources without files."""
    return Mixture({name: Fake() for _, weights in phases for name in weights}, list(phases))


def drawn(mixture, g):
    """[(source, local index), ...] of global samples g."""
    found = [None] * len(g)
    for name, rows, local in mixture.locate(g):
        for row, m in zip(rows.tolist(), local.tolist()):
            assert found[row] is None
            found[row] = (name, m)
    return found


def megatron(path, sequences, dtype='<u2', code=8):
    """Write GPT-NeoX's pair of files by its own description, and return the .bin."""
    sizes = [len(sequence) for sequence in sequences]
    tokens = b''.join(np.array(sequence, dtype).tobytes() for sequence in sequences)
    path.with_suffix('.bin').write_bytes(tokens)
    starts = np.cumsum([0, *sizes[:-1]]) * np.dtype(dtype).itemsize
    path.with_suffix('.idx').write_bytes(
        b'MMIDIDX\x00\x00' + np.array([1], '<u8').tobytes() + bytes([code])
        + np.array([len(sizes), len(sizes) + 1], '<u8').tobytes() + np.array(sizes, '<i4').tobytes()
        + starts.astype('<i8').tobytes() + np.arange(len(sizes) + 1).tobytes())
    return str(path.with_suffix('.bin'))


# ------------------------------------------------------------------------------
# Shards

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_shard_returns_the_ids_that_were_written(tmp_path_factory, draw):
    vocab_size = draw.draw(st.sampled_from([2, 257, 50304, 65536, 65537, 128256, 2**31 - 1]))
    ids = draw.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=300))
    eot = draw.draw(st.none() | st.integers(0, vocab_size - 1))
    text_bytes = draw.draw(st.integers(0, 2**50))
    path = tmp_path_factory.mktemp('shard') / 'a.bin'
    write_shard(path, ids, vocab_size=vocab_size, eot=eot, tokenizer='x', text_bytes=text_bytes)
    shard = open_shard(path)
    assert (shard.count, shard.vocab_size, shard.eot) == (len(ids), vocab_size, eot)
    assert shard.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
    assert shard.tokenizer == tokenizer_hash('x') != tokenizer_hash('y')
    assert shard.text_bytes == (text_bytes or None)
    assert shard.tokens.tolist() == ids
    assert os.listdir(path.parent) == ['a.bin']                 # no temporary file stays


def test_llm_c_can_open_our_shards(shard):
    """What llm.c checks: magic, version, count, and the size that they imply."""
    raw = Path(shard(n=77)).read_bytes()
    assert np.frombuffer(raw, '<i4', 3).tolist() == [20240520, 1, 77]
    assert len(raw) == 256 * 4 + 77 * 2
    assert np.frombuffer(raw, '<u2', offset=1024).tolist() == list(range(77))


@pytest.mark.parametrize('magic, version, dtype', [(20240520, 1, '<u2'), (20240801, 7, '<u4')])
def test_shards_of_llm_c_open(tmp_path, magic, version, dtype):
    header = np.zeros(256, '<i4')
    header[:3] = magic, version, 5
    tokens = np.array([5, 4, 3, 2, 60000], dtype)
    (tmp_path / 'x.bin').write_bytes(header.tobytes() + tokens.tobytes())
    shard = open_shard(tmp_path / 'x.bin')
    assert shard.tokens.tolist() == tokens.tolist()
    assert [shard.vocab_size, shard.eot, shard.tokenizer, shard.text_bytes] == [None] * 4


def test_files_of_nanogpt_open(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 5000).astype('<u2')
    ids[0] = 19280                      # its bytes are 'PK', as of a zip file
    for n in (1, 7, 600, 5000):
        ids[:n].tofile(tmp_path / 'train.bin')
        shard = open_shard(tmp_path / 'train.bin')
        assert shard.format == 'headerless' and shard.tokens.tolist() == ids[:n].tolist()


@pytest.mark.parametrize('dtype, code', [('<u2', 8), ('<i4', 4), ('<i8', 5), ('u1', 1)])
def test_files_of_megatron_open(tmp_path, dtype, code):
    file = megatron(tmp_path / 'text', [range(30), range(30, 100)], dtype, code)
    source = Source('pile', [file], T)
    assert len(source) == 99 // T and source.read([3]).tolist() == [list(range(24, 33))]


def test_records_of_megatron_are_windows(tmp_path):
    """In Pythia's pre-shuffled Pile every sequence is one training sample."""
    sequences = [list(range(100 * i, 100 * i + T + 1)) for i in range(5)]
    file = megatron(tmp_path / 'document', sequences)
    assert Source('pile', [file], T).read(range(5)).tolist() == sequences
    assert len(Source('pile', [file], T + 1)) == 44 // (T + 1)      # for another T, one stream
    uneven = megatron(tmp_path / 'uneven', [range(T + 1), range(T + 1, 30)])
    assert Source('pile', [uneven], T).read([1]).tolist() == [list(range(T, 2 * T + 1))]


def header(*words):
    return np.array(words, '<i4').tobytes().ljust(1024, b'\0')


@pytest.mark.parametrize('content, message', [
    (b'', 'is empty'),
    (b'\x01\x02\x03', 'not a token shard'),
    (bytes(3000), 'not a token shard'),
    (np.random.default_rng(1).integers(0, 50000, 999, '<u4').tobytes(), 'not a token shard'),
    (b'It was the best of times, it was the worst of times.\n' * 50, 'not a token shard'),
    (b'PK\x03\x04' + bytes(range(256)) * 8, 'not a token shard'),
    (b'\x93NUMPY\x01\x00' + bytes(range(1, 129)), 'not a token shard'),
    (header(20240521, 1, 9) + bytes(range(18)), 'not a token shard'),
    (header(20240520, 1, 9)[:500], 'truncated within its header'),
    (header(20240520, 1, 9), 'header says 9 tokens, but the file holds 0'),
    (header(20240520, 1, 9) + bytes(17), 'header says 9 tokens, but the file holds 8'),
    (header(20240520, 1, 9) + bytes(20), 'header says 9 tokens, but the file holds 10'),
    (header(20240520, 2, 9) + bytes(18), 'version 2'),
    (header(20240520, 1, 9, 4) + bytes(18), '9 tokens of 4 bytes'),
    (header(20240801, 7, -9) + bytes(36), '-9 tokens'),
    (header(20240520, 1, 0), ' 0 tokens'),
    (header(20240520, 1, 9, 2, -5) + bytes(18), 'vocabulary of -5'),
])
def test_a_damaged_file_gets_one_message(tmp_path, content, message):
    (tmp_path / 'bad.bin').write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_shard(tmp_path / 'bad.bin')
    assert str(tmp_path / 'bad.bin') in str(error.value) and '\n' not in str(error.value)


def test_any_flipped_bit_of_magic_version_and_count_is_noticed(shard):
    path = Path(shard(n=3000))
    whole = bytearray(path.read_bytes())
    for bit in range(12 * 8):
        damaged = whole.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            open_shard(path)


@pytest.mark.parametrize('make', [os.mkdir, lambda path: os.symlink('nowhere', path), str])
def test_a_path_without_a_file_gets_one_message(tmp_path, make):
    make(tmp_path / 'x.bin')
    with pytest.raises(UserError, match='x.bin: cannot be read'):
        Source('x', [tmp_path / 'x.bin'], T)


def test_damaged_files_of_megatron_get_one_message(tmp_path):
    path = Path(megatron(tmp_path / 'x', [range(50)] * 3))
    index = path.with_suffix('.idx')
    whole = index.read_bytes()
    floats = whole[:17] + b'\x06' + whole[18:]
    none = whole[:18] + bytes(8) + whole[26:]
    for damaged, message in [(whole[:40], 'truncated'), (b'?' + whole[1:], 'not a Megatron index'),
                             (floats, 'not a Megatron index of version 1 with integer ids'),
                             (b'', 'not a Megatron index'), (none, 'without sequences')]:
        index.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            open_shard(path)
    index.write_bytes(whole)
    os.truncate(path, 200)
    with pytest.raises(UserError, match='says 150 tokens, but the file holds 100'):
        open_shard(path)


def test_ids_outside_of_the_vocabulary_are_not_written(tmp_path):
    for ids, message in [([], '0 tokens'), ([3, 257], 'from 3 to 257'), ([-1], 'from -1 to -1')]:
        with pytest.raises(UserError, match=message):
            write_shard(tmp_path / 'a.bin', ids, vocab_size=257)
    with pytest.raises(UserError, match='Write several shards'):
        write_shard(tmp_path / 'a.bin', np.broadcast_to(np.uint16(0), 2**31), vocab_size=257)
    assert not os.listdir(tmp_path)


def test_files_are_made_whole_and_never_written_through_a_link(tmp_path, monkeypatch):
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    path = tmp_path / 'a.bin'
    path.symlink_to(victim)
    Path(f'{path}.rewarm-partial').symlink_to(victim)           # both names may be links
    write_whole(path, b'ne', b'w')
    assert path.read_bytes() == b'new' and not path.is_symlink()
    assert victim.read_text() == 'mine' and sorted(os.listdir(tmp_path)) == ['a.bin', 'victim']

    # a write that fails leaves the old file and nothing else
    def full_disk(file):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(OSError):
        write_whole(path, b'newer')
    assert path.read_bytes() == b'new' and sorted(os.listdir(tmp_path)) == ['a.bin', 'victim']


def test_more_shards_than_a_process_may_open_files(tmp_path):
    resource = pytest.importorskip('resource')
    files = []
    for i in range(400):
        files.append(tmp_path / f'{i:03d}.bin')
        files[-1].write_bytes(header(20240520, 1, 20) + np.full(20, i, '<u2').tobytes())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (350, limits[1]))
    try:
        source = Source('pile', files, T)
        source.fingerprint()
        assert source.read(range(800))[:, 3].tolist() == np.repeat(np.arange(400), 2).tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_shards_are_found_by_name_or_by_path(shard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('train_1', 'train_0', 'val_0'):
        shard(f'data/docs/{name}.bin')
    train = ['data/docs/train_0.bin', 'data/docs/train_1.bin']
    assert data.find_shards('docs', 'train') == train
    paths = {'x/val': ['data/*/val*.bin', 'data/docs/val_0.bin'], 'x/train': 'data/docs/*_1.bin'}
    assert data.find_shards('x', 'val', paths=paths) == ['data/docs/val_0.bin']
    assert data.find_shards('x', 'train', paths=paths) == train[1:]
    shard('[1]/do*s/val.bin')
    assert data.find_shards('do*s', 'val', '[1]') == ['[1]/do*s/val.bin']
    with pytest.raises(UserError) as error:
        data.find_shards('dosc', 'val', 'elsewhere')
    for part in ('no val shards', "'dosc'", 'elsewhere/dosc/val*.bin', 'corpora.prepare dosc'):
        assert part in str(error.value)


# ------------------------------------------------------------------------------
# Order

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_a_permutation_reaches_every_index_once(size, keys):
    out = permute(np.arange(size, dtype=np.uint64), size, keys)
    assert sorted(out.tolist()) == list(range(size))


def test_a_permutation_too_long_to_list_looks_random():
    size, keys = 10**12 + 39, [1, 2, 3, 4, 5, 6]
    out = permute(np.arange(20000, dtype=np.uint64), size, keys).astype(np.float64) / size
    assert len(set(out)) == 20000 and 0 <= out.min() and out.max() < 1
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.03 and abs(out.mean() - 0.5) < 0.01
    assert np.abs(np.histogram(out, 20, (0, 1))[0] - 1000).max() < 150      # 5 deviations


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(0, 2**40),
       st.integers(1, 12), st.integers(0, 500))
def test_every_window_once_per_epoch(tmp_path_factory, sizes, key, block_size, start):
    folder, files, expected = tmp_path_factory.mktemp('source'), [], []
    for i, n in enumerate([*sizes, block_size + 1]):
        files.append(folder / f'{i}.bin')
        write_shard(files[-1], 1000 * i + np.arange(n), vocab_size=65536)
        for first in range(0, n - block_size, block_size):      # all that lie inside this shard
            expected.append(list(range(1000 * i + first, 1000 * i + first + block_size + 1)))
    source = Source('a', files, block_size, key=key)
    assert source.read(range(len(source))).tolist() == expected

    S = len(source)
    epochs = source.order(np.arange(4 * S)).reshape(4, S)
    assert all(sorted(epoch) == list(range(S)) for epoch in epochs.tolist())
    if S >= 12:                                                 # 1 in 12! would be chance
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert np.array_equal(source.order(np.arange(2 * S, 3 * S)), epochs[2])
    later = Source('a', files, block_size, key=key, skip=start)
    m = np.arange(3 * S)
    assert np.array_equal(later.order(m), source.order(m + start))


def test_the_order_follows_from_seed_and_name(shard):
    files = [shard(n=4000)]
    a, b, other_seed, again = (Source(name, files, T, key=key).order(range(400)).tolist()
                               for name, key in (('a', 0), ('b', 0), ('a', 1), ('a', 0)))
    assert a == again and a != b and a != other_seed


def test_stored_order_is_that_of_the_files(shard):
    pile = Source('pile', [shard('a.bin', n=401), shard('b.bin', n=201)], T, key='stored')
    sources = {'pile': pile, 'new': Source('new', [shard('c.bin')], T)}
    mixture = Mixture(sources, [(0, mix_weights({'new': 1}, {'pile': 1}, 0.25))])

    def firsts(g):
        """The first token of every sample that the pile gives."""
        inputs = mixture.batch(g)[0]
        return [x[0] for (name, _), x in zip(drawn(mixture, g), inputs.tolist()) if name == 'pile']
    assert firsts(range(400)) == [*range(0, 400, T), *range(0, 200, T), *range(0, 200, T)]
    assert firsts(range(200, 400)) == firsts(range(400))[50:]


def test_the_order_of_data_is_what_it_always_was(tmp_path):
    """Whoever changes these values changes what every run of two sources is trained on."""
    def make(name, first, n):
        write_shard(tmp_path / name, np.arange(first, first + n), vocab_size=65536)
        return tmp_path / name
    docs = Source('docs', [make('a.bin', 0, 3001), make('b.bin', 3001, 1500)], T, key=1337)
    code = Source('code', [make('c.bin', 20000, 2500)], T, key='7/reshuffled')
    assert docs.order(range(12)).tolist() == [365, 138, 30, 343, 84, 17, 538, 206, 481, 73, 366,
                                              189]
    assert docs.order([1000, 1001, 10**12]).tolist() == [365, 522, 454]

    phases = [(0, mix_weights({'code': 1}, {'docs': 1}, 0.05)),
              (800, {'docs': '1/3', 'code': '2/3'}),
              (1200, {'docs': 0.3333333333333333, 'code': 1})]
    mixture = Mixture({'docs': docs, 'code': code}, phases)
    digest = blake2b(digest_size=16)
    for step in range(100):
        for ids in mixture.batch(batch_rows(step, 16))[:2]:
            digest.update(ids.astype('<i8').tobytes())
    far = mixture.batch([10**12 + 3 * i for i in range(50)])[0]
    digest.update(far.astype('<i8').tobytes())
    assert digest.hexdigest() == 'cb99dbf0a53ea21967054c77913b8ed7'


def test_a_source_needs_one_window(shard):
    with pytest.raises(UserError, match=r'longest shard holds 8 tokens, .* block_size \+ 1 = 9'):
        Source('short', [shard('b.bin', n=3), shard('a.bin', n=8)], T)
    assert len(Source('short', [shard('b.bin', n=3), shard('a.bin', n=9)], T)) == 1


@pytest.mark.parametrize('dtype, code, bad', [('<u2', 8, 500), ('<i4', 4, -1)])
@pytest.mark.parametrize('at', [0, 776, 777])                   # at the edge of a window, or inside
def test_an_id_outside_of_the_vocabulary_is_named(tmp_path, dtype, code, bad, at):
    ids = np.arange(1000) % 400
    ids[at] = bad
    source = Source('pile', [megatron(tmp_path / 'x', [ids], dtype, code)], T)
    source.vocab_size = 400
    mixture = Mixture({'pile': source}, [(0, {'pile': 1})])
    windows = source.order(range(len(source)))
    hit = [g for g, w in enumerate(windows) if w * T <= at <= (w + 1) * T]
    fine = [g for g in range(len(source)) if g not in hit]
    assert mixture.batch(fine)[0].shape == (len(fine), T)
    message = rf'pile: id {bad} at token {at} of .*x.bin is outside the vocabulary of 400'
    for samples in ([*fine, *hit], *([g] for g in hit)):
        with pytest.raises(UserError, match=message):
            mixture.batch(samples)


def test_an_id_past_the_own_vocabulary_of_a_shard_is_an_error(shard):
    path = shard(vocab_size=257)
    with open(path, 'r+b') as file:
        file.seek(1024)
        file.write(np.uint16(300).tobytes())
    with pytest.raises(UserError, match='id 300 at token 0 .* outside the vocabulary of 257'):
        fit({'a': Source('a', [path], T)}, 50304)


def test_val_windows_are_spread_over_the_source(shard):
    source = Source('a', [shard(n=801)], T)
    assert data.val_windows(source) == data.val_windows(source, 1000) == list(range(100))
    assert data.val_windows(source, 4) == [0, 25, 50, 75]


def test_bytes_per_token_are_known_when_all_shards_say_them(shard):
    files = [shard(n=100, text_bytes=100), shard('b.bin', n=300, text_bytes=1500)]
    assert Source('a', files, T).bytes_per_token == 4
    assert Source('a', [*files, shard('c.bin')], T).bytes_per_token is None


# ------------------------------------------------------------------------------
# Checks

def fit(sources, vocab_size):
    """The warnings about sources of one model."""
    data.one_tokenizer(sources)
    return data.limit_ids(sources, vocab_size)


def test_sources_must_fit_the_model_and_each_other(shard, tmp_path):
    a = Source('a', [shard('a.bin', vocab_size=257, tokenizer='bytes')], T)
    b = Source('b', [shard('b.bin', vocab_size=257, tokenizer='other')], T)
    unknown = Source('u', [shard('u.bin', vocab_size=300)], T)
    assert fit({'a': a, 'u': unknown}, 300) == []
    with pytest.raises(UserError, match='a.bin and .*b.bin were made with different tokenizers'):
        fit({'a': a, 'u': unknown, 'b': b}, 300)
    with pytest.raises(UserError, match='a.bin has a vocabulary of 257 ids, but the model has 256'):
        fit({'a': a}, 256)
    (np.arange(1, 1000) % 257).astype('<u2').tofile(tmp_path / 'bare.bin')      # says nothing
    bare = Source('bare', [tmp_path / 'bare.bin'], T)
    with pytest.raises(UserError, match='outside the vocabulary of 100'):
        fit({'bare': bare}, 100)


def test_a_warning_when_only_some_sources_have_end_of_text(shard, tmp_path):
    ours = Source('a', [shard('a.bin', eot=0)], T)
    bare = Source('b', [megatron(tmp_path / 'b', [range(5, 500)])], T)
    with_zeros = Source('c', [megatron(tmp_path / 'c', [[*range(5, 12), 0] * 50])], T)
    assert fit({'a': ours, 'c': with_zeros}, 65536) == []
    assert fit({'b': bare}, 65536) == []
    (warning,) = fit({'a': ours, 'b/train': bare, 'c': with_zeros}, 65536)
    assert warning.startswith('WARNING: b/train contain no end-of-text')


def test_a_fingerprint_sees_other_data(shard):
    def make(files):
        return Source('a', files, T).fingerprint()
    files = [shard('a.bin', n=5000), shard('b.bin', n=900)]
    first = make(files)
    assert first == make(files) and first.startswith('2 shards, 5,900 tokens')
    assert first not in (make(files[:1]), make(files[::-1]))

    # one token of the same sizes, also where the program that compares runs on
    for at in (0, 517, 899):
        ids = np.arange(900)
        ids[at] += 1
        write_shard(files[1], ids, vocab_size=65536)
        assert make(files) != first
    write_shard(files[1], np.arange(900), vocab_size=65536)
    assert make(files) == first


# ------------------------------------------------------------------------------
# Mixture

numbers = (st.integers(0, 10**6) | st.floats(0, 1e6) | st.decimals(0, 1, places=3).map(float)
           | st.sampled_from([0.05, 1 / 3, 0.1 + 0.2, 1e-12, 1e12, 3e9 + 1]))
some_weights = (st.lists(numbers, min_size=1, max_size=10).filter(any)
                .map(lambda values: {f's{i}': value for i, value in enumerate(values)}))


def shares(weights):
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


def lightest_first(weights):
    """[(name, its share of what is left), ...]: the splits by which the mixture is defined."""
    left, found = Fraction(1), []
    for name, share in sorted(shares(weights).items(), key=lambda item: (item[1], item[0])):
        if share:
            found.append((name, share / left))
            left -= share
    return found


def rounded(x):
    return math.floor(x + Fraction(1, 2))


def counts_by_definition(weights, n):
    """In Fractions: a source with share p of what is left gives round(n p) of the first n."""
    counts = dict.fromkeys(weights, 0)
    for name, share in lightest_first(weights):
        counts[name] = rounded(n * share)
        n -= counts[name]
    return counts


def one_by_one(phases, samples):
    """Yield (source, local index) of each sample, by counting what every split was offered."""
    counts = Counter()
    for (start, weights), end in zip(phases, [*(first for first, _ in phases[1:]), samples]):
        offered, splits = Counter(), lightest_first(weights)
        for _ in range(end - start):
            for name, share in splits:
                offered[name] += 1
                if rounded(offered[name] * share) > rounded((offered[name] - 1) * share):
                    yield name, counts[name]
                    counts[name] += 1
                    break


@settings(max_examples=100, deadline=None)
@given(some_weights, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_counts_are_exact_at_every_prefix(weights, prefixes):
    reversed_order = dict(reversed(weights.items()))            # which makes no difference
    mixture, share = mixture_of((0, reversed_order)), shares(weights)
    bound = Fraction(sum(map(bool, weights.values())) - 1, 2)
    for n in [*prefixes, 0, 1, 2, 3]:
        counts = mixture.counts(n)
        assert counts == counts_by_definition(weights, n)
        assert sum(counts.values()) == n
        assert max(abs(counts[name] - n * share[name]) for name in weights) <= bound


@settings(max_examples=50, deadline=None)
@given(st.lists(some_weights, min_size=1, max_size=4),
       st.lists(st.integers(1, 60), min_size=3, max_size=3))
def test_samples_are_those_that_counting_one_by_one_gives(mixtures, lengths):
    """And where the weights change, every source continues from where it is."""
    starts = np.cumsum([0, *lengths[:len(mixtures) - 1]]).tolist()
    phases = list(zip(starts, mixtures))
    mixture = mixture_of(*phases)
    expected = list(one_by_one(phases, 200))
    assert drawn(mixture, range(200)) == expected
    for n in (0, starts[-1], 101, 200):
        counts = Counter(name for name, _ in expected[:n])
        assert mixture.counts(n) == {name: counts[name] for name in mixture.sources}
    for i, (first, weights) in enumerate(phases):
        end = [*starts, 200][i + 1]
        bound = Fraction(len(weights) - 1, 2)
        for name, share in shares(weights).items():
            given = mixture.counts(end)[name] - mixture.counts(first)[name]
            assert abs(given - (end - first) * share) <= bound


@settings(max_examples=80, deadline=None)
@given(some_weights, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_samples_far_out_agree_with_the_counts(weights, samples):
    """In any order, repeated or not; one by one as all together."""
    mixture = mixture_of((0, weights))
    together = drawn(mixture, samples)
    for g, (name, m) in zip(samples, together):
        before, after = mixture.counts(g), mixture.counts(g + 1)
        assert before[name] == m and after == before | {name: m + 1}
        assert drawn(mixture, [g]) == [(name, m)]


@pytest.mark.parametrize('weights', [{'a': 0.3333333333333333, 'b': 1 / 7, 'c': 1e-15},
                                     {'a': 2**31 - 1, 'b': 2**31, 'c': 1}, {'a': 10**300, 'b': 3},
                                     {'a': 2**30, 'b': 2**30 - 1}, {'a': 5e-324, 'b': 1e308}])
def test_weights_of_many_digits_neither_overflow_nor_drift(weights):
    mixture = mixture_of((0, weights))
    g = [0, 1, 2**31 - 1, 2**31, 10**15, 10**15 + 1, 2**62]
    for n in g:
        assert mixture.counts(n) == counts_by_definition(weights, n)
    for n, (name, m) in zip(g, drawn(mixture, g)):
        assert counts_by_definition(weights, n)[name] == m
        assert counts_by_definition(weights, n + 1)[name] == m + 1


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 6))
def test_all_ways_to_split_a_step_cover_the_same_samples(step, per_rank, micro_batch):
    batch_size = 24 * per_rank * micro_batch
    for world in (1, 2, 3, 8):
        seen = []
        for micro_step in range(batch_size // (world * micro_batch)):
            for rank in range(world):
                rows = batch_rows(step, batch_size, rank, world, micro_batch, micro_step)
                assert len(rows) == micro_batch
                seen += rows
        assert seen == list(range(step * batch_size, (step + 1) * batch_size))


@settings(max_examples=20, deadline=None)
@given(some_weights, st.integers(0, 60), st.integers(1, 24))
def test_a_batch_follows_from_its_step_alone(tmp_path_factory, weights, step, batch_size):
    path = tmp_path_factory.mktemp('batch') / 'a.bin'
    write_shard(path, np.arange(500), vocab_size=500)

    def make():
        sources = {name: Source(name, [path], T, key=7) for name in weights}
        return Mixture(sources, [(0, weights)])
    run = make()
    for earlier in range(step):
        run.batch(batch_rows(earlier, batch_size))
    x, y, names = run.batch(batch_rows(step, batch_size))
    resumed = make()
    assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (batch_size, T)
    again = resumed.batch(batch_rows(step, batch_size))
    assert np.array_equal(again[:2], (x, y)) and again[2] == names
    parts = [resumed.batch(batch_rows(step, batch_size, micro_batch=1, micro_step=i))[0]
             for i in range(batch_size)]
    assert np.array_equal(np.concatenate(parts), x)
    for row, (name, m) in enumerate(drawn(run, batch_rows(step, batch_size))):
        source = run.sources[name]
        assert names[row] == name
        window = source.read(source.order([m]))[0]
        assert window.tolist() == [*x[row], y[row, -1]] and np.array_equal(y[row], window[1:])


def test_adding_or_moving_a_source_never_reshuffles_another(shard):
    files = [shard(n=4000)]

    def stream(weights):
        """The windows of `code`, in the order in which they come."""
        sources = {name: Source(name, files, T) for name in weights}
        found = drawn(Mixture(sources, [(0, weights)]), range(400))
        return [int(sources['code'].order([m])[0]) for name, m in found if name == 'code']
    alone = stream({'code': 1})
    for weights in ({'code': 1, 'docs': 1}, {'docs': 0.2, 'a': 0.3, 'code': 0.5},
                    mix_weights({'z': 1}, {'code': 1}, 0.25)):
        mixed = stream(weights)
        assert len(mixed) >= 100 and mixed == alone[:len(mixed)]


def test_replay_takes_its_share_of_the_samples():
    assert mix_weights({'code': 1}) == mix_weights({'code': 7}, {'docs': 1}, 0) == {'code': 1}
    mixed = mix_weights({'a': 3, 'b': 1}, {'c': 0.2, 'd': 0.6}, 0.05)
    assert mixed == {'a': Fraction(57, 80), 'b': Fraction(19, 80), 'c': Fraction(1, 80),
                     'd': Fraction(3, 80)}
    assert mixture_of((0, mixed)).counts(80) == {'a': 57, 'b': 19, 'c': 1, 'd': 3}


@pytest.mark.parametrize('arguments, message', [
    (({'a': 1}, {'b': 1}, 1), 'replay = 1'), (({'a': 1}, {'b': 1}, -0.1), 'replay = -0.1'),
    (({'a': 1}, {'b': 1}, math.nan), 'replay = nan'), (({'a': 1}, {}, 0.1), 'replay_data is empty'),
    (({'a': 1}, {'a': 1}, 0.1), 'a: in train_data and in replay_data'),
    (({'a': 1}, {'b': 0.0}, 0.1), 'replay_data = .* above zero'), (({},), 'above zero'),
    (({'a': 0},), 'above zero'), (({'a': 1, 'b': -1},), 'negative'),
    *[(({'a': 1, 'b': weight},), 'train_data = .* must be finite numbers')
      for weight in (math.inf, math.nan, '1e999999999', '1e-99999999', '0.5', None, True, [1])],
])
def test_weights_that_make_no_mixture_get_one_message(arguments, message):
    with pytest.raises(UserError, match=message):
        mix_weights(*arguments)


def test_the_worked_example_of_the_page():
    mixture = mixture_of((0, {'old': 1, 'new': 3}))
    assert [mixture.counts(n)['old'] for n in range(9)] == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert ' '.join(name for name, _ in drawn(mixture, range(8))) == (
        'new old new new new old new new')


# ------------------------------------------------------------------------------
# What a validation set is to a stage

def start_of(seen=(), progress=False):
    """What a new stage, or a branch, takes along of a model that has read these sources."""
    sources = {name: {'order': '1337', 'read': 40, 'replayed': 0, 'windows': 'unknown'}
               for name in seen}
    history = {'sources': sources, 'tokenizer': None, 'context': 32}
    passed = {'step': 0, 'mixes': [], 'skips': {}} if progress else {}
    return train.Start('init_from', 'x', {}, {'shape': {'vocab_size': 384}}, history, {}, passed,
                       {})


SCRATCH = train.Start('scratch', '', {}, {}, {}, {}, {}, {})
ROLES = [
    (SCRATCH, {'train_data': {'old': 1}}, 'training data', 'never trained on'),
    (SCRATCH, {'train_data': {'old': 1}, 'replay_data': {'new': 1}, 'replay': 0.2},
     'training data', 'training data'),
    (start_of(['old']), {'train_data': {'new': 1}}, 'old data', 'new data'),
    (start_of(['old']), {'train_data': {'old': 1}}, 'the same data again', 'never trained on'),
    (start_of(['old']), {'train_data': {'old': 1}, 'old_data': ['new']}, 'the same data again',
     'old data'),
    (start_of(['old/1of3']), {'train_data': {'new': 1}}, 'old data', 'new data'),
    (start_of(['older', 'old_2']), {'train_data': {'new': 1}}, 'never trained on', 'new data'),
    # a weight of zero, and a switch that is not reached, teach nothing
    (start_of(['old']), {'train_data': {'old': 1, 'new': 0}}, 'the same data again',
     'never trained on'),
    (SCRATCH, {'train_data': {'old': 1, 'new': 1e-9}}, 'training data', 'never trained on'),
    (SCRATCH, {'train_data': {'old': 1}, 'switches': [{'step': 9, 'train_data': {'new': 1}}]},
     'training data', 'training data'),
    # weights from elsewhere know what is replayed; those of a known past do not
    (start_of(), {'train_data': {'new': 1}, 'replay_data': {'old': 1}, 'replay': 0.2}, 'old data',
     'new data'),
    (start_of(['new']), {'train_data': {'new': 1}, 'replay_data': {'old': 1}, 'replay': 0.2},
     'new data', 'the same data again'),
    (start_of(['old'], progress=True), {'train_data': {'old': 1}}, 'training data',
     'never trained on'),
]


def plan_of(corpora, start, changes):
    knobs = {'data_dir': str(corpora), 'val_data': ['old', 'new'], 'block_size': 32,
             'max_steps': 10, 'batch_size': 4, 'eval_windows': 3, **changes}
    cfg = train.Config(**knobs)
    return data.Plan(cfg, schedules.of(cfg), start)


@pytest.mark.parametrize('start, changes, old, new', ROLES)
def test_roles_follow_from_what_was_read(corpora, start, changes, old, new):
    assert plan_of(corpora, start, changes).roles == {'old': old, 'new': new}


def test_old_data_must_name_something(corpora):
    with pytest.raises(UserError, match="old_data = .*'odl'.* Did you mean 'old'"):
        plan_of(corpora, start_of(), {'train_data': {'new': 1}, 'old_data': ['odl']})
    plan_of(corpora, start_of(), {'train_data': {'new': 1}, 'old_data': ['old/part']})


def test_the_history_counts_what_was_read(corpora):
    second = {'step': 5, 'train_data': {'new': 1}, 'replay_data': {'old': 1}, 'replay': 0.25}
    plan = plan_of(corpora, SCRATCH, {'train_data': {'old': 1}, 'switches': [second]})
    assert list(plan.history(5)['sources']) == ['old']          # no sample of `new` so far
    seen = plan.history(10)['sources']
    assert (seen['new']['read'], seen['new']['replayed']) == (15, 0)
    # first trained on, then replayed: both go on from there
    assert (seen['old']['read'], seen['old']['replayed']) == (25, 25)


def test_data_that_are_not_those_of_before_are_named(corpora):
    start = start_of(['old'])
    (note,) = plan_of(corpora, start, {'train_data': {'new': 1}, 'replay_data': {'old': 1},
                                       'replay': 0.25}).notes
    assert 'another order' in note and 'unknown' in note and '32 tokens' in note
    with pytest.raises(UserError, match='the data of old have changed'):
        plan_of(corpora, start, {'train_data': {'old': 1}, 'continue_data': True})
    (note,) = plan_of(corpora, start_of(['other']), {
        'train_data': {'new': 1}, 'replay_data': {'old': 1}, 'replay': 0.25}).notes
    assert 'no earlier stage has read' in note


def test_a_shard_of_another_name_is_not_swept_up(shard, tmp_path):
    shard('docs/train_00000.bin')
    for name in ('train_old.bin', 'training_backup.bin', 'train_copy.bin'):
        stray = shard(f'docs/{name}')
        with pytest.raises(UserError, match=name):
            data.find_shards('docs', 'train', tmp_path)
        os.unlink(stray)
    shard('docs/train_00001.bin')
    shard('docs/train-2-of-3.bin')
    assert len(data.find_shards('docs', 'train', tmp_path)) == 3


# ------------------------------------------------------------------------------
# python data.py SHARD...

def test_the_command_shows_shards_also_of_a_quoted_glob(tmp_path, monkeypatch, capsys, shard):
    monkeypatch.chdir(tmp_path)
    np.array([50256, 15496, 995, 50256], '<u2').tofile(tmp_path / 'val.bin')
    shard('x/train_1.bin', n=77, vocab_size=257, eot=256, text_bytes=70)
    shard('x/train_0.bin', n=5000)
    data.main(['val.bin', 'x/*.bin'])
    printed = capsys.readouterr().out
    parts = ['val.bin: 4 tokens (headerless, uint16)', 'begins with 50256 15496 995 50256',
             'x/train_0.bin: 5,000 tokens', 'x/train_1.bin: 77 tokens (llm.c, uint16)',
             'vocabulary 257, end-of-text 256']
    places = [printed.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)


def test_the_command_ends_with_a_message(tmp_path):
    (tmp_path / 'a.txt').write_text('some text ' * 20)
    for name, message in [('a.txt', 'a.txt: not a token shard'), ('no*.bin', 'cannot be read')]:
        command = [sys.executable, str(ROOT / 'data.py'), name]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 1 and message in run.stderr
        assert len(run.stderr.splitlines()) == 1
    with pytest.raises(UserError, match='python data.py data/docs'):
        data.main(['--help'])
