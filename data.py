"""Token shards, a deterministic order and mixtures with replay; then, how text becomes shards.

The loader has no state to save. All follows from the number g of a sample, counted over the whole run:

    global sample g -> phase -> source, local index m -> epoch, position -> permuted window -> shard, offset
    rows() of a step   Mixture: who is next, exactly     Source.order: each window once        one read

so a resumed run needs its step only, and any number of processes or micro-batches sees the same samples in
the same step. Nothing is drawn at random; nothing but a list of shards grows with the corpus. That is the first half of
this file, all that training reads. The second half makes shards: tokenizers, corpora, the embedded ones among them.

    python data.py prepare docs                     # an embedded corpus: docs (English), code (Python), ...
    python data.py prepare mine notes.jsonl a.txt   # your text, to train and val shards in data/mine
    python data.py prepare slim raw/slim --tokenizer weights/pythia-410m --by meta.redpajama_set_name
    python data.py info data/mine/*.bin

Shapes: B rows of a batch, T = block_size tokens of a row; a window is T + 1 tokens (inputs, shifted targets).
"""
import argparse
import ast
import base64
import bisect
import concurrent.futures
import contextlib
import difflib
import errno
import functools
import gc
import glob
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import tokenize
import unicodedata
import warnings
import zlib
from collections import Counter, deque, namedtuple
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from tqdm import tqdm


class DataError(ValueError):
    """The data, or what is asked of them, is wrong; the message says what was found and how to mend it."""


# --- shards --------------------------------------------------------------------------------------------
# llm.c's .bin: 256 little-endian int32 words, then the ids. llm.c fills words 0 to 2 and leaves the rest
# zero. We use some of the rest (zero = unknown), so its shards open here and ours open there:
#   0 magic, 1 version, 2 tokens, 3 bytes per token, 4 vocabulary size, 5 end-of-text id + 1,
#   6 tokenizer_hash, 7 and 8 bytes of text, low and high 31 bits (for bits per byte with any tokenizer)

HEADER_BYTES = 1024
FORMATS = {20240520: (1, np.dtype('<u2')), 20240801: (7, np.dtype('<u4'))}     # magic: version, type of ids
PIECE = re.compile(r'-(\d{5})-of-(\d{5})$')
MEGATRON_TYPES = {1: 'u1', 2: 'i1', 3: '<i2', 4: '<i4', 5: '<i8', 8: '<u2'}    # 6 and 7 are floats


class Shard(NamedTuple):
    """One file of token ids. None: the file does not say."""
    path: str
    format: str                         # 'llm.c' | 'headerless' | 'Megatron'
    offset: int                         # bytes before the first token
    dtype: np.dtype
    count: int                          # tokens
    vocab_size: Optional[int] = None
    eot: Optional[int] = None           # end-of-text id
    tokenizer: Optional[int] = None     # tokenizer_hash
    text_bytes: Optional[int] = None    # bytes of the text behind the tokens
    record: Optional[int] = None        # Megatron: the length of its sequences, when all have the same

    def read(self, start, n):
        """The n ids from token `start` on, [n].

        Not a memmap: a file that is cut under a running job gives a message and not a bus error, thousands of
        shards hold no handles, and resident memory stays flat. To open the file anew costs 10 microseconds.
        """
        n_bytes = n * self.dtype.itemsize
        try:
            with open(self.path, 'rb', buffering=0) as f:
                f.seek(self.offset + start * self.dtype.itemsize)
                raw = f.read(n_bytes)
        except OSError as error:
            raise DataError(f'{self.path}: cannot be read any more ({error.strerror}).') from None
        if len(raw) != n_bytes:
            raise DataError(f'{self.path}: tokens {start:,} to {start + n:,} cannot be read; the file held '
                            f'{self.count:,} when it was opened. It was cut since: prepare it again.')
        return np.frombuffer(raw, self.dtype)


def token_type(vocab_size):
    """The type of ids in a shard: uint16 for vocabularies up to 65,536, else uint32."""
    return np.dtype('<u2' if vocab_size <= 2 ** 16 else '<u4')


def _header(count, vocab_size, eot, tokenizer, text_bytes):
    magic = next(magic for magic, (_, dtype) in FORMATS.items() if dtype == token_type(vocab_size))
    words = [magic, FORMATS[magic][0], count, token_type(vocab_size).itemsize, vocab_size,
             0 if eot is None else eot + 1, tokenizer_hash(tokenizer) if tokenizer else 0,
             text_bytes % 2 ** 31, text_bytes >> 31]
    return np.array(words, '<i4').tobytes().ljust(HEADER_BYTES, b'\0')


def write_shard(path, tokens, *, vocab_size, eot=None, tokenizer=None, text_bytes=0):
    """Write ids [n] as one shard, which appears under `path` whole or not at all.

    uint16 for vocabularies up to 65,536, else uint32. tokenizer: its name. text_bytes: of the text encoded.
    DataError for no tokens, 2^31 or more (llm.c's count is an int32), or ids outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if not 0 < len(tokens) < 2 ** 31:
        raise DataError(f'{path}: {len(tokens):,} tokens; a shard holds 1 to {2 ** 31 - 1:,}. Write several.')
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(f'{path}: ids {tokens.min()} to {tokens.max()}, but a vocabulary of {vocab_size:,}.')
    temp = f'{path}.tmp{os.getpid()}'
    try:
        with open(temp, 'wb') as f:
            f.write(_header(len(tokens), vocab_size, eot, tokenizer, text_bytes))
            f.write(tokens.astype(token_type(vocab_size), copy=False).data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        Path(temp).unlink(missing_ok=True)


def open_shard(path):
    """A Shard, from a file's header and size alone; its tokens stay unread.

    Opens llm.c shards (ours too), headerless uint16 files as nanoGPT writes, and GPT-NeoX (Megatron) .bin
    with an .idx beside it; also a piece X-00003-of-00020.bin of a big one, as Pythia's Pile comes, with X.idx beside:
    the whole records in it. A record that the cut between two pieces goes through is in none. DataError for
    anything else, and for sizes that do not agree.
    """
    path = str(path)
    try:
        with open(path, 'rb', buffering=0) as f:
            head, size = f.read(HEADER_BYTES), os.fstat(f.fileno()).st_size
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror}). Give files, as folder/*.bin.') from None
    if size == 0:
        raise DataError(f'{path}: the file is empty. Prepare it again.')
    if int.from_bytes(head[:4], 'little') in FORMATS:
        return _open_llmc(path, head, size)
    index = PIECE.sub('', path[:-4]) + '.idx'
    if path.endswith('.bin') and os.path.exists(index):
        return _open_megatron(path, index, size)
    if PIECE.search(path[:-4]):
        raise DataError(f'{path}: a piece of a bigger file, whose {index} is missing. Copy it beside the pieces.')
    if why := _not_headerless(head, size):
        magics = ' or '.join(map(str, FORMATS))
        raise DataError(f'{path}: not a token shard: {why}. Expected a header with magic {magics}, a '
                        'Megatron .bin with its .idx, or uint16 ids without a header.')
    return Shard(path, 'headerless', 0, np.dtype('<u2'), size // 2)


def _open_llmc(path, head, size):
    if len(head) < HEADER_BYTES:
        raise DataError(f'{path}: {size:,} bytes, cut within the {HEADER_BYTES}-byte header. Copy it again.')
    magic, version, count, itemsize, vocab, eot, tokenizer, low, high = np.frombuffer(head, '<i4', 9).tolist()
    expected, dtype = FORMATS[magic]
    if version != expected or itemsize not in (0, dtype.itemsize) or count <= 0:
        raise DataError(f'{path}: magic {magic}, version {version}, {count:,} tokens of {itemsize} bytes; '
                        f'expected version {expected}, {dtype.itemsize} bytes. Damaged, or newer than us?')
    if size != HEADER_BYTES + count * dtype.itemsize:
        raise DataError(f'{path}: the header says {count:,} tokens, the file holds '
                        f'{(size - HEADER_BYTES) / dtype.itemsize:,.10g}. Copy or prepare it again.')
    return Shard(path, 'llm.c', HEADER_BYTES, dtype, count, vocab or None, eot - 1 if eot else None,
                 tokenizer or None, low + (high << 31) or None)


def _open_megatron(path, index, size):
    # MMapIndexedDataset's .idx: magic (9 bytes), version (8), type of ids (1), number of sequences (8) and of
    # documents (8), then the sequences' lengths as int32; where they lie follows from these.
    with open(index, 'rb') as f:
        head = f.read(34)
    code, n = int.from_bytes(head[17:18], 'little'), int.from_bytes(head[18:26], 'little')
    if head[:17] != b'MMIDIDX\0\0' + (1).to_bytes(8, 'little') or code not in MEGATRON_TYPES:
        raise DataError(f'{index}: not a Megatron index of version 1 with integer ids. If {path} is another '
                        'kind of file, move the .idx away.')
    if n == 0 or os.path.getsize(index) < 34 + 12 * n:
        raise DataError(f'{index}: cut short, {n:,} sequences need {34 + 12 * n:,} bytes. Copy it again.')
    lengths, dtype = np.memmap(index, '<i4', 'r', 34, (n,)), np.dtype(MEGATRON_TYPES[code])
    count = int(lengths.sum(dtype=np.int64))
    record = int(lengths[0]) if lengths.min() == lengths.max() else None
    if piece := PIECE.search(path[:-4]):
        return _open_piece(path, size, piece, count, dtype, record)
    if size != count * dtype.itemsize:
        raise DataError(f'{path}: its .idx says {count:,} tokens, it holds {size / dtype.itemsize:,.10g}. '
                        'Copy it again.')
    return Shard(path, 'Megatron', 0, dtype, count, record=record)


def _open_piece(path, size, piece, count, dtype, record):
    # All pieces are as long as the first, but for the last; they are cut by bytes, wherever a record may be.
    first, total = path[:piece.start()] + f'-00000-of-{piece[2]}.bin', count * dtype.itemsize
    k, last = map(int, piece.groups())
    own = os.path.getsize(first) if os.path.exists(first) else size
    start = total - size if k == last else k * own
    if not record or start != k * own and os.path.exists(first) or size != min(own, total - start):
        raise DataError(f'{path}: {size:,} bytes, piece {k} of a file of {total:,} bytes in records of {record} tokens '
                        f'(.idx), whose first piece has {own:,}. Copy it again; only pieces of equal records open.')
    skip = -start % (record * dtype.itemsize)
    records = (size - skip) // (record * dtype.itemsize)
    return Shard(path, 'Megatron', skip, dtype, records * record, record=record)


def _not_headerless(head, size):
    # A headerless file says nothing of itself: it is taken as uint16 ids unless something speaks against it.
    # It is never mistaken for one with a header: read as uint16, the magics start with ids 55432 and 55713,
    # beyond the vocabularies of GPT-2 and GPT-NeoX.
    ids = np.frombuffer(head[:len(head) // 2 * 2], '<u2')
    signatures = {b'PK\3\4': 'a zip or torch file', b'\x93NUMPY': 'a .npy file', b'\x1f\x8b\b': 'gzip',
                  b'\x28\xb5\x2f\xfd': 'zstd', b'PAR1': 'parquet', b'MMIDIDX': 'a Megatron .idx'}
    if kind := next((kind for start, kind in signatures.items() if head.startswith(start)), None):
        return f'found {kind}'
    if len(head) == HEADER_BYTES and not ids[32:].any():        # reserved words; text is not one id 480 times
        return f'found a header with magic {int.from_bytes(head[:4], "little")}'
    if len(ids) >= 8 and re.fullmatch(rb'[\t\n\r -~]+', head):
        return 'found plain text (python data.py prepare NAME FILE.txt makes shards)'
    if len(ids) >= 8 and not ids[1::2].any():
        return 'found 32-bit ids without a header (data.write_shard writes them with one)'
    return f'{size:,} bytes, an odd number; cut short?' if size % 2 else None


# What the big configs train on: how to get it (huggingface_hub's command-line tool) and prepare it.
DOWNLOADS = {
    'pile': """# all of it, 0.35 TB; README has a recipe for one GPU (Real corpora, real weights)
hf download monology/pile-uncopyrighted --repo-type dataset --local-dir raw/pile
hf download EleutherAI/pythia-410m tokenizer.json tokenizer_config.json --local-dir weights/pythia-410m
python data.py prepare pile raw/pile/train --val_files raw/pile/val.jsonl.zst --tokenizer weights/pythia-410m \\
    --data_dir {data_dir}""",
    'slimpajama': """# half of it, 0.45 TB; README has a recipe for one GPU (Real corpora, real weights)
hf download cerebras/SlimPajama-627B --repo-type dataset --local-dir raw/slimpajama \\
    --include 'train/chunk[1-5]/*' --include 'validation/chunk1/*'
hf download EleutherAI/pythia-410m tokenizer.json tokenizer_config.json --local-dir weights/pythia-410m
python data.py prepare slimpajama raw/slimpajama/train --val_files raw/slimpajama/validation \\
    --tokenizer weights/pythia-410m --data_dir {data_dir}""",
}


def find_shards(name, split, data_dir='data', paths=None):
    """The sorted files of a source's split, 'train' or 'val'.

    paths = {'pile/train': '/big/pile/*.bin'} (a glob, or a list of them) says where; without an entry, they
    are data_dir/name/split*.bin. DataError when nothing matches.
    """
    patterns = (paths or {}).get(f'{name}/{split}', os.path.join(data_dir, name, f'{split}*.bin'))
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if files := sorted({file for pattern in patterns for file in glob.glob(pattern)}):
        return files
    have = sorted(path.name for path in Path(data_dir).glob('[!.]*') if path.is_dir())
    near = difflib.get_close_matches(name, set(have) - {name}, 1)
    make = f'python data.py prepare {name} {"" if name in EMBEDDED else "FILE.jsonl... "}--data_dir {data_dir}'
    make = DOWNLOADS.get(name, make).format(data_dir=data_dir).replace('\n', '\n    ')
    raise DataError(f'no {split} shards of {name!r}: nothing matches {" ".join(patterns)} in {os.getcwd()}. '
                    f'{data_dir} holds {", ".join(have) or "nothing"}{"; did you mean " if near else ""}'
                    f"{near[0] + '?' if near else '.'} Say where they are, paths = {{'{name}/{split}': "
                    f"'folder/*.bin'}}, or make them:\n    {make}")


# --- order ---------------------------------------------------------------------------------------------

def permute(i, size, keys):
    """A keyed shuffle of [0, size): the places, uint64 [n], of the indices i, uint64 [n]. O(1) memory.

    A Feistel network on pairs of digits in base ceil(sqrt(size)), one round per key: a round adds a hash of
    one digit to the other, which can be undone whatever the hash, so no two indices meet. What lands at or
    past `size` walks on until it is inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    base, i = math.isqrt(size - 1) + 1, i.copy()
    outside = np.arange(len(i))
    while len(outside):
        left, right = np.divmod(i[outside], base)
        for key in keys:
            h = (right ^ key) * 0xBF58476D1CE4E5B9              # constants of splitmix64
            h = (h ^ h >> 32) * 0x94D049BB133111EB
            left, right = right, (left + (h ^ h >> 29) % base) % base
        i[outside] = left * base + right
        outside = outside[i[outside] >= size]
    return i


class Source:
    """A named list of shards, cut into len(source) windows of T + 1 tokens, none across shards.

    Windows start T tokens apart: neighbours share one token, and each token is a target at most once. Where a
    Megatron file's records all have T + 1 tokens (Pythia's pre-shuffled Pile), its records are the windows.
    key: seed of the order, or 'stored': the order of the files, in every epoch. vocab_size: the model's; ids at or past
    it, or the shards' own, are errors.
    """

    def __init__(self, name, files, block_size, *, key=0, vocab_size=None):
        self.name, self.block_size, self.key = name, block_size, key
        self.shards = [open_shard(file) for file in files]
        self.tokens = sum(shard.count for shard in self.shards)
        known = [shard.vocab_size for shard in self.shards if shard.vocab_size]
        self.vocab_size = min([vocab_size or 2 ** 63, *known])
        is_record = np.array([shard.record == block_size + 1 for shard in self.shards])
        counts = np.array([shard.count for shard in self.shards])
        self.strides = block_size + is_record                   # T, or T + 1 for records
        windows = (counts - ~is_record) // self.strides         # n tokens hold (n - 1) // T windows
        self.ends = np.cumsum(windows)                          # windows in all shards up to this one
        self.starts = self.ends - windows
        if len(self) == 0:
            raise DataError(f'{name}: a window is block_size + 1 = {block_size + 1:,} tokens, the longest '
                            f'shard, {files[counts.argmax()]}, holds {counts.max():,}. Give more text, or a '
                            'smaller block_size.')

    def __len__(self):
        return int(self.ends[-1])

    @property
    def bytes_per_token(self):
        """Bytes of text per token, for bits per byte; None when a shard does not say."""
        text_bytes = [shard.text_bytes for shard in self.shards]
        return sum(text_bytes) / self.tokens if all(text_bytes) else None

    def order(self, m):
        """Windows, int64 [n], of local indices m [n]: epoch m // len(self), and every window once in each."""
        epoch, position = np.divmod(np.asarray(m, np.int64), len(self))
        if self.key == 'stored':
            return position
        windows = position.astype(np.uint64)
        for e in np.unique(epoch).tolist():
            # By name, not by place in a list: adding or moving a source never reshuffles another.
            digest = blake2b(f'{self.key}/{self.name}/{e}'.encode(), digest_size=48).digest()
            now = epoch == e
            windows[now] = permute(windows[now], len(self), np.frombuffer(digest, '<u8').tolist())
        return windows.astype(np.int64)

    def locate(self, windows):
        """Where windows [n] begin: index into self.shards [n], token offset [n]."""
        shard = np.searchsorted(self.ends, windows, side='right')
        return shard, (windows - self.starts[shard]) * self.strides[shard]

    def read(self, windows):
        """Yield the ids [T+1] of windows [n], as they are in the files."""
        for shard, offset in zip(*map(np.ndarray.tolist, self.locate(windows))):
            yield self.shards[shard].read(offset, self.block_size + 1)

    def window(self, i):
        """Window i, int64 [T+1]. DataError when an id is outside the vocabulary."""
        at = np.array([range(len(self))[i]])
        ids = next(self.read(at)).astype(np.int64)
        bad = np.flatnonzero(ids.view(np.uint64) >= self.vocab_size)    # as unsigned, negative ids are huge
        if len(bad):
            (shard,), (offset,) = self.locate(at)
            raise DataError(f'{self.name}: id {ids[bad[0]]:,} at token {offset + bad[0]:,} of '
                            f'{self.shards[shard].path} is outside the vocabulary of {self.vocab_size:,}. '
                            'Damaged, or made with another tokenizer (python data.py info FILE)?')
        return ids


def val_windows(source, n=0):
    """A fixed list of n windows, evenly spread over the source; all of them when n is 0 or too large."""
    n = min(n, len(source)) or len(source)
    return [i * len(source) // n for i in range(n)]


def check_compatible(sources, vocab_size):
    """DataError unless {label: Source} all fit a model of vocab_size and share one tokenizer.

    Compares what headers say and, as not every header does, looks at 8 windows of each source. Returns [what to
    tell the user]: whether documents end with an end-of-text in some sources, and seem not to in others.
    """
    first = None                                                # shard that names a tokenizer
    eot = next((shard.eot for source in sources.values() for shard in source.shards if shard.eot is not None), None)
    without = []
    for label, source in sources.items():
        for shard in source.shards:
            first = first or (shard if shard.tokenizer else None)
            if shard.tokenizer and shard.tokenizer != first.tokenizer:
                raise DataError(f'{label}: {shard.path} is made with tokenizer {_tokenizer_said(shard)}, '
                                f'{first.path} with {_tokenizer_said(first)}. Prepare both with the same.')
            if (shard.vocab_size or 0) > vocab_size:
                raise DataError(f'{label}: {shard.path} has a vocabulary of {shard.vocab_size:,}, the model '
                                f'vocab_size = {vocab_size:,}. Raise it, or use the tokenizer of the model.')
        source.vocab_size = min(source.vocab_size, vocab_size)
        seen = [eot in source.window(i) for i in val_windows(source, 8)]
        if not any(seen) and any(shard.eot is None for shard in source.shards):
            without.append(label)
    if eot is None or not without:
        return []
    return [f'NOTE: no end-of-text (id {eot}) found in {", ".join(without)}, but other sources have it: a token that a '
            'model never trained confounds a forgetting curve. See --eot in python data.py prepare --help']


def fingerprint(sources):
    """{name: plain values} of {name: Source} for a checkpoint: differs when the order or the data do."""
    return {name: {'files': [os.path.basename(shard.path) for shard in source.shards],
                   'tokens': [shard.count for shard in source.shards], 'block_size': source.block_size,
                   'windows': len(source), 'key': str(source.key)} for name, source in sources.items()}


# --- mixture -------------------------------------------------------------------------------------------

def _exact(weights, what):
    """{name: Fraction} of weights as written (0.05 is 1/20, not the nearest binary float), checked."""
    try:
        weights = {name: Fraction(str(weight)) for name, weight in weights.items()}
    except (ValueError, ZeroDivisionError):
        raise DataError(f'{what} = {weights}: every weight must be a finite number.') from None
    if min(weights.values(), default=0) < 0 or not any(weights.values()):
        raise DataError(f'{what} = { {name: float(w) for name, w in weights.items()} }: weights must not be '
                        'negative, and one must be above zero.')
    return weights


def mix_weights(train_data, replay_data=None, replay=0):
    """{name: weight} of new and old sources together: exact Fractions that sum to 1.

    Old data get the share `replay` of the samples and new data the rest, so total tokens are those of a run
    without replay ("compute-equivalent", Ibrahim et al. 2024).
    """
    try:
        share = Fraction(str(replay))
    except ValueError:
        share = Fraction(-1)
    if not 0 <= share < 1:
        raise DataError(f'replay = {replay}: the share of old data must be at least 0 and below 1.')
    if both := set(train_data) & set(replay_data or {}):
        raise DataError(f'{", ".join(sorted(both))}: in train_data and in replay_data; keep one.')
    if share and not replay_data:
        raise DataError(f"replay = {replay}, but replay_data is empty. Say what to replay: {{'docs': 1.0}}.")
    groups = [(1 - share, _exact(train_data, 'train_data'))]
    if share:
        groups.append((share, _exact(replay_data, 'replay_data')))
    return {name: part * w / sum(group.values()) for part, group in groups for name, w in group.items()}


# Who is next? Sources are the leaves of a Huffman tree over their weights: the two lightest nodes merge,
# again and again. At a node whose left child has share p = a / b, the left child gets round(n p) of the
# node's first n samples, so sample n goes left exactly where that count grows. Integers only: no drift,
# however long the run.
#
# Bound: how far is a source's count from its share? A child is off by e <= 1/2 + p e_parent: its own
# rounding, and its part of what its parent is off by. The root is off by 0. With p1 a leaf's share of its
# parent, p2 the parent's share of the grandparent and so on, a leaf is off by at most 1/2 (1 + p1 + p1 p2 +
# p1 p2 p3 + ...). In a Huffman tree p1 p2 <= 1/2, since a node is no heavier than its parent's sibling (else
# they had merged in another order). So the sum stays below 1/2 (1 + 1 + 1/2 + 1/2 + 1/4 + 1/4 + ...) = 2:
# every source is within 2 samples of its share at every prefix of a phase, for any weights; within 1/2 for
# two sources, 1 for three.

def _tree(weights):
    """A name, or (a, b, left tree, right tree). Ties go by name, so the order of the dict does not matter."""
    nodes = [(weight, name, name) for name, weight in weights.items() if weight]
    while len(nodes) > 1:
        (w1, name, left), (w2, _, right), *rest = sorted(nodes, key=lambda node: node[:2])
        p = w1 / (w1 + w2)
        nodes = [*rest, (w1 + w2, name, (p.numerator, p.denominator, left, right))]
    return nodes[0][2]


def _left(n, a, b):
    """Exactly floor(n a / b + 1/2), n an int or array. Whole periods apart, so int64 does for b < 2^31."""
    return n // b * a + (2 * (n % b) * a + b) // (2 * b)


def _counts(tree, n):
    """{name: samples} among the first n of a tree."""
    if isinstance(tree, str):
        return {tree: n}
    a, b, left, right = tree
    return {**_counts(left, _left(n, a, b)), **_counts(right, n - _left(n, a, b))}


def _walk(tree, n, rows):
    """Yield (name, rows, local indices) of a node's samples n [k], which stand in rows [k] of the request."""
    if isinstance(tree, str):
        yield tree, rows, n.astype(np.int64)
    elif len(n):
        a, b, left, right = tree
        n = n if b < 2 ** 31 else n.astype(object)              # Python's integers do not overflow
        before = _left(n, a, b)
        goes_left = _left(n + 1, a, b) > before
        yield from _walk(left, before[goes_left], rows[goes_left])
        yield from _walk(right, (n - before)[~goes_left], rows[~goes_left])


class Mixture:
    """Which sample of which source is global sample g: a closed form, the same on every machine.

    sources: {name: Source}. phases: [(first sample, {name: weight}), ...], rising from 0. Weight 0: never
    drawn. Where the weights change, every source goes on from where it is.
    """

    def __init__(self, sources, phases):
        self.sources = sources
        self.starts = [start for start, _ in phases]
        if self.starts[:1] != [0] or self.starts != sorted(set(self.starts)):
            raise DataError(f'phases start at samples {self.starts}: expected 0 first, then rising numbers.')
        if unknown := {name for _, weights in phases for name in weights} - set(sources):
            raise DataError(f'weights for {", ".join(sorted(unknown))}; sources are {", ".join(sources)}.')
        if len({source.block_size for source in sources.values()}) > 1:
            raise DataError(f'block_size differs: { {name: s.block_size for name, s in sources.items()} }.')
        self.trees = [_tree(_exact(weights, 'weights')) for _, weights in phases]
        self.before = [Counter()]                               # per phase: samples in the phases before it
        for tree, start, end in zip(self.trees, self.starts, self.starts[1:]):
            self.before.append(self.before[-1] + Counter(_counts(tree, end - start)))

    def counts(self, g):
        """{name: samples} among the first g of the run, in closed form."""
        phase = sum(start <= g for start in self.starts) - 1
        counts = self.before[phase] + Counter(_counts(self.trees[phase], int(g) - self.starts[phase]))
        return {name: counts[name] for name in self.sources}

    def _parts(self, g):
        """Yield (name, rows, m): the rows of g [B] that a source has, and its local indices there."""
        g = np.asarray(g, np.int64)
        phase = np.searchsorted(self.starts, g, side='right') - 1
        for p in np.unique(phase).tolist():
            here = np.flatnonzero(phase == p)
            for name, at, m in _walk(self.trees[p], g[here] - self.starts[p], here):
                if len(at):
                    yield name, at, m + self.before[p][name]

    def locate(self, g):
        """[(name, local index m)] of global samples g (range or array [B])."""
        out = [None] * len(g)
        for name, at, m in self._parts(g):
            for row, local in zip(at.tolist(), m.tolist()):
                out[row] = name, local
        return out

    def batch(self, g):
        """Inputs x and targets y, int64 [B, T], of global samples g (range or array [B]), ids checked."""
        T = next(iter(self.sources.values())).block_size
        x, y = np.empty((2, len(g), T), np.int64)
        parts = [(self.sources[name], at, m) for name, at, m in self._parts(g)]
        for source, at, m in parts:
            for row, ids in zip(at.tolist(), source.read(source.order(m))):
                x[row], y[row] = ids[:-1], ids[1:]
        highest = np.maximum(x.view(np.uint64)[:, 0], y.view(np.uint64).max(1))     # [B]; as unsigned
        for source, at, m in parts:
            if (highest[at] >= source.vocab_size).any():
                for i in source.order(m).tolist():
                    source.window(i)                            # raises at the culprit, and names it
        return x, y


def cap_epochs(sources, phases, max_epochs, first, total, rows):
    """Phases in which no source is read more than max_epochs {name: epochs} times, and [what was changed, in words].

    From the step (rows samples) in which a source would pass its cap, its share goes to the others of that phase, in
    proportion. Only phases from sample `first` to `total` change. DataError when no source is left.
    """
    phases, said = list(phases), []
    while True:
        mixture, passed = Mixture(sources, phases), {}
        for name, epochs in max_epochs.items():
            most = max(int(epochs * len(sources[name])), mixture.counts(first)[name])
            if mixture.counts(total)[name] > most:          # counts only grow: where does it pass?
                g = bisect.bisect_right(range(total), most, key=lambda g: mixture.counts(g)[name])
                passed[name] = max((g - 1) // rows * rows, first)
        if not passed:
            return phases, said
        name = min(passed, key=passed.get)
        start, at = passed[name], max(i for i, (g, _) in enumerate(phases) if g <= passed[name])
        rest = [(max(g, start), {n: w for n, w in weights.items() if n != name}) for g, weights in phases[at:]]
        if not all(any(map(Fraction, weights.values())) for _, weights in rest):
            raise DataError(f'max_epochs = {max_epochs}: at step {start // rows:,} {name} has been read as often as it '
                            'may, and no other source is left. Raise its cap, train shorter, or add a source.')
        phases[at + (phases[at][0] < start):] = [(g, {n: str(w) for n, w in mix_weights(weights).items()})
                                                 for g, weights in rest]
        said.append(f'max_epochs: {name} comes to its cap of {max_epochs[name]:g} epochs in step {start // rows:,}; '
                    f'from there on its share goes to {", ".join(n for n, w in rest[0][1].items() if Fraction(w))}')


def rows(step, batch_size, rank=0, world=1, micro_batch=None, micro_step=0):
    """The global samples of one micro-step of one process: rows [(a W + r) mb, + mb) of the step's batch.

    Ranks r of W and micro-steps a of mb = micro_batch rows (default: all of a rank's rows) share out the
    batch, the same batch_size samples for any split. DataError when they do not divide it.
    """
    micro_batch = micro_batch or batch_size // world or 1
    first = (micro_step * world + rank) * micro_batch
    if batch_size % (world * micro_batch) or first >= batch_size:
        raise DataError(f'batch_size = {batch_size} must be a multiple of {world} processes x {micro_batch} '
                        f'rows, and micro-step {micro_step} within it.')
    return range(step * batch_size + first, step * batch_size + first + micro_batch)


# --- tokenizers ----------------------------------------------------------------------------------------
# encode: str -> ids [n] without end-of-text, uint16, or uint32 for vocabularies past 65,536. A document must
# never end where its own text says <|endoftext|>, so that is ordinary text, unless encode(text, special=True).
# decode: ids -> str. A window may cut a character in two: what is no UTF-8, and ids that no token has (the
# rows that pad a vocabulary), become U+FFFD. Shards remember a tokenizer by its name.

Tokenizer = namedtuple('Tokenizer', 'name vocab_size eot encode decode')


def _tokenizer(name, table, specials, eot, ordinary):
    """A Tokenizer of table {id: bytes}, specials {text: id} and ordinary(str) -> ids [n], which knows no specials."""
    vocab_size = max(table) + 1
    longest_first = sorted(specials, key=len, reverse=True)
    split = re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')').split

    def encode(text, special=False):
        if not special:
            return ordinary(text).astype(token_type(vocab_size))
        parts = [[specials[part]] if i % 2 else ordinary(part) for i, part in enumerate(split(text))]
        return np.concatenate(parts).astype(token_type(vocab_size))

    def decode(ids):
        text = b''.join([table.get(i, b'\xef\xbf\xbd') for i in np.asarray(ids).tolist()])
        return text.decode('utf-8', errors='replace')
    return Tokenizer(name, vocab_size, eot, encode, decode)


END = '<|endoftext|>'
BYTES = _tokenizer('bytes', {**{i: bytes([i]) for i in range(256)}, 256: END.encode()}, {END: 256}, 256,
                   lambda text: np.frombuffer(text.encode('utf-8'), np.uint8))

# GPT-2's files spell a token in letters: a printable byte as itself, the others as the letters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTABLE}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}

# A whitespace run is a state of the regex engine's stack per character, and the stack ends at a million.
LONG_RUN = 200_000
TOKENIZER_FILES = (('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'),
                   ('r50k_base.tiktoken',), ('encoder.json', 'vocab.bpe'))
TOKENIZER_NAMES = {'fdceed2b': 'gpt2', 'f4175ad0': 'gpt-neox-20b'}         # digest of what decides the ids: name


def optional(module):
    """An imported package that only some need; DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f'this needs a package that is not installed: pip install {module.split(".")[0]}') from None


def tokenizer_files(spec):
    """{name to keep it under: Path} of the files behind a tokenizer given by path; {} for 'bytes' and 'gpt2'."""
    path = Path(spec)
    if spec in ('bytes', 'gpt2'):
        return {}
    for first, *others in TOKENIZER_FILES:
        if (path / first).is_file() or path.is_file() and path.name in (first, *others):
            folder = path if path.is_dir() else path.parent
            return {name: folder / name for name in (first, *others) if (folder / name).is_file()}
    if path.is_file() and path.suffix == '.json':               # 20B_tokenizer.json
        beside = {name: path.parent / name for name in TOKENIZER_FILES[0][1:]}
        return {'tokenizer.json': path, **{name: file for name, file in beside.items() if file.is_file()}}
    raise DataError(f"tokenizer {spec}: expected 'bytes', 'gpt2', a tokenizer.json, or a folder that holds one or "
                    "GPT-2's files (r50k_base.tiktoken, or encoder.json and vocab.bpe).")


@functools.lru_cache
def get_tokenizer(spec):
    """The Tokenizer of a spec: 'bytes', 'gpt2' (tiktoken downloads it once), or a path.

    A path: a tokenizer.json of a byte-level BPE like GPT-2's and GPT-NeoX-20B's, whose ids are those of the
    `tokenizers` library; a Hugging Face directory that holds one; or GPT-2's own files. Its name tells what it does
    and not where it lies: 'gpt2', 'gpt-neox-20b', or 'bpe-' and a digest. DataError when the ids could not be exact.
    """
    if spec == 'bytes':
        return BYTES
    files = tokenizer_files(spec)
    if 'tokenizer.json' in files:
        return _from_json(files)
    try:
        if not files:
            ranks = optional('tiktoken').get_encoding('r50k_base')._mergeable_ranks
        elif 'r50k_base.tiktoken' in files:
            lines = files['r50k_base.tiktoken'].read_bytes().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        else:
            merges = files['vocab.bpe'].read_text('utf-8').splitlines()[1:]         # the first line is a version
            ranks, _ = _ranks(spec, json.loads(files['encoder.json'].read_bytes()), merges)
    except DataError:
        raise
    except (OSError, ValueError, KeyError) as error:
        what = 'read' if files else 'downloaded'                # str of the latter is a paragraph
        raise DataError(f"tokenizer {spec}: GPT-2's ranks cannot be {what} ({type(error).__name__}: "
                        f"{str(error).partition('(')[0]}). Give a folder with r50k_base.tiktoken, encoder.json and "
                        'vocab.bpe, or tokenizer.json.') from None
    tokenizer = _bpe(ranks, {END: 50256}, 50256)
    if tokenizer.name != 'gpt2':
        raise DataError(f"tokenizer {spec}: not GPT-2's {len(ranks):,} tokens; for another give its tokenizer.json.")
    return tokenizer


def _ranks(file, vocab, merges):
    """({bytes: id} of single bytes and merges, {id: bytes} of all) of a vocabulary {letters: id} and its merges."""
    merged = [vocab[''.join(pair.split(' ') if isinstance(pair, str) else pair)] for pair in merges]
    if merged != sorted(set(merged)):                           # tiktoken merges the pair with the lowest id first
        raise DataError(f'{file}: its ids do not rise in the order of its merges, which is not supported.')
    table = {i: bytes(BYTE_OF[c] for c in token) if set(token) <= BYTE_OF.keys() else token.encode()
             for token, i in vocab.items()}
    ranks = {table[i]: i for i in [*merged, *(vocab[c] for c in BYTE_OF if c in vocab)]}
    in_utf8 = [*range(0xc0), *range(0xc2, 0xf5)]
    if missing := [b for b in in_utf8 if bytes([b]) not in ranks]:
        raise DataError(f'{file}: no token for byte {missing[0]:#04x}: text would be lost.')
    return ranks, table


def _check_json(file, spec):
    """DataError unless a tokenizer.json is of the kind whose ids come out exact."""
    model, before, added = spec['model'], spec['pre_tokenizer'] or {}, spec['added_tokens']
    nfc, runs = spec['normalizer'], sorted(len(token['content']) for token in added if not token['special'])
    odd = [token for token in added if token['single_word'] or token['lstrip'] or token['rstrip']
           or not token['special'] and token['content'].strip(' ') or token['special'] and token['normalized'] and nfc]
    for what, found, *supported in (
            ('model', model['type'], 'BPE'), ('normalizer', nfc and nfc['type'], None, 'NFC'),
            ('pre_tokenizer', before.get('type'), 'ByteLevel'), ('use_regex', before.get('use_regex', True), True),
            ('add_prefix_space', before.get('add_prefix_space'), False),
            ('decoder', (spec['decoder'] or {}).get('type'), 'ByteLevel'),
            *((key, model.get(key), None, False, 0, '') for key in (
                'dropout', 'byte_fallback', 'ignore_merges', 'continuing_subword_prefix', 'end_of_word_suffix')),
            ('added token', odd[0] if odd else None, None),
            ('lengths of added runs of spaces', runs, [*range(2, len(runs) + 2)])):
        if found not in supported:
            raise DataError(f'{file}: {what} {found!r}, supported is {" or ".join(map(repr, supported))}: byte-level '
                            "BPE with the pre-tokenizer of GPT-2, such as GPT-NeoX-20B's.")


def _from_json(files):
    """The Tokenizer of a tokenizer.json, and of the settings beside it: {name: Path}."""
    file = files['tokenizer.json']
    try:
        spec, *settings = [json.loads(path.read_bytes()) for path in files.values()]
        _check_json(file, spec)
        ranks, table = _ranks(file, spec['model']['vocab'], spec['model']['merges'])
        special = {token['content']: token['id'] for token in spec['added_tokens'] if token['special']}
        runs = {len(token['content']): token['id'] for token in spec['added_tokens'] if not token['special']}
        eos = [setting.get('eos_token') for setting in settings]
        names = [END, *(token['content'] if isinstance(token, dict) else token for token in eos)]
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{file}: not a readable tokenizer ({type(error).__name__}: {error}).') from None
    if not (end := [special[name] for name in names if name in special]):
        raise DataError(f'{file}: no end-of-text among its special tokens {sorted(special)}. Expected {END}, or the '
                        'eos_token that a tokenizer_config.json beside it names.')
    return _bpe(ranks, special, end[0], runs, spec['normalizer'] is not None, table)


def _bpe(ranks, special, eot, runs=None, nfc=False, table=None):
    """A Tokenizer by tiktoken with the ids of `tokenizers`: ranks {bytes: id}, special {text: id}, runs {spaces: id}.

    `tokenizers` cuts runs of spaces out before all else, the longest first, so they are the first branch of the
    regex, the branches for whitespace never enter one, and their ids replace those of merges made of spaces,
    which no text can reach any more.
    """
    ranks = {**ranks, **{b' ' * n: i for n, i in (runs or {}).items()}}
    table = {**(table or {}), **{i: token for token, i in ranks.items()}}
    table |= {i: text.encode() for text, i in special.items()}
    digest = blake2b(repr((sorted(ranks.items()), sorted(special.items()), nfc)).encode(), digest_size=4).hexdigest()
    run, space = (f' {{2,{max(runs)}}}|', r'(?:[^\S ]| (?! ))') if runs else ('', r'\s')
    regex = rf"{run}'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++| ?\p{{N}}++| ?[^\s\p{{L}}\p{{N}}]++|{space}+(?!\S)|\s"
    encoding = optional('tiktoken').Encoding(digest, pat_str=regex, mergeable_ranks=ranks, special_tokens=special)
    # The same whitespace for Python, whose \s has four control characters more.
    whitespace = re.compile(run + space.replace(r'\S', r'\S\x1c-\x1f').replace(r'\s', r'[^\S\x1c-\x1f]')
                            + r'+(?![\S\x1c-\x1f])')

    def ordinary(text):
        text, parts, at = unicodedata.normalize('NFC', text) if nfc else text, [], 0
        if len(text) > LONG_RUN:
            for match in whitespace.finditer(text):             # a long run is one piece: the regex need not see it
                if match.end() - match.start() > LONG_RUN:
                    parts += [pieces(text[at:match.start()]), encoding._encode_single_piece(match[0])]
                    at = match.end()
        return np.concatenate([*parts, pieces(text[at:])]) if parts else pieces(text)

    def pieces(text):
        return encoding.encode_to_numpy(text, disallowed_special=())
    return _tokenizer(TOKENIZER_NAMES.get(digest, f'bpe-{digest}'), table, special, eot, ordinary)


def find_tokenizer(name, folders=()):
    """The Tokenizer of that name: 'bytes', one whose files lie in one of `folders`, or tiktoken's 'gpt2'."""
    if name == 'bytes':
        return BYTES
    for folder in folders:
        with contextlib.suppress(DataError):                    # most folders hold none
            if (tokenizer := get_tokenizer(str(folder))).name == name:
                return tokenizer
    if name == 'gpt2':
        return get_tokenizer(name)
    raise DataError(f'no tokenizer {name} in {", ".join(map(str, folders)) or "any folder"}. Say where its '
                    'tokenizer.json is: --tokenizer FOLDER.')


def tokenizer_hash(name):
    """31 bits that stand for a tokenizer in a header; never 0, which means unknown."""
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), 'little') >> 1 or 1


def tokenizer_name(shard):
    """The name of a Shard's tokenizer, None when unknown: one of ours, or as the summary.json beside it says."""
    known = {tokenizer_hash(name): name for name in ('bytes', *TOKENIZER_NAMES.values())}
    if shard.tokenizer in (None, *known):                       # nothing to be read: a run may have thousands of shards
        return known.get(shard.tokenizer)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = json.loads(Path(shard.path).with_name('summary.json').read_text('utf-8'))['tokenizer']
        return name if tokenizer_hash(str(name)) == shard.tokenizer else None


def _tokenizer_said(shard):
    return tokenizer_name(shard) or (f'hash {shard.tokenizer}' if shard.tokenizer else 'unknown')


# --- corpora -------------------------------------------------------------------------------------------
# One process reads blocks of text, many workers make them ids, and the first appends those to shards in the order
# of the input: so the shards are the same, bit for bit, for any number of workers, and after a kill and a resume.

BLOCK = 4 * 2 ** 20                     # bytes of text that a worker gets at a time
LONGEST = 64 * 2 ** 20                  # bytes of a document
TOO_LONG = f'longer than {LONGEST / 2 ** 20:g} MiB'
SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet', '.txt')
COUNTS = ('documents', 'tokens', 'bytes', 'shards', 'open_tokens', 'open_bytes')


class Writer:
    """Shards of any number of sources under `folder`, appended document by document.

    A shard ends with a document, and has its last name when it is whole; until then it ends in .part. counts:
    {'source/split': {what: number}}, of which an earlier Writer's, as they were at its sync(), go on from there.
    """

    def __init__(self, folder, tokenizer, eot, shard_tokens, counts=None):
        self.folder, self.tokenizer, self.eot, self.shard_tokens = folder, tokenizer, eot, shard_tokens
        self.counts, self.files, self.dtype = counts or {}, {}, token_type(tokenizer.vocab_size)
        for path in folder.glob('*/*.*'):                       # back to what the counts say
            split, _, index = path.name.split('.')[0].partition('_')
            n = self.counts.get(f'{path.parent.name}/{split}', dict.fromkeys(COUNTS, 0))
            if path.name == 'val_hashes.part':
                os.truncate(path, 8 * n['documents'])
            elif index.isdigit() and int(index) >= n['shards']:
                if int(index) > n['shards'] or not n['open_tokens']:
                    path.unlink()
                else:
                    os.truncate(path, HEADER_BYTES + n['open_tokens'] * self.dtype.itemsize)
                    path.rename(path.with_suffix('.part'))

    def _file(self, source, name):
        path = self.folder / source / f'{name}.part'
        if path not in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files[path] = open(path, 'r+b' if path.exists() else 'w+b')
            self.files[path].seek(0, os.SEEK_END)
        return self.files[path]

    def add(self, source, split, ids, text_bytes, digest):
        """Append a document: its ids [n], the bytes of its text, and 8 bytes that stand for it."""
        n = self.counts.setdefault(f'{source}/{split}', dict.fromkeys(COUNTS, 0))
        file = self._file(source, f'{split}_{n["shards"]:05d}')
        if not n['open_tokens']:
            file.write(bytes(HEADER_BYTES))
        file.write(ids.astype(self.dtype, copy=False).data)
        if split == 'val':
            self._file(source, 'val_hashes').write(digest)
        ends_shard = (n['tokens'] + len(ids)) // self.shard_tokens > n['tokens'] // self.shard_tokens
        for what, more in zip(COUNTS, (1, len(ids), text_bytes, 0, len(ids), text_bytes)):
            n[what] += more
        if ends_shard:
            self._end_shard(source, split)

    def _end_shard(self, source, split):
        n = self.counts[f'{source}/{split}']
        with self._file(source, f'{split}_{n["shards"]:05d}') as file:
            file.seek(0)
            file.write(_header(n['open_tokens'], self.tokenizer.vocab_size, self.eot,
                               self.tokenizer.name, n['open_bytes']))
            file.flush()
            os.fsync(file.fileno())
        path = Path(file.name)
        path.rename(path.with_suffix('.bin'))
        del self.files[path]
        n.update(shards=n['shards'] + 1, open_tokens=0, open_bytes=0)

    def sync(self):
        """What is counted is on the disk, whatever happens next."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def hashes(self, source='*'):
        """The sorted hashes, uint64 [n], of the documents that are held out for validation."""
        self.sync()
        found = [np.fromfile(path, '<u8') for path in self.folder.glob(f'{source}/val_hashes.part')]
        return np.unique(np.concatenate([np.empty(0, '<u8'), *found]))

    def finish(self, about, files):
        """End all shards. Beside them: the hashes, `files` {name: Path}, and a summary: `about` and the counts."""
        sources = sorted({stream.split('/')[0] for stream in self.counts})
        for source in sources:
            splits = {}
            for split in ('train', 'val'):
                if n := self.counts.get(f'{source}/{split}'):
                    if n['open_tokens']:
                        self._end_shard(source, split)
                    splits[split] = {what: n[what] for what in COUNTS[:4]} | {
                        'bytes_per_token': n['bytes'] / n['tokens']}
            np.save(self.folder / source / 'val_hashes.npy', self.hashes(source))
            for name, path in files.items():
                shutil.copyfile(path, self.folder / source / name)
            write_whole(self.folder / source / 'summary.json', json.dumps({**about, 'splits': splits}, indent=1))
            print(f'{source:<22}{"documents":>12}{"tokens":>16}{"bytes":>18}{"shards":>8}  bytes/token')
            for split, n in splits.items():
                print(f'  {split:<20}{n["documents"]:>12,}{n["tokens"]:>16,}{n["bytes"]:>18,}{n["shards"]:>8,}'
                      f'{n["bytes_per_token"]:>13.3f}')
        self.close()

    def close(self):
        for file in self.files.values():
            with contextlib.suppress(OSError):                  # of a full disk, which is known by now
                file.close()
        self.files.clear()

    def publish(self, data_dir):
        """The folders of all sources appear in data_dir, each whole."""
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            (folder / 'val_hashes.part').unlink(missing_ok=True)
            try:
                folder.rename(Path(data_dir, folder.name))
            except OSError as error:
                raise DataError(f'{Path(data_dir, folder.name)}: {error.strerror}. Made by another process '
                                'meanwhile?') from None


def write_whole(path, text):
    """A small file, as it was or as it is to be, whatever happens in between."""
    temp = path.with_name(f'{path.name}.tmp')
    with open(temp, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


def _check_target(name, data_dir, val, shard_tokens):
    if not re.fullmatch(r'\w[\w.-]*', name) or not 0 <= val < 1 or not 0 < shard_tokens < 2 ** 30:
        raise DataError(f'prepare {name}: the name must be letters, digits, dots, _ and -; val = {val} in '
                        f'[0, 1); shard_tokens = {shard_tokens:,} in [1, 2^30).')
    if Path(data_dir, name).exists():
        raise DataError(f'{Path(data_dir, name)} exists. Remove it first, or choose another name.')


def _check_train(name, counts):
    if not any(stream.endswith('/train') for stream in counts):
        n = sum(n['documents'] for n in counts.values())
        raise DataError(f'prepare {name}: {n:,} documents held out and none to train on. Give more, or lower --val.')


def _encode(text, raw, tokenizer, eot, val):
    """(split, ids, bytes, hash) of a document: a hash of its text alone says whether it is held out."""
    digest, ids = blake2b(raw, digest_size=8).digest(), tokenizer.encode(text)
    if eot != 'none':
        end = np.array([tokenizer.eot], ids.dtype)
        ids = np.concatenate((ids, end) if eot == 'append' else (end, ids))
    return 'val' if int.from_bytes(digest, 'little') < val * 2 ** 64 else 'train', ids, len(raw), digest


def write_corpus(documents, name, data_dir='data', *, val=0.05, shard_tokens=100_000_000, tokenizer=BYTES):
    """Tokenize documents (str) into data_dir/name/{train,val}_00000.bin, ...: all of the folder or none.

    End-of-text follows each document; a shard ends with a document. A hash of its text alone says whether a
    document is held out (share `val`): order and company do not matter, and copies never land on both sides.
    Returns {split: counts}. DataError when the folder exists or nothing is left to train on.
    """
    _check_target(name, data_dir, val, shard_tokens)
    for stale in Path(data_dir).glob(f'.{name}.tmp*'):          # of a killed run, when a day old
        if time.time() - stale.stat().st_mtime > 86400:
            shutil.rmtree(stale, ignore_errors=True)
    temp = Path(data_dir, f'.{name}.tmp{os.getpid()}')
    writer = Writer(temp, tokenizer, tokenizer.eot, shard_tokens)
    try:
        for text in documents:
            writer.add(name, *_encode(text, text.encode('utf-8'), tokenizer, 'append', val))
        _check_train(name, writer.counts)
        writer.finish({'tokenizer': tokenizer.name, 'eot': 'append', 'val': val}, {})
        writer.publish(data_dir)
    finally:
        writer.close()
        shutil.rmtree(temp, ignore_errors=True)
    return {split: writer.counts.get(f'{name}/{split}', {}) for split in ('train', 'val')}


# Reading. A part of a block is (file, number of its first line, bytes of whole lines, problem or ''): the lines of
# .jsonl, a .txt as it is, and rows of .parquet as lines of JSON.

def list_files(patterns):
    """([file] in the order of their names, 2 before 10; how many others the folders hold) of files, folders, globs."""
    found, others = set(), 0
    for pattern in map(str, patterns):
        names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not names or os.path.isfile(pattern) and not pattern.endswith(SUFFIXES):
            raise DataError(f'{pattern}: not a file, folder or glob of {", ".join(SUFFIXES)}.')
        folders = [os.path.join(glob.escape(name), '**') for name in names if os.path.isdir(name)]
        names += [name for folder in folders for name in glob.glob(folder, recursive=True)]
        files = set(filter(os.path.isfile, names))
        found |= {file for file in files if file.endswith(SUFFIXES)}
        others += len(files - found)
    return sorted(found, key=lambda f: [int(t) if t.isdecimal() else t for t in re.split(r'(\d+)', f)]), others


def _unpacked(f, file):
    """Yield the bytes of an open file, unpacked, also of several gzip or zstd frames; EOFError where it is damaged."""
    if not file.endswith(('.gz', '.zst')):
        yield from iter(lambda: f.read(BLOCK), b'')
        return
    if file.endswith('.gz'):
        new, Damage = functools.partial(zlib.decompressobj, 31), zlib.error
    else:
        zstandard = optional('zstandard')
        new, Damage = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
    frame = None
    while raw := f.read(2 ** 16):
        while raw:
            frame = frame or new()
            try:
                yield frame.decompress(raw)
            except Damage as error:
                raise EOFError(str(error)) from None
            raw = frame.unused_data
            frame = None if frame.eof else frame
    if frame:
        raise EOFError('cut short')


def _read_lines(file):
    """Yield (number of the first line, whole lines, problem, bytes of the file read so far)."""
    is_text, number, rest, too_long = file.endswith('.txt'), 1, b'', False
    with open(file, 'rb') as f:
        try:
            for chunk in _unpacked(f, file):
                cut = 0 if is_text else chunk.rfind(b'\n') + 1
                if cut and too_long:                            # the end of a line that was too long to hold
                    first = chunk.index(b'\n') + 1
                    chunk, cut, number, too_long = chunk[first:], cut - first, number + 1, False
                if cut:
                    lines, rest = rest + chunk[:cut], chunk[cut:]
                    yield number, lines, '', f.tell()
                    number += lines.count(b'\n')
                elif not too_long:
                    rest += chunk
                if len(rest) > LONGEST:
                    yield number, b'', TOO_LONG, f.tell()
                    rest, too_long = b'', True
        except EOFError as error:
            yield number, b'', f'damaged file ({error})', f.tell()
        if not too_long and (rest or is_text):
            yield number, rest, '', f.tell()


def _read_parquet(file, columns):
    """Yield (row, rows as lines of JSON, problem, bytes of the file read so far), of these columns."""
    row, size = 1, os.path.getsize(file)
    try:
        table = optional('pyarrow.parquet').ParquetFile(file)
        if missing := [name for name in columns if name not in table.schema_arrow.names]:
            raise DataError(f'{file}: no column {missing[0]!r}; it has {", ".join(table.schema_arrow.names)}.')
        for batch in table.iter_batches(256, columns=columns):
            # What JSON cannot hold, as bytes, becomes a list: never text.
            lines = [json.dumps(values, ensure_ascii=False, default=lambda value: [str(value)]).encode()
                     for values in batch.to_pylist()]
            yield row, b'\n'.join(lines), '', size * row // table.metadata.num_rows
            row += len(lines)
    except DataError:
        raise
    except (ValueError, OSError) as error:                      # pyarrow's own are these
        yield row, b'', f'damaged file ({str(error).splitlines()[0]})', size


def _blocks(files, columns):
    """Yield ([part], bytes of the files read so far), BLOCK bytes of text or a little more: the same in every run."""
    parts, size, before = [], 0, 0
    for file in files:
        reader = _read_parquet(file, columns) if file.endswith('.parquet') else _read_lines(file)
        for number, raw, problem, at in reader:
            parts.append((file, number, raw, problem))
            size += len(raw)
            if size >= BLOCK:
                yield parts, before + at
                parts, size = [], 0
        before += os.path.getsize(file)
    if parts:
        yield parts, before


# Working.

def _field(row, path):
    """row['meta']['set'] for the path 'meta.set'. Metadata may be JSON in a string, as in some .parquet."""
    for key in path.split('.'):
        row = (json.loads(row) if isinstance(row, str) else row)[key]
    return row


def _document(line, is_text, job):
    """(text, its UTF-8, value of --by) of a line, None when --where leaves it out; ValueError says what is wrong."""
    if len(line) > LONGEST:
        raise ValueError(TOO_LONG)
    try:
        text = line.decode('utf-8' if is_text else 'utf-8-sig')
        row = {} if is_text else json.loads(text)
    except UnicodeDecodeError:
        raise ValueError('not UTF-8') from None
    except (ValueError, RecursionError):
        raise ValueError('not JSON') from None
    value, field = '', None
    try:
        for field, *values in job['where']:
            if str(_field(row, field)) not in values:
                return None
        if field := job['by']:                                  # RedPajamaCommonCrawl: commoncrawl
            value = re.sub('[^a-z0-9]', '', str(_field(row, field)).lower()).removeprefix('redpajama')
            if not value:
                raise ValueError
        if not is_text:
            text = _field(row, field := job['text_field'])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f'no {field}') from None
    if not isinstance(text, str):
        raise ValueError(f'{field} is no string')
    try:
        raw = text.encode('utf-8')
    except UnicodeEncodeError:
        raise ValueError('half of a surrogate pair') from None
    if not raw.strip() or b'\0' in raw:
        raise ValueError('NUL byte' if b'\0' in raw else 'empty')
    return text, raw, value


def _work(job, val, parts):
    """([(--by value, split, tokens, bytes, hash)] of a block's documents, their ids, [(problem, where)], left out)."""
    tokenizer, documents, ids, problems, left_out = get_tokenizer(job['tokenizer']), [], [], [], 0
    for file, first, raw, problem in parts:
        is_text = file.endswith('.txt')
        for number, line in enumerate([raw] if is_text or problem else raw.split(b'\n'), first):
            if not (problem or is_text or line.strip()):        # an empty line
                continue
            try:
                if problem:
                    raise ValueError(problem)
                if document := _document(line, is_text, job):
                    text, raw_text, value = document
                    split, own, n_bytes, digest = _encode(text, raw_text, tokenizer, job['eot'], val)
                    documents.append((value, split, len(own), n_bytes, digest))
                    ids.append(own)
                left_out += not document
            except ValueError as error:
                problems.append((str(error), f'{file}:{number}'))
    return documents, np.concatenate(ids) if ids else [], problems, left_out


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is the first process's business

    def watch():                                                # which may be killed, and we would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _in_order(pool, blocks, job, ahead):
    """Yield (for validation only?, bytes of files read, what _work() makes of it) of blocks, `ahead` on the way."""
    waiting = deque()

    def first():
        val, at, future = waiting.popleft()
        return val == 1, at, future.result()
    for val, parts, at in blocks:
        waiting.append((val, at, pool.submit(_work, job, val, parts)))
        if len(waiting) > ahead:
            yield first()
    while waiting:
        yield first()


# Writing.

def _fill(writer, journal, results, source_of, save, *, kept_out, max_tokens, strict, bar):
    """Append the results of _in_order() to the writer; save() now and then. kept_out: hashes kept out of train."""
    known, saved, start, text_bytes = None, time.time(), time.time(), 0
    trained = sum(n['tokens'] for stream, n in writer.counts.items() if stream.endswith('/train'))
    skipped = journal['skipped'] = Counter(journal['skipped'])
    for val, at, (documents, ids, problems, left_out) in results:
        for problem, where in problems:
            if strict:
                raise DataError(f'{where}: {problem}. Mend it, or go on without --strict, which leaves it out.')
            skipped[problem] += 1
            if skipped[problem] <= 3:
                journal['shown'].append(f'{where}: {problem}')
        if left_out:
            skipped['left out by --where'] += left_out
        if known is None and not val:                       # all that is only for validation is read
            known = np.union1d(kept_out, writer.hashes())
        hashes = np.frombuffer(b''.join(document[-1] for document in documents), '<u8')
        twins = np.zeros(len(hashes), bool)
        if known is not None and len(known):
            twins = known[np.searchsorted(known[:-1], hashes)] == hashes
        for twin, (value, split, n, *document) in zip(twins.tolist(), documents):
            own, ids = ids[:n], ids[n:]
            if split == 'train' and max_tokens and trained >= max_tokens:
                break
            if split == 'train' and twin:
                skipped['equal to a validation document'] += 1
                continue
            writer.add(source_of(value), split, own, *document)
            trained += n * (split == 'train')
            text_bytes += document[0]
        journal['blocks'] += 1
        bar.update(at - bar.n)
        bar.set_postfix_str(f'{text_bytes / 1e6 / (time.time() - start):.1f} MB/s of text')
        if max_tokens and trained >= max_tokens:
            break
        if time.time() - saved > 5:
            save()
            saved = time.time()
    bar.write(f'{text_bytes / 1e6:,.1f} MB of text in {time.time() - start:.0f} s')


def _tokenize(writer, journal, job, held, files, source_of, save, *, workers, **options):
    """All that the files hold to the writer, from the block on that the journal names. held: for validation only."""
    fields = [job['text_field'], job['by'], *(field for field, *_ in job['where'])]
    columns, sizes = sorted({path.split('.')[0] for path in fields if path}), list(map(_size, (held, files)))
    blocks = ((val, parts, before + at) for val, group, before in ((1, held, 0), (job['val'], files, sizes[0]))
              for parts, at in _blocks(group, columns))
    workers = min(workers or os.cpu_count(), 1 + sum(sizes) // (2 * BLOCK))
    spawn = multiprocessing.get_context('spawn')                # a thread does for one, and starts at once
    pool = (concurrent.futures.ThreadPoolExecutor(1) if workers == 1 else
            concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker))
    todo = itertools.islice(blocks, journal['blocks'], None)    # what is done is read and passed over
    try:
        with tqdm(total=sum(sizes), unit='B', unit_scale=True, disable=None) as bar:
            _fill(writer, journal, _in_order(pool, todo, job, 2 * workers), source_of, save, bar=bar, **options)
    except concurrent.futures.BrokenExecutor:
        raise DataError('a worker was killed, for want of memory? The same command goes on; with fewer --workers, '
                        'it takes less.') from None
    finally:
        pool.shutdown(cancel_futures=True)


def _size(files):
    return sum(map(os.path.getsize, files))


@contextlib.contextmanager
def _held(work):
    """The folder `work` for one prepare at a time. When the disk is full, it says what to do."""
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl                                        # not on Windows, where nothing is locked
            folder = os.open(work, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            raise DataError(f'{work} is in use by another prepare. Wait for it, or stop it.') from None
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(work.parent).free / 1e9
            raise DataError(f'{work}: {error.strerror}, {free:.1f} GB are free. What is done stays: make room, and the '
                            'same command goes on.') from None


def _open_journal(work, settings):
    """How far an earlier run of the same command came, if any. DataError when it was another command."""
    path = work / 'journal.json'
    if not path.exists() or not any(entry.is_dir() for entry in work.iterdir()):
        return {'settings': settings, 'blocks': 0, 'counts': {}, 'skipped': {}, 'shown': [], 'done': False}
    journal = json.loads(path.read_text('utf-8'))
    for key, now in settings.items():
        if (was := journal['settings'].get(key)) != now:
            if isinstance(now, list) and isinstance(was, list):
                was, now = ([x for x in a if x not in b][:1] for a, b in ((was, now), (now, was)))
            raise DataError(f'{work} holds an unfinished prepare with {key} = {was}, now {now}. Give the same command '
                            f'to go on, or start anew: rm -r {work}')
    return journal


def prepare_files(name, inputs, data_dir='data', *, tokenizer='bytes', eot='append', val=None, val_files=(),
                  keep_out=(), text_field='text', where=None, by=None, max_tokens=None, shard_tokens=100_000_000,
                  workers=None, strict=False):
    """Tokenize files into data_dir/name, or with `by` into data_dir/name_VALUE: `python data.py prepare --help`.

    The same shards for any number of workers. After a kill or a full disk, the same call goes on where it was.
    Finished sources appear whole. DataError for what cannot be asked for or is not there, and for an empty train.
    """
    val = (0 if val_files else 0.05) if val is None else val
    _check_target(name, data_dir, val, shard_tokens)
    own, (held, _), (files, others) = get_tokenizer(tokenizer), list_files(val_files), list_files(inputs)
    files = [file for file in files if file not in held]
    where = [[field, *values.split(',')] for field, _, values in (words.partition('=') for words in where or ())]
    if wrong := [field for field, *values in where if not field or values == ['']]:
        raise DataError(f'--where {wrong[0]}: expected FIELD=VALUE, as meta.pile_set_name=Github.')
    if (where or by) and (texts := [file for file in [*held, *files] if file.endswith('.txt')]):
        raise DataError(f'{texts[0]}: a .txt has no fields for --where and --by.')
    hashes = [_val_hashes(data_dir, other) for other in keep_out]
    job = {'tokenizer': tokenizer, 'eot': eot, 'val': val, 'text_field': text_field, 'where': where, 'by': by}
    about = {**job, 'tokenizer': own.name, 'vocab_size': own.vocab_size, 'shard_tokens': shard_tokens,
             'max_tokens': max_tokens, 'keep_out': [[other, len(found)] for other, found in zip(keep_out, hashes)]}
    stats = {group: [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in paths]
             for group, paths in (('inputs', files), ('val_files', held))}
    work, sources = Path(data_dir, f'.{name}.prepare'), {}

    def source_of(value):
        if value not in sources:
            sources[value] = f'{name}_{value}' if by else name
            _check_target(sources[value], data_dir, val, shard_tokens)
            if len(sources) > 200:
                raise DataError(f'--by {by}: more than 200 values, each a source of its own. Is it the right field?')
        return sources[value]

    def save():
        writer.sync()
        write_whole(work / 'journal.json', json.dumps(journal))

    with _held(work), contextlib.ExitStack() as stack:
        journal = _open_journal(work, {**about, **stats})
        writer = Writer(work, own, None if eot == 'none' else own.eot, shard_tokens, journal['counts'])
        stack.callback(writer.close)
        journal['counts'] = writer.counts
        if not journal['done']:
            _tokenize(writer, journal, job, held, files, source_of, save, workers=workers, strict=strict,
                      max_tokens=max_tokens, kept_out=np.concatenate([np.empty(0, '<u8'), *hashes]))
            _report(name, work, writer, journal, others)
            sizes = {group: [entry[:2] for entry in entries] for group, entries in stats.items()}
            writer.finish({**about, 'skipped': journal['skipped'], **sizes}, tokenizer_files(tokenizer))
            journal['done'] = True
            save()
        writer.publish(data_dir)
        shutil.rmtree(work)


def _report(name, work, writer, journal, others):
    if others:
        print(f'{others:,} files of other kinds passed over')
    for kind, n in journal['skipped'].items():
        shown = [line for line in journal['shown'] if line.endswith(f': {kind}')]
        print(f'{n:,} documents left out: {kind}', *shown, sep='\n  ')
    try:
        _check_train(name, writer.counts)
    except DataError:
        shutil.rmtree(work)                                     # the mend is another command, which could not go on
        raise


def _val_hashes(data_dir, name):
    try:
        return np.load(Path(data_dir, name, 'val_hashes.npy'))
    except (OSError, ValueError):
        raise DataError(f'--keep_out {name}: {Path(data_dir, name)} has no val_hashes.npy, which prepare '
                        'writes. Prepare it, or prepare it again.') from None


# The embedded corpora are read from files that every installation has; nothing is imported. What they hold
# varies with the versions of Python, numpy and torch, and with whether the library's own tests are installed.

def _docstrings(body):
    """Every bare string among the statements of `body`, at any depth, in the order of the file."""
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, 'value', None), str):
            yield node
        for field in ('body', 'handlers', 'orelse', 'finalbody', 'cases'):
            if isinstance(inner := getattr(node, field, None), list):
                yield from _docstrings(inner)


TOPICS = os.path.join('pydoc_data', 'topics.py')                # the texts behind help('LAMBDAS')


def docs_of(file, source):
    """English: the docstrings of over 80 characters, and pydoc's help topics. [str]"""
    tree = ast.parse(source)
    if file.endswith(TOPICS):
        texts = ast.literal_eval(tree.body[-1].value).values()
    else:
        texts = [inspect.cleandoc(node.value.value) for node in _docstrings(tree.body)]
    return [text for text in texts if len(text) > 80]


STRING_OR_COMMENT = re.compile(                                 # strings too: a # in one starts no comment
    r'"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*'
    .encode(), re.DOTALL)


def code_of(file, source):
    """Python: the source without comments and docstrings, if over 500 bytes are left. [str]"""
    text, kept, at = source.encode('utf-8'), [], 0
    line = [0, *(match.end() for match in re.finditer(b'\n', text))]     # where the lines start
    cuts = [(line[node.lineno - 1] + node.col_offset, line[node.end_lineno - 1] + node.end_col_offset)
            for node in _docstrings(ast.parse(source).body)]
    cuts += [match.span() for match in STRING_OR_COMMENT.finditer(text) if match[0].startswith(b'#')]
    for start, end in sorted(cuts):
        before = text[text.rfind(b'\n', 0, start) + 1:start]
        start -= len(before) - len(before.rstrip(b' \t'))       # with the spaces before it,
        end += not before.strip() and text[end:end + 1] == b'\n'    # and the whole line if it stands alone
        kept.append(text[at:start])
        at = max(at, end)
    text = b''.join([*kept, text[at:]]).decode('utf-8')
    return [text] if len(text) > 500 and not file.endswith(TOPICS) else []


EXAMPLE = re.compile(r'^[ \t]*>>> .*\n?(?:[ \t]*\S.*\n?)*', re.MULTILINE)     # a doctest, up to an empty line


def prose_of(file, source):
    """English, the doctests cut out: what examples_of takes is no part of it. [str]"""
    texts = [re.sub(r'\n{3,}', '\n\n', EXAMPLE.sub('', text)).strip() for text in docs_of(file, source)]
    return [text for text in texts if len(text) > 80]


def examples_of(file, source):
    """Questions and answers: the doctests of each docstring, an expression and what Python prints. [str]"""
    texts = [''.join(EXAMPLE.findall(text)).strip() for text in docs_of(file, source)]
    return [text for text in texts if len(text) > 80]


MATHS = ('sympy', 'networkx', 'matplotlib', 'mpmath')           # that torch and matplotlib bring along
EMBEDDED = {'docs': (docs_of, ('python', 'numpy', 'torch')),    # the old data of most configs
            'code': (code_of, ('python',)),                     # far from docs: a strong shift
            'maths': (prose_of, MATHS),                         # near docs: a weak shift
            'examples': (examples_of, MATHS)}                   # few and valuable, as the QA data of Parmar et al.
PART = re.compile(r'_(\d)of(\d)$')                              # docs_1of3: a third of the documents of docs, at random
EMBEDDED |= {f'docs_{i}of3': EMBEDDED['docs'] for i in (1, 2, 3)}
EMBEDDED |= {f'maths_{package}': (prose_of, (package,)) for package in MATHS[:3]}      # domain by domain


def python_files(package):
    """The sorted .py files of an installed package, or of the standard library ('python')."""
    is_python = package == 'python'
    if not is_python and not importlib.util.find_spec(package):
        raise DataError(f'the package {package}, whose text this corpus is made of, is not installed: '
                        f'pip install {package}')
    root = Path(sysconfig.get_path('stdlib') if is_python else importlib.util.find_spec(package).origin)
    root = root if is_python else root.parent
    installed = {'site-packages', 'dist-packages'}
    return sorted(str(f) for f in root.rglob('*.py') if not installed & set(f.relative_to(root).parts))


def _read_embedded(name, file):
    """One file's documents; None if it is no valid Python, as some of the library's tests on purpose."""
    warnings.simplefilter('ignore')                             # about old escapes in others' strings
    try:
        with tokenize.open(file) as f:                          # in the encoding that the file declares
            return EMBEDDED[name][0](file, f.read())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def prepare_embedded(name, data_dir='data', *, files=None, workers=None):
    """Build an embedded corpus, see EMBEDDED, in data_dir unless it is there; returns its folder.

    Copies of a document are dropped. A part (docs_1of3) has the documents whose hash says so; what is held out for
    validation from the whole is held out from its parts too. The result is the same for any number of workers
    (default: up to 8).
    """
    folder = Path(data_dir, name)
    if folder.exists():
        return folder
    files = files or [file for package in EMBEDDED[name][1] for file in python_files(package)]
    workers = workers or min(os.cpu_count(), 8)
    spawn = multiprocessing.get_context('spawn')                # a fork of torch's threads may hang
    # Syntax trees have no cycles: without the garbage collector looking for some, this takes half the time.
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, gc.disable) as pool:
        found = list(tqdm(pool.map(_read_embedded, itertools.repeat(name), files, chunksize=16), desc=name,
                          total=len(files), unit=' files', disable=None))
    documents = dict.fromkeys(text for texts in found for text in texts or [])
    if match := PART.search(name):
        part, parts = map(int, match.groups())
        documents = [document for document in documents
                     if blake2b(document.encode(), digest_size=8, person=b'part').digest()[0] % parts == part - 1]
    try:
        write_corpus(documents, name, data_dir)
    except DataError:
        if not folder.exists():                                 # else another process was faster, and as good
            raise
    print(f'{name}: {found.count(None)} of {len(files):,} files are no valid Python, and left out')
    return folder


# --- command line --------------------------------------------------------------------------------------

def info(file):
    """Print what a shard holds, and how it begins."""
    shard = open_shard(file)
    ids = shard.read(0, min(shard.count, 256))
    print(f'{file}: {shard.count:,} tokens\n  format {shard.format}, {shard.dtype.name}; tokenizer '
          f'{_tokenizer_said(shard)}, vocabulary {shard.vocab_size}, end-of-text {shard.eot}, bytes of text '
          f'{shard.text_bytes} (None: the file does not say)\n  begins:')
    try:
        print(find_tokenizer(tokenizer_name(shard), [Path(file).parent]).decode(ids))
    except DataError:
        print(*ids.tolist())


def prepare(args):
    """`python data.py prepare`: an embedded corpus, or the user's files."""
    args = vars(args)
    name, inputs, data_dir = args.pop('name'), args.pop('inputs'), args.pop('data_dir')
    args.pop('run')
    if inputs:
        prepare_files(name, inputs, data_dir, **args)
    elif name not in EMBEDDED:
        raise DataError(f'prepare {name}: give files, folders or globs of {", ".join(SUFFIXES)}; without, only '
                        f'{", ".join(EMBEDDED)} can be made.')
    elif given := [key for key, value in args.items() if value != prepare_files.__kwdefaults__[key]]:
        raise DataError(f'prepare {name}: --{given[0]} is for files; the embedded corpora are bytes, and as they are.')
    else:
        print(prepare_embedded(name, data_dir))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser('prepare', help='text to shards')
    p.add_argument('name', help=f'of the source; without inputs: {", ".join(EMBEDDED)}')
    p.add_argument('inputs', nargs='*', help=f'files, folders, globs of {", ".join(SUFFIXES)}; a .txt is one document, '
                   'of up to 64 MiB')
    p.add_argument('--data_dir', default='data')
    p.add_argument('--tokenizer', default='bytes', help="'bytes', 'gpt2', or a path: a tokenizer.json, or a folder "
                   "with one (a Hugging Face directory) or with GPT-2's files")
    p.add_argument('--eot', default='append', choices=('append', 'prepend', 'none'), help='where the end-of-text of a '
                   'document goes. none: to continue Pythia on its own pre-shuffled Pile, which has no end-of-text; a '
                   'token that the old model never trained would confound a forgetting curve')
    p.add_argument('--val', type=float, help='share of the documents to hold out, chosen by a hash of the text; '
                   '0.05, or 0 with --val_files')
    p.add_argument('--val_files', nargs='+', default=(), help='official validation files: all held out, and what '
                   'equals one of their documents is left out of train')
    p.add_argument('--keep_out', nargs='+', default=(), metavar='NAME', help='prepared sources whose validation '
                   'documents are left out of train too')
    p.add_argument('--text_field', default='text', help='of the objects or columns; dots lead inside: meta.text')
    p.add_argument('--where', action='append', metavar='FIELD=VALUE,...', help='only documents with one '
                   'of these values, as meta.pile_set_name=Github; several: all must hold')
    p.add_argument('--by', metavar='FIELD', help='a source for each value, as meta.redpajama_set_name: NAME_c4, ...')
    p.add_argument('--max_tokens', type=int, help='stop after the document that completes so many train tokens')
    p.add_argument('--shard_tokens', type=int, default=100_000_000)
    p.add_argument('--workers', type=int, help='processes; default: one per core')
    p.add_argument('--strict', action='store_true', help='stop at the first document that cannot be read')
    p.set_defaults(run=prepare)
    p = commands.add_parser('info', help='what shards hold')
    p.add_argument('shards', nargs='+')
    p.set_defaults(run=lambda args: [info(file) for file in args.shards])
    args = parser.parse_args()
    args.run(args)


if __name__ == '__main__':
    try:
        main()
    except (DataError, OSError) as error:
        print(f'data.py: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('data.py: stopped; the same command goes on', file=sys.stderr)
        sys.exit(130)
