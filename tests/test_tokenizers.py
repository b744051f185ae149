"""data.get_tokenizer: ids and texts equal to those of the `tokenizers` library and of tiktoken, on any text."""
import base64
import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import TOKENIZERS as FILES
from conftest import train_bpe
from hypothesis import given, settings, strategies as st

import data
from data import DataError, find_tokenizer, get_tokenizer

KINDS = ('trained', '20B', 'gpt2')
SOME = ('the', "don't WE'LL", 'Größe', 'zażółć', '漢字仮名', 'नमस्ते', 'שלום', '😀👩\u200d👩\u200d👧', '3.14', '½²',
        '__init__(', '<|', '|>', 'endoftext', '<|endoftext|>', '<|padding|>', '<|endoftext|>\u0338', '\0', '\x1c',
        '\x1f', '\r\n', '\n', '\n\n', '\t', '\x0b', '\x0c', '\x85', '\xa0', '\u1680', '\u2003', '\u2028', '\u202f',
        '\u3000', '\ufeff', '\u200b', 'e\u0301', '\u0301', '\u0345\u0300\u0316', '\u1112\u1161\u11ab', '\u0958', '\ufb01',
        'Å', '\U00010ffff', '\ud7ff', '\uffff')
texts = st.lists(st.sampled_from(SOME) | st.integers(1, 80).map(' '.__mul__) | st.sampled_from(' \n\t').flatmap(
    lambda c: st.integers(1, 40).map(c.__mul__)) | st.text(max_size=8), max_size=30).map(''.join)


def train(folder, runs=range(24, 1, -1), vocab_size=1200, end=data.END):
    """train_bpe on modules of the standard library."""
    library = Path(json.__file__).parents[1]
    texts = [*((library / f).read_text() for f in ('argparse.py', 'heapq.py')), *SOME * 9]
    return train_bpe(folder, texts, vocab_size, runs, end)


def gpt2_of_hugging_face():
    """GPT-2's tokenizer as the `tokenizers` library builds it from the two files."""
    merges = [tuple(line.split(' ')) for line in (FILES / 'gpt2' / 'vocab.bpe').read_text('utf-8').splitlines()[1:]]
    own = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads((FILES / 'gpt2' / 'encoder.json').read_text()), merges))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    own.add_special_tokens([data.END])
    return own


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """pairs(kind) -> (our Tokenizer, that of the `tokenizers` library)."""
    made = {}

    def pair(kind):
        path = {'trained': tmp_path_factory.getbasetemp(), '20B': FILES / '20B_tokenizer.json',
                'gpt2': FILES / 'gpt2'}[kind]
        if not path.exists():
            pytest.skip(f'no {path}: set REWARM_TOKENIZERS to the folder of 20B_tokenizer.json and gpt2/')
        if kind not in made:
            oracle = (gpt2_of_hugging_face() if kind == 'gpt2' else train(path) if kind == 'trained' else
                      tokenizers.Tokenizer.from_file(str(path)))
            made[kind] = get_tokenizer(str(path)), oracle
        return made[kind]
    return pair


def check(pair, text):
    """Ids with special text taken as ordinary and parsed, and the way back."""
    ours, oracle = pair
    for special in (False, True):
        oracle.encode_special_tokens = not special
        expected, ids = oracle.encode(text, add_special_tokens=False).ids, ours.encode(text, special)
        assert ids.tolist() == expected, (text, special)
        assert ids.dtype == np.uint16 and ours.decode(ids) == oracle.decode(expected, skip_special_tokens=False)
        assert special or not ours.eot in expected


@pytest.mark.parametrize('kind', KINDS)
def test_ids_equal_on_any_text(pairs, kind):
    pair = pairs(kind)
    for n in range(80):                                         # each run of spaces, alone and in company
        for text in (' ' * n, 'x' + ' ' * n, ' ' * n + 'x', '\n' + ' ' * n + '\n', '\t' + ' ' * n + '1' + ' ' * n):
            check(pair, text)

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def fuzz(text):
        check(pair, text)
    fuzz()


@pytest.mark.parametrize('kind', KINDS)
def test_ids_equal_on_every_code_point(pairs, kind):
    """For the 20B; of others every seventh, from a random one on. The oracle's own NFC lacks 51 newer marks."""
    ours, oracle = pairs(kind)
    start = 0 if kind == '20B' else random.randrange(7)
    print(f'from {start}')
    points = [chr(i) for i in range(start, 0x110000, 1 if kind == '20B' else 7) if not 0xd800 <= i < 0xe000]
    normal = (lambda text: text) if kind == 'gpt2' else lambda text: unicodedata.normalize('NFC', text)
    lines = [''.join(f'a{c}b {c}\u0301' for c in points[i:i + 1000]) for i in range(0, len(points), 1000)]
    oracle.encode_special_tokens = True
    for line, expected in zip(lines, oracle.encode_batch_fast(list(map(normal, lines)), add_special_tokens=False)):
        assert ours.encode(line).tolist() == expected.ids


@pytest.mark.parametrize('kind', KINDS)
def test_every_id_decodes(pairs, kind):
    """Also those that no text gives, as a model may draw them; whatever ids, there is a text."""
    ours, oracle = pairs(kind)
    assert ours.vocab_size == oracle.get_vocab_size()
    for i in range(ours.vocab_size):
        assert ours.decode([i]) == oracle.decode([i], skip_special_tokens=False)
    seed = random.randrange(2 ** 32)
    print(f'seed {seed}')
    for ids in np.random.default_rng(seed).integers(0, ours.vocab_size, (50, 100)):
        assert ours.decode(ids) == oracle.decode(ids.tolist(), skip_special_tokens=False)
    assert ours.decode([ours.vocab_size, 70000]) == '\ufffd\ufffd'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('unit', ['a', ' ', '\n', '漢', '\n ', '\r\n', '\x1c\t', '\u2003\u3000'])
def test_long_runs(pairs, kind, unit, monkeypatch):
    """What one regex must not see whole: as a run of `LONG_RUN` whitespaces is longer than its stack."""
    monkeypatch.setattr(data, 'LONG_RUN', 100)
    pair = pairs(kind)
    mixed = f'{" " * 25}{unit * 150} x  {unit * 151}\x1c{unit * 20}y'
    for text in (unit * 150, f'x{unit * 150}', f'{unit * 150}x', mixed):
        check(pair, text)


@pytest.mark.parametrize('unit', ['\n', ' \n', '\t', ' ', 'a', '漢'])
def test_a_million_characters_of_one_kind(pairs, unit):
    """Longer than any stack. In time that grows with the length: a square of it would take hours."""
    ours, oracle = pairs('trained')
    ids = ours.encode('x' + unit * (1_000_000 // len(unit)) + 'x')
    assert ours.decode(ids) == 'x' + unit * (1_000_000 // len(unit)) + 'x'


def test_gpt2_from_its_files(pairs):
    """From ranks or from merges the same, which is what tiktoken does with its own regex; not by a name of a folder."""
    ours, _ = pairs('gpt2')
    tiktoken, public = pytest.importorskip('tiktoken'), pytest.importorskip('tiktoken_ext.openai_public')
    lines = (FILES / 'gpt2' / 'r50k_base.tiktoken').read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    oracle = tiktoken.Encoding('gpt2', pat_str=public.r50k_pat_str, mergeable_ranks=ranks,
                               special_tokens={data.END: 50256})
    merged = get_tokenizer(str(FILES / 'gpt2' / 'vocab.bpe'))
    assert ours[:3] == merged[:3] == ('gpt2', 50257, 50256)

    @settings(max_examples=200, deadline=None)
    @given(texts)
    def fuzz(text):
        assert ours.encode(text).tolist() == merged.encode(text).tolist() == oracle.encode_ordinary(text)
        assert ours.encode(text, special=True).tolist() == oracle.encode(text, allowed_special='all')
    fuzz()


def test_names_are_those_of_the_content(pairs, tmp_path):
    ours, _ = pairs('trained')
    changes = {'a': {}, 'b': {'end': '<|end|>'}, 'c': {'runs': range(10, 1, -1)}, 'd': {'vocab_size': 999}}
    for folder, change in changes.items():
        (tmp_path / folder).mkdir()
        train(tmp_path / folder, **change)
    (tmp_path / 'b' / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<|end|>"}}')
    names = [get_tokenizer(str(tmp_path / folder)).name for folder in 'abcd']
    assert names[0] == ours.name and len(set(names)) == 4 and all(len(name) == 12 for name in names)
    assert get_tokenizer(str(tmp_path / 'b')).eot == 0
    assert find_tokenizer(names[2], [tmp_path / 'none', tmp_path / 'a', tmp_path / 'c']).name == names[2]
    assert find_tokenizer('bytes') is data.BYTES
    with pytest.raises(DataError, match=r"no tokenizer bpe-0 in .*/a\. Say where .* --tokenizer FOLDER"):
        find_tokenizer('bpe-0', [tmp_path / 'a'])
    if FILES.exists():
        assert pairs('20B')[0][:3] == ('gpt-neox-20b', 50277, 0)
        shutil.copy(FILES / 'gpt2' / 'r50k_base.tiktoken', tmp_path)
        assert find_tokenizer('gpt2', [tmp_path]).vocab_size == 50257


def test_large_vocabularies_take_32_bits(pairs):
    ours, _ = pairs('trained')
    big = data._tokenizer('big', {0: b'a', 70000: b'b'}, {'<b>': 70000}, 0, lambda text: np.zeros(len(text), np.uint32))
    assert ours.encode('a').dtype == np.uint16 and big.encode('a').dtype == np.uint32
    assert big.encode('a<b>', special=True).tolist() == [0, 70000]


@pytest.mark.parametrize('at, value, expected', [
    (('model', 'type'), 'Unigram', "model 'Unigram', supported is 'BPE'"),
    (('model', 'byte_fallback'), True, 'byte_fallback True'), (('model', 'dropout'), 0.1, 'dropout 0.1'),
    (('model', 'ignore_merges'), True, 'ignore_merges'), (('model', 'continuing_subword_prefix'), '##', "prefix '##'"),
    (('normalizer',), {'type': 'NFKC'}, "normalizer 'NFKC', supported is None or 'NFC'"),
    (('pre_tokenizer', 'type'), 'Metaspace', "pre_tokenizer 'Metaspace'"),
    (('pre_tokenizer',), None, 'pre_tokenizer None'),
    (('pre_tokenizer', 'use_regex'), False, 'use_regex False'), (('decoder',), None, 'decoder None'),
    (('pre_tokenizer', 'add_prefix_space'), True, 'add_prefix_space True'),
    (('added_tokens', 1, 'lstrip'), True, "added token .*padding"), (('added_tokens', 4, 'content'), 'word', "'word'"),
    (('added_tokens', 1, 'normalized'), True, "added token .*padding"),
    (('added_tokens', 4, 'content'), ' ' * 99, 'lengths of added runs'),
    (('added_tokens', 0, 'content'), '<eos>', r"no end-of-text among its special tokens \['<eos>', '<|padding|>'\]"),
    (('model', 'merges', 5), 'Ġ zzz', "not a readable tokenizer .KeyError: 'Ġzzz'"),
    (('model',), None, 'not a readable'),
])
def test_tokenizers_that_would_not_be_exact(pairs, tmp_path, at, value, expected):
    pairs('trained')
    train(tmp_path)
    spec = json.loads((tmp_path / 'tokenizer.json').read_text())
    *path, last = at
    inner = spec
    for key in path:
        inner = inner[key]
    inner[last] = value
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
    with pytest.raises(DataError, match=expected) as error:
        get_tokenizer(str(tmp_path))
    assert 'tokenizer.json' in str(error.value)


def test_what_is_no_tokenizer(tmp_path, monkeypatch):
    for content in (b'{"model"', b'[]', b'\xff'):
        file = tmp_path / f'{len(content)}.json'
        file.write_bytes(content)
        with pytest.raises(DataError, match='not a readable tokenizer'):
            get_tokenizer(str(file))
    (tmp_path / 'r50k_base.tiktoken').write_bytes(b'IQ== 0\nIg== 1\n')
    for spec, expected in ((tmp_path, "not GPT-2's 2 tokens"), (tmp_path / 'none', "expected 'bytes', 'gpt2', a")):
        with pytest.raises(DataError, match=expected):
            get_tokenizer(str(spec))
    tiktoken = pytest.importorskip('tiktoken')

    def offline(name):
        raise ConnectionError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(DataError, match='no network.*Give a folder with r50k_base.tiktoken'):
        get_tokenizer('gpt2')
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(DataError, match='pip install tiktoken'):
        get_tokenizer('gpt2')


def test_merges_out_of_order(tmp_path):
    """tiktoken takes an id for the rank of a merge; where it is not, ids would be wrong without a word."""
    train(tmp_path)
    spec = json.loads((tmp_path / 'tokenizer.json').read_text())
    merges = spec['model']['merges']
    merges[300], merges[301] = merges[301], merges[300]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
    with pytest.raises(DataError, match='ids do not rise in the order of its merges'):
        get_tokenizer(str(tmp_path))


def test_bytes_without_a_token(tmp_path):
    train(tmp_path)
    spec = json.loads((tmp_path / 'tokenizer.json').read_text())
    del spec['model']['vocab']['!']
    spec['model']['merges'] = [pair for pair in spec['model']['merges'] if '!' not in ''.join(pair)]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
    with pytest.raises(DataError, match='no token for byte 0x21'):
        get_tokenizer(str(tmp_path))


def test_special_text_of_bytes():
    assert data.BYTES.encode('a<|endoftext|>', special=True).tolist() == [97, 256]
    assert data.BYTES.encode(data.END).tolist() == list(data.END.encode())
