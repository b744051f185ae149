"""corpora/tokenizer.py: ids and texts equal those of `tokenizers` and of tiktoken, on any text."""
import base64
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOKENIZERS, train_bpe
from hypothesis import given, settings, strategies as st

import data
from configurator import UserError
from corpora import tokenizer as module
from corpora.formats import tokenizer_hash, write_shard
from corpora.tokenizer import END, BPETokenizer, LibraryTokenizer, find_tokenizer, load_tokenizer

tokenizers = pytest.importorskip('tokenizers', reason='our ids are compared with its ids')

PIECES = ('the', "don't WE'LL", 'Größe', 'zażółć', '漢字仮名', 'नमस्ते', 'שלום', '3.14', '½²',
          '__init__(', '😀👩\u200d👩\u200d👧', '<|', '|>', 'endoftext', END, '<|padding|>',
          f'{END}\u0338', '\0', '\x1c', '\x1f', '\r\n', '\n', '\n\n', '\t',
          '\x0b', '\x0c', '\x85', '\xa0', '\u1680',
          '\u2003', '\u2028', '\u202f', '\u3000', '\ufeff', '\u200b', 'e\u0301', '\u0301', 'Å',
          '\u0345\u0300', '\u1112\u1161\u11ab', '\u0958', '\ufb01', '\U00010ffff', '\uffff')
texts = st.lists(st.sampled_from(PIECES) | st.integers(1, 80).map(' '.__mul__) | st.text(max_size=8)
                 | st.builds(str.__mul__, st.sampled_from(' \n\t'), st.integers(1, 40)),
                 max_size=30).map(''.join)
LIBRARY = Path(json.__file__).parents[1]
TRAINING = [(LIBRARY / name).read_text('utf-8') for name in ('argparse.py', 'heapq.py')]
TRAINING += PIECES * 9


def train_llama(folder):
    """A tokenizer.json like those of Llama 3 and Qwen: another regex, other special tokens."""
    own, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    regex = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    own.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(regex), 'isolated'),
                                      pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    own.decoder = tokenizers.decoders.ByteLevel()
    own.train_from_iterator(TRAINING, tokenizers.trainers.BpeTrainer(
        vocab_size=1000, show_progress=False, special_tokens=['<|begin|>', '<|eot|>'],
        initial_alphabet=pre.ByteLevel.alphabet()))
    # As some published files ask for: a first token, a maximal length, padding.
    own.post_processor = tokenizers.processors.TemplateProcessing(
        '<|begin|> $A', special_tokens=[('<|begin|>', 0)])
    own.enable_truncation(5)
    own.enable_padding(length=9)
    own.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<|eot|>"}}')
    own.no_truncation()
    own.no_padding()
    return own


@pytest.fixture(scope='module', params=['trained', 'llama', '20B'])
def pair(request, tmp_path_factory):
    """(our tokenizer, that of the `tokenizers` library), of each kind in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == '20B':
        folder = TOKENIZERS / '20B_tokenizer.json'
        if not folder.exists():
            pytest.skip(f'{folder} does not exist. Set REWARM_TOKENIZERS to a folder with it.')
        oracle = tokenizers.Tokenizer.from_file(str(folder))
        assert load_tokenizer(str(folder)).name == 'gpt-neox-20b'
    else:
        is_llama = request.param == 'llama'
        oracle = train_llama(folder) if is_llama else train_bpe(folder, TRAINING, 1200)
    own = load_tokenizer(str(folder))
    assert isinstance(own, LibraryTokenizer if request.param == 'llama' else BPETokenizer)
    return own, oracle


def check(pair, text):
    """Ids and decoded text, with special tokens as ordinary text and as what they are."""
    own, oracle = pair
    for special in (False, True):
        oracle.encode_special_tokens = not special
        expected, ids = oracle.encode(text, add_special_tokens=False).ids, own.encode(text, special)
        assert ids.tolist() == expected, (text, special)
        assert ids.dtype == np.uint16
        assert own.decode(ids) == oracle.decode(expected, skip_special_tokens=False)
        assert special or own.eot not in expected


def test_ids_are_equal_on_any_text(pair):
    for n in range(80):                                         # runs of spaces, alone and not
        run = ' ' * n
        for text in (run, f'x{run}', f'{run}x', f'\n{run}\n\t{run}1'):
            check(pair, text)

    @settings(max_examples=120, deadline=None)
    @given(texts)
    def fuzz(text):
        check(pair, text)
    fuzz()


def test_ids_are_equal_on_every_code_point(pair):
    """A random fortieth of them. (The NFC of the library itself lacks 51 newer marks.)"""
    own, oracle = pair
    start = random.randrange(40)
    print(f'from {start}')
    points = [chr(i) for i in range(start, 0x110000, 40) if not 0xd800 <= i < 0xe000]
    for i in range(0, len(points), 1000):
        line = ''.join(f'a{c}b {c}\u0301' for c in points[i:i + 1000])
        check(pair, unicodedata.normalize('NFC', line) if oracle.normalizer else line)


def test_every_id_has_a_text(pair):
    """Also ids that no text gives, since a model may draw them; and ids that no token has."""
    own, oracle = pair
    assert own.vocab_size == oracle.get_vocab_size()
    every = range(own.vocab_size)
    for ids in [[i] for i in every] + [random.choices(every, k=3000)]:
        assert own.decode(ids) == oracle.decode(ids, skip_special_tokens=False), ids
    own.decode([own.vocab_size, 70000])


@pytest.mark.parametrize('unit', ['a', ' ', '\n', '漢', '\n ', '\r\n', '\x1c\t', '\u2003\u3000'])
def test_long_runs_of_one_kind(pair, unit, monkeypatch):
    """Very long white space takes a path of its own; here it is long after 100 characters."""
    monkeypatch.setattr(module, 'LONG_RUN', 100)
    mixed = f'{" " * 25}{unit * 150} x  {unit * 151}\x1c{unit * 20}y'
    for text in (unit * 150, f'x{unit * 150}', f'{unit * 150}x', mixed):
        check(pair, text)


@pytest.mark.parametrize('unit', ['\n', ' \n', ' ', 'a'])
def test_a_million_characters_of_one_kind(bpe, unit):
    """They fit into no stack, and the time must not grow with the square of their number."""
    own, text = load_tokenizer(str(bpe)), 'x' + unit * (1_000_000 // len(unit)) + 'x'
    assert own.decode(own.encode(text)) == text


def test_gpt2_equals_tiktoken():
    """Built from OpenAI's merges; tiktoken has a regex and a file of ranks of its own."""
    tiktoken = pytest.importorskip('tiktoken')
    public = pytest.importorskip('tiktoken_ext.openai_public')
    if not (TOKENIZERS / 'gpt2').exists():
        pytest.skip(f'{TOKENIZERS}/gpt2 does not exist. Set REWARM_TOKENIZERS.')
    lines = (TOKENIZERS / 'gpt2' / 'r50k_base.tiktoken').read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    oracle = tiktoken.Encoding('gpt2', pat_str=public.r50k_pat_str, mergeable_ranks=ranks,
                               special_tokens={END: 50256})
    own = load_tokenizer(str(TOKENIZERS / 'gpt2'))
    assert (own.name, own.vocab_size, own.eot) == ('gpt2', 50257, 50256)
    assert find_tokenizer('gpt2', TOKENIZERS / 'gpt2').name == 'gpt2'

    @settings(max_examples=100, deadline=None)
    @given(texts)
    def fuzz(text):
        assert own.encode(text).tolist() == oracle.encode_ordinary(text)
        assert own.encode(text, special=True).tolist() == oracle.encode(text, allowed_special='all')
    fuzz()


def edited(bpe, folder, path, value):
    """The tokenizer.json of `bpe` with one value changed, in another folder."""
    spec = json.loads((bpe / 'tokenizer.json').read_text('utf-8'))
    *keys, last = path.split('.')
    inner = spec
    for key in keys:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value(inner[last]) if callable(value) else value
    (folder / 'tokenizer.json').write_text(json.dumps(spec))
    return str(folder)


@pytest.mark.parametrize('path, value', [
    ('model.byte_fallback', True), ('model.ignore_merges', True), ('normalizer', {'type': 'NFKC'}),
    ('model.end_of_word_suffix', '</w>'), ('model.merges', lambda m: [m[1], m[0], *m[2:]]),
    ('pre_tokenizer.use_regex', False), ('pre_tokenizer.add_prefix_space', True),
    ('added_tokens.1.lstrip', True), ('added_tokens.1.normalized', True),
    ('added_tokens.4.content', 'word')])
def test_other_tokenizers_go_through_the_library(tmp_path, bpe, path, value):
    """tiktoken would give other ids for some texts."""
    own = load_tokenizer(edited(bpe, tmp_path, path, value))
    assert isinstance(own, LibraryTokenizer)
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    oracle.encode_special_tokens = True
    for text in (*PIECES, 'a word', ' abc', 'ghij' * 5):
        assert own.encode(text).tolist() == oracle.encode(text, add_special_tokens=False).ids


def test_a_document_cannot_contain_end_of_text(tmp_path):
    """T5's vocabulary has end-of-text as a piece like any other. Such a document is refused."""
    pieces = [('<unk>', 0.0), ('</s>', 0.0), *((letter, -1.0) for letter in '</s> abc')]
    own = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    own.add_special_tokens(['</s>'])
    own.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    own = load_tokenizer(str(tmp_path))
    assert 1 == own.eot not in own.encode('a b</')
    assert own.encode('a</s>', special=True).tolist()[-1] == 1
    with pytest.raises(module.BadDocument, match='contains end-of-text'):
        own.encode('a</s>')


def test_names_follow_the_content(tmp_path, bpe):
    (tmp_path / 'copy').mkdir()
    same = load_tokenizer(edited(bpe, tmp_path / 'copy', 'version', '1.0'))
    own = load_tokenizer(str(bpe))
    train_bpe(tmp_path, TRAINING, 400, end='<|end|>')
    with pytest.raises(UserError, match='no end-of-text among its special tokens'):
        load_tokenizer(str(tmp_path))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<|end|>"}')
    longer = load_tokenizer(str(tmp_path))
    assert own.name == same.name != longer.name and longer.eot == 0 and len(longer.files) == 2
    for which in (own.name, tokenizer_hash(own.name), None):
        assert find_tokenizer(which, bpe).name == own.name
    for which in ('bytes', tokenizer_hash('bytes')):
        assert find_tokenizer(which, tmp_path).name == find_tokenizer(which, 'none').name == 'bytes'
    for which, folder in ((own.name, tmp_path), (None, 'none')):
        with pytest.raises(UserError, match='does not contain the tokenizer.* --tokenizer FOLDER'):
            find_tokenizer(which, folder)


@pytest.mark.parametrize('content', [
    b'{"model"', b'[]', b'\xff', b'[' * 100_000, b'', 0.5, '3', -1, 10**12, 2**70])
def test_files_that_are_no_tokenizer(tmp_path, bpe, content):
    with pytest.raises(UserError, match="expected 'bytes', 'gpt2'"):
        load_tokenizer(str(tmp_path))
    if isinstance(content, bytes):
        (tmp_path / 'tokenizer.json').write_bytes(content)
    else:                                                       # the id of a token
        edited(bpe, tmp_path, 'model.vocab.a', content)
    with pytest.raises(UserError, match=f'{tmp_path}.*not a valid tokenizer.json'):
        load_tokenizer(str(tmp_path))


def test_missing_packages_and_networks(monkeypatch):
    tiktoken = pytest.importorskip('tiktoken')

    def offline(name):
        raise ConnectionError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(UserError, match='GPT-2 cannot be downloaded .* Name a folder'):
        load_tokenizer('gpt2')
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(UserError, match='pip install tiktoken'):
        load_tokenizer('gpt2')


# --- bytes, and files for transformers -----------------------------------------------------------

@given(st.text())
def test_bytes_round_trip(text):
    own = load_tokenizer('bytes')
    assert own.encode(text).dtype == np.uint16 and own.decode(own.encode(text)) == text
    assert own.encode(text + END, special=True).tolist() == [*text.encode(), 256]
    assert own.decode([104, 105, 256, 0xc3, 999]) == f'hi{END}\ufffd\ufffd'


@pytest.mark.parametrize('spec', ['bytes', 'bpe'])
def test_transformers_opens_our_tokenizers(tmp_path, bpe, spec):
    transformers = pytest.importorskip('transformers')
    own = load_tokenizer(spec if spec == 'bytes' else str(bpe))
    for name, content in module.hugging_face_files(own).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id) == (own.vocab_size, own.eot)
    assert load_tokenizer(str(tmp_path)).name == own.name

    @settings(max_examples=150, deadline=None)
    @given(texts | st.text())
    def fuzz(text):
        ids = own.encode(text, special=True).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == own.decode(ids)
        assert spec != 'bytes' or own.decode(ids) == text
    fuzz()


def test_the_text_of_shards_is_shown(tmp_path):
    ids = [*'Größe'.encode(), 256]
    write_shard(tmp_path / 'a.bin', ids, vocab_size=257, tokenizer='bytes')
    write_shard(tmp_path / 'b.bin', [1], vocab_size=257, tokenizer='another')
    command = [sys.executable, '-X', 'utf8', '-m', 'corpora.tokenizer']
    run = subprocess.run([*command, tmp_path / 'a.bin', tmp_path / 'b.bin'], cwd=ROOT,
                         capture_output=True, text=True)
    assert f'8 tokens of bytes\nGröße{END}' in run.stdout
    assert run.stderr.startswith('tokenizer: ') and run.stderr.count('\n') == run.returncode == 1
