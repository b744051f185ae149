"""Shards: how ours are written, and how those of other programs are read.

Ours have the header that data.py describes. Read, but not written, are the headerless uint16 files
of nanoGPT, and the .bin and .idx of Megatron and GPT-NeoX.
"""
import os
from hashlib import blake2b

import numpy as np

from configurator import require
from data import FORMATS, HEADER_BYTES, Shard
from support.files import write_whole

MAGIC_OF = {dtype: magic for magic, (_, dtype) in FORMATS.items()}


def token_type(vocab_size):
    """The type of ids in a shard: uint16 for vocabularies up to 65,536, else uint32."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def tokenizer_hash(name):
    """31 bits that stand for a tokenizer in a header. Never 0, which means unknown."""
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), 'little') >> 1 or 1


def write_shard(path, tokens, *, vocab_size, eot=None, tokenizer=None, text_bytes=0):
    """Write ids [n] as one shard of ours. tokenizer: its name; text_bytes: of the encoded text."""
    tokens = np.asarray(tokens)
    require(0 < len(tokens) < 2**31, f'{path}: there are {len(tokens):,} tokens, but a shard holds '
            f'1 to {2**31 - 1:,}. Write several shards.')
    require(tokens.min() >= 0 and tokens.max() < vocab_size, f'{path}: ids run from '
            f'{tokens.min()} to {tokens.max()}, but the vocabulary has {vocab_size:,} ids.')
    dtype = token_type(vocab_size)
    magic = MAGIC_OF[dtype]
    words = [magic, FORMATS[magic][0], len(tokens), dtype.itemsize, vocab_size,
             0 if eot is None else eot + 1, tokenizer_hash(tokenizer) if tokenizer else 0,
             text_bytes % 2**31, text_bytes >> 31]
    header = np.array(words, '<i4').tobytes().ljust(HEADER_BYTES, b'\0')
    write_whole(path, header, tokens.astype(dtype, copy=False).data)


# ------------------------------------------------------------------------------
# Other programs' shards

# how files of other kinds begin
OTHER_KINDS = {b'PK\3\4': 'a zip or a PyTorch file', b'\x93NUMPY': 'a .npy file',
               b'\x1f\x8b': 'gzip', b'\x28\xb5\x2f\xfd': 'zstd', b'PAR1': 'Parquet',
               b'ARROW1': 'Arrow', b'\xff\xff\xff\xff': 'an Arrow stream', b'\x89HDF': 'HDF5',
               b'SQLite': 'SQLite'}


def open_other(path, header, size):
    """A Shard of a file without our header. UserError for what is plainly something else."""
    index = path.removesuffix('.bin') + '.idx'
    if os.path.exists(index):
        return open_megatron(path, index, size)

    # a headerless file cannot say what it is
    ids = np.frombuffer(header[:len(header) // 2 * 2], '<u2')
    kinds = [kind for start, kind in OTHER_KINDS.items() if header.startswith(start)]
    if int.from_bytes(header[:4], 'big') in FORMATS or len(ids) >= 8 and not (ids & 255).any():
        kinds.append('of big-endian numbers')
    if len(ids) >= 8 and all(byte in b'\t\n\r' or 32 <= byte < 127 for byte in header):
        kinds.append('text')
    if len(ids) >= 8 and not ids[1::2].any():
        kinds.append('of 32-bit numbers')
    if len(header) == HEADER_BYTES and not any(header[64:]):
        kinds.append('a shard with a damaged header')
    if size % 2:
        kinds.append('of an odd number of bytes')
    require(not kinds, f'{path}: not a token shard; it seems to be {" or ".join(kinds)}. Expected '
            'the format of llm.c, a Megatron .bin with its .idx, or little-endian uint16 ids '
            'without a header. python -m corpora.prepare makes shards of text.')
    return Shard(path, 'headerless', 0, np.dtype('<u2'), size // 2)


MEGATRON_TYPES = {1: 'u1', 2: 'i1', 3: '<i2', 4: '<i4', 5: '<i8', 8: '<u2'}     # 6 and 7 are floats


def open_megatron(path, index, size):
    # The .idx of an MMapIndexedDataset: magic (9 bytes), version (8), type of ids (1), number of
    # sequences (8) and of documents (8), then the lengths of the sequences as int32.
    with open(index, 'rb') as file:
        head = file.read(34)
    code, sequences = int.from_bytes(head[17:18], 'little'), int.from_bytes(head[18:26], 'little')
    require(head[:17] == b'MMIDIDX\0\0' + (1).to_bytes(8, 'little') and code in MEGATRON_TYPES,
            f'{index}: not a Megatron index of version 1 with integer ids. If {path} is another '
            'kind of file, move the .idx away.')
    require(0 < sequences <= (os.path.getsize(index) - 34) // 12,
            f'{index}: truncated, or without sequences. Copy it again.')
    lengths = np.memmap(index, '<i4', 'r', 34, (sequences,))
    dtype, count = np.dtype(MEGATRON_TYPES[code]), int(lengths.sum(dtype=np.int64))
    require(size == count * dtype.itemsize, f'{path}: its .idx says {count:,} tokens, but the file '
            f'holds {size // dtype.itemsize:,}. Copy it again.')
    length = int(lengths[0]) if lengths.min() == lengths.max() else None
    return Shard(path, 'Megatron', 0, dtype, count, sequence=length)
