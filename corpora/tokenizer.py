"""Tokenizers: text to ids and back.

    tokenizer = load_tokenizer('weights/pythia-410m')    # or 'bytes', 'gpt2', a tokenizer.json
    ids = tokenizer.encode('any text')                   # numpy array [n], without end-of-text
    text = tokenizer.decode(ids)

No document can end early because it contains the text <|endoftext|>: encode() reads special tokens
as ordinary text, unless it is called with special=True.

    python -m corpora.tokenizer data/mine/*.bin          # print how the text of each shard begins
"""
import functools
import importlib
import json
import re
import sys
import unicodedata
from hashlib import blake2b
from pathlib import Path

import numpy as np

import data
from configurator import UserError, require
from corpora import formats

END = '<|endoftext|>'


class BadDocument(Exception):
    """A document that cannot be used. The message says why, and detail what is special here."""

    def __init__(self, message, detail=''):
        super().__init__(message)
        self.detail = detail


class ByteTokenizer:
    """The UTF-8 bytes of the text are the ids; 256 is end-of-text.

    Every tokenizer has these attributes. name: says what it does, not where its files are; shards
    contain a hash of it. vocab_size: the largest id + 1. eot: the id of end-of-text. files: {name:
    Path} of the files to copy beside shards ('bytes' and 'gpt2' need none).
    """

    name, vocab_size, eot, files = 'bytes', 257, 256, {}
    special = {END: 256}                                        # {text: id}
    bytes_of = {i: bytes([i]) for i in range(256)} | {256: END.encode()}

    def encode(self, text, special=False):
        """The ids [n] of a text, without end-of-text. special: take special tokens as such."""
        if not special:
            return self.encode_ordinary(text).astype(formats.token_type(self.vocab_size))

        # The pattern is a group, so split() also returns what it splits at: every second part.
        longest_first = sorted(self.special, key=len, reverse=True)
        parts = re.split('(' + '|'.join(map(re.escape, longest_first)) + ')', text)
        ids = [self.encode_ordinary(part) for part in parts]
        for i in range(1, len(parts), 2):
            ids[i] = [self.special[parts[i]]]
        return np.concatenate(ids).astype(formats.token_type(self.vocab_size))

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode('utf-8'), np.uint8)

    def decode(self, ids):
        """The text of ids [n]. Invalid UTF-8 and unused ids become U+FFFD."""
        tokens = [self.bytes_of.get(i, b'\xef\xbf\xbd') for i in np.asarray(ids).tolist()]
        return b''.join(tokens).decode('utf-8', errors='replace')


# Unicode's white space, without the plain space. (Python's \s has four control characters more.)
BLANK = '\t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
# The regex engine needs an entry on its stack for each blank, and has room for a million.
LONG_RUN = 200_000
# Digest of everything that decides the ids: name.
KNOWN = {'fdceed2b': 'gpt2', 'f4175ad0': 'gpt-neox-20b'}


class BPETokenizer(ByteTokenizer):
    """Byte-level BPE with GPT-2's regex, by tiktoken, with exactly the ids of `tokenizers`.

    ranks {bytes: id}: single bytes, and merged tokens in the order of their merges.
    special {text: id}. spaces {n: id}: added tokens of n spaces, as in GPT-NeoX-20B.
    nfc: normalize text first. unused {id: bytes}: tokens that a model may draw, but no text gives.
    """

    def __init__(self, ranks, special, eot, files, spaces={}, nfc=False, unused={}):
        ranks = ranks | {b' ' * n: i for n, i in spaces.items()}
        content = repr((sorted(ranks.items()), sorted(special.items()), nfc))
        digest = blake2b(content.encode(), digest_size=4).hexdigest()
        self.name = KNOWN.get(digest, f'bpe-{digest}')
        self.special, self.eot, self.files, self.nfc = special, eot, files, nfc
        self.bytes_of = unused | {i: token for token, i in ranks.items()}
        self.bytes_of |= {i: text.encode() for text, i in special.items()}
        self.vocab_size = max(self.bytes_of) + 1

        # `tokenizers` cuts runs of spaces out before it does anything else, the longest first. So
        # they come first in the regex, and other blanks end where such a run begins.
        run = f' {{2,{max(spaces)}}}|' if spaces else ''
        blank = f'(?:[{BLANK}]| (?! ))' if spaces else f'[ {BLANK}]'
        blanks = f'{blank}+(?![^ {BLANK}])'
        words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
        tiktoken = import_optional('tiktoken').Encoding(
            digest, pat_str=rf'{run}{words}|{blanks}|\s', mergeable_ranks=ranks,
            special_tokens=special)
        self.encode_pieces = functools.partial(tiktoken.encode_to_numpy, disallowed_special=())
        self.encode_piece = tiktoken._encode_single_piece
        self.blanks = re.compile(run + blanks)

    def encode_ordinary(self, text):
        if self.nfc:
            text = unicodedata.normalize('NFC', text)
        parts, start = [], 0
        if len(text) > LONG_RUN:
            # A very long run of blanks must not reach the regex, which would make it one piece.
            for match in self.blanks.finditer(text):
                if len(match[0]) > LONG_RUN:
                    before = self.encode_pieces(text[start:match.start()])
                    parts += [before, self.encode_piece(match[0])]
                    start = match.end()
        return np.concatenate([*parts, self.encode_pieces(text[start:])])


class LibraryTokenizer:
    """A tokenizer.json of any kind (Llama, Qwen, ...), by the `tokenizers` library."""

    def __init__(self, spec, eot, files):
        tokenizers = import_optional('tokenizers')
        self.library = tokenizers.Tokenizer.from_file(str(files['tokenizer.json']))
        # The file may ask for a maximal length or for padding; a corpus wants neither.
        self.library.no_truncation()
        self.library.no_padding()
        parts = [spec.get(key) for key in ('model', 'normalizer', 'pre_tokenizer', 'added_tokens')]
        digest = blake2b(json.dumps([parts, eot]).encode(), digest_size=4).hexdigest()
        self.name, self.eot, self.files = f'tokenizer-{digest}', eot, files
        self.vocab_size = max(self.library.get_vocab().values()) + 1

    def encode(self, text, special=False):
        """As above. BadDocument when ordinary text gives end-of-text, as it can with T5's."""
        self.library.encode_special_tokens = not special
        (found,) = self.library.encode_batch_fast([text], add_special_tokens=False)
        if self.eot in found.ids and not special:
            raise BadDocument('contains end-of-text')
        return np.array(found.ids, formats.token_type(self.vocab_size))

    def decode(self, ids):
        """The text of ids [n]; unused ids give nothing."""
        return self.library.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


# --- where tokenizers come from ------------------------------------------------------------------

@functools.lru_cache
def load_tokenizer(spec):
    """The tokenizer of a spec: 'bytes', 'gpt2' (tiktoken downloads it once), or a path.

    A path is a tokenizer.json, or a folder with one (a Hugging Face directory) or with GPT-2's own
    vocab.bpe. UserError when there is none, or when it has no end-of-text.
    """
    if spec == 'bytes':
        return ByteTokenizer()
    files = tokenizer_files(spec) if spec != 'gpt2' else {}
    require(files or spec == 'gpt2', f"tokenizer {spec}: expected 'bytes', 'gpt2', a "
            "tokenizer.json, or a folder that contains a tokenizer.json or GPT-2's vocab.bpe.")
    if 'tokenizer.json' in files:
        return read_json(files)
    ranks = read_vocab_bpe(files['vocab.bpe']) if files else download_gpt2()
    tokenizer = BPETokenizer(ranks, {END: 50256}, 50256, files)
    require(tokenizer.name == 'gpt2', f"{spec}: these are not GPT-2's merges.")
    return tokenizer


def tokenizer_files(path):
    """{name to copy it under: Path} of the tokenizer files at a path; {} when there are none."""
    path = Path(path)
    if path.is_dir():
        return tokenizer_files(path / 'tokenizer.json') or tokenizer_files(path / 'vocab.bpe')
    if not path.is_file() or path.suffix not in ('.json', '.bpe'):
        return {}
    if path.suffix == '.bpe':
        return {'vocab.bpe': path}
    config = path.with_name('tokenizer_config.json')
    return {'tokenizer.json': path} | ({config.name: config} if config.is_file() else {})


def find_tokenizer(which, folder):
    """The tokenizer of a run or of a shard; folder contains its files, if it needs any.

    which: its name, its hash from the header of a shard, or None for whatever the folder contains.
    """
    wanted = formats.tokenizer_hash(which) if isinstance(which, str) else which
    if tokenizer_files(folder):
        tokenizer = load_tokenizer(str(Path(folder).resolve()))
        if wanted in (None, formats.tokenizer_hash(tokenizer.name)):
            return tokenizer
    for name in ('bytes', 'gpt2'):
        if wanted == formats.tokenizer_hash(name):
            return load_tokenizer(name)
    name = which if isinstance(which, str) else 'of this model'
    raise UserError(f'{folder} does not contain the tokenizer {name}. Name the folder with its '
                    'tokenizer.json: --tokenizer FOLDER')


def import_optional(module):
    """A module of a package that not everybody needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split('.')[0].replace('sklearn', 'scikit-learn')
        raise UserError(f'{package} is not installed. Run: pip install {package}') from None


def download_gpt2():
    """GPT-2's ranks {bytes: id}, from tiktoken's cache or the network."""
    tiktoken = import_optional('tiktoken')
    try:
        return tiktoken.get_encoding('r50k_base')._mergeable_ranks
    except (OSError, ValueError) as error:
        raise UserError(f'GPT-2 cannot be downloaded ({type(error).__name__}). Name a folder that '
                        "contains GPT-2's tokenizer.json or vocab.bpe instead.") from None


# GPT-2's files write a byte as a letter: a printable one as itself, the others from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def to_bytes(token):
    """The bytes of a token as GPT-2's files write it. Added tokens are written as plain text."""
    if set(token) <= BYTE_OF.keys():
        return bytes(BYTE_OF[letter] for letter in token)
    return token.encode('utf-8')


def read_vocab_bpe(path):
    """GPT-2's ranks {bytes: id} from its list of merges: the bytes first, then a token a line."""
    ranks = {bytes([b]): i for i, b in enumerate(PRINTABLE + OTHERS)}
    for line in path.read_text('utf-8').splitlines()[1:]:       # the first line is a version
        ranks[to_bytes(line.replace(' ', ''))] = len(ranks)
    return ranks


def read_json(files):
    """The tokenizer of {'tokenizer.json': Path, ...}: by tiktoken where that gives the same ids,
    else by the `tokenizers` library, which takes four times as long."""
    path = files['tokenizer.json']
    try:
        spec, *config = [json.loads(file.read_bytes()) for file in files.values()]
        if spec == byte_level_json():
            return ByteTokenizer()
        special = {t['content']: t['id'] for t in spec['added_tokens'] if t['special']}
        eot = special.get(END)
        if eot is None and config:
            name = config[0].get('eos_token')
            eot = special.get(name['content'] if isinstance(name, dict) else name)
        require(eot is not None, f'{path}: no end-of-text among its special tokens. Expected {END} '
                                 'or the eos_token of a tokenizer_config.json beside it.')
        tables = gpt2_tables(spec)
        if tables:
            return BPETokenizer(special=special, eot=eot, files=files, **tables)
        return LibraryTokenizer(spec, eot, files)
    except UserError:
        raise
    except Exception as error:                                  # the library raises no better one
        raise UserError(f'{path} is not a valid tokenizer.json ({type(error).__name__}: '
                        f'{str(error)[:200]}).') from None


def gpt2_tables(spec):
    """What a BPETokenizer needs of a tokenizer.json, or None when it would give other ids.

    Supported are byte-level BPE with GPT-2's regex, at most NFC before it, and no added tokens but
    special ones and runs of 2, 3, 4, ... spaces.
    """
    model, nfc = spec['model'], spec.get('normalizer')
    before = spec.get('pre_tokenizer') or {}
    other_options = ('dropout', 'byte_fallback', 'ignore_merges', 'continuing_subword_prefix',
                     'end_of_word_suffix')
    if not (model['type'] == 'BPE' and before.get('type') == 'ByteLevel'
            and before.get('use_regex', True) and not before['add_prefix_space']
            and nfc in (None, {'type': 'NFC'}) and not any(model.get(o) for o in other_options)):
        return None

    added = spec['added_tokens']
    runs = {t['content']: t['id'] for t in added if not t['special']}
    if (set(runs) != {' ' * n for n in range(2, len(runs) + 2)}
            or any(t['single_word'] or t['lstrip'] or t['rstrip'] for t in added)
            or any(t['special'] and t['normalized'] and nfc for t in added)):
        return None

    # tiktoken merges the pair with the lowest id first, and every byte of UTF-8 needs a token.
    vocab = model['vocab']
    bytes_of = {i: to_bytes(token) for token, i in vocab.items()}
    merged = [vocab[''.join(pair).replace(' ', '')] for pair in model['merges']]
    single = [vocab[letter] for letter in BYTE_OF if letter in vocab]
    ranks = {bytes_of[i]: i for i in single + merged}
    utf8 = [*range(0xc0), *range(0xc2, 0xf5)]
    if merged != sorted(set(merged)) or any(bytes([b]) not in ranks for b in utf8):
        return None
    return {'ranks': ranks, 'spaces': {len(run): i for run, i in runs.items()},
            'nfc': nfc is not None, 'unused': bytes_of}


# --- tokenizers for transformers -----------------------------------------------------------------

def hugging_face_files(tokenizer):
    """{name: bytes} of the files with which transformers opens a tokenizer; {} for 'gpt2'."""
    files = {name: path.read_bytes() for name, path in tokenizer.files.items()}
    if tokenizer.name == 'bytes':
        files['tokenizer.json'] = json.dumps(byte_level_json()).encode()
    if 'tokenizer.json' in files and 'tokenizer_config.json' not in files:
        # AutoTokenizer opens the one only with the other.
        end = tokenizer.decode([tokenizer.eot])
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': end, 'eos_token': end,
                  'clean_up_tokenization_spaces': False}
        files['tokenizer_config.json'] = json.dumps(config).encode()
    return files


def byte_level_json():
    """The content of a tokenizer.json for the byte tokenizer: byte-level BPE without merges."""
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                  'use_regex': False}
    end = {'id': 256, 'content': END, 'special': True, 'normalized': False,
           'single_word': False, 'lstrip': False, 'rstrip': False}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [end],
            'normalizer': None, 'pre_tokenizer': byte_level, 'post_processor': None,
            'decoder': byte_level, 'model': {'type': 'BPE', 'vocab': BYTE_OF, 'merges': []}}


def main():
    for path in sys.argv[1:]:
        shard = data.open_shard(path)
        tokenizer = find_tokenizer(shard.tokenizer, Path(path).parent)
        ids = np.fromfile(path, shard.dtype, 256, offset=shard.offset)
        print(f'{path}: {shard.count:,} tokens of {tokenizer.name}\n{tokenizer.decode(ids)}\n')


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f'tokenizer: {error}')
