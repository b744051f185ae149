"""Documents to shards: what prepare.py (your files) and embedded.py (built-in corpora) share."""
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from pathlib import Path

import numpy as np

from configurator import UserError, require
from corpora.formats import token_type, tokenizer_hash, write_shard
from corpora.tokenizer import load_tokenizer
from data import HEADER_BYTES, find_shards, open_shard
from support.files import write_whole

SHARD_TOKENS = 100_000_000


def hash_of(raw):
    """64 bits that stand for a document: a hash of the UTF-8 bytes of its text."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), 'little')


def split_of(document_hash, val):
    """'val' for a share `val` of all documents, else 'train'.

    Only the text decides: the order of the documents does not matter, and copies of a document are
    never in both splits.
    """
    return 'val' if document_hash < val * 2**64 else 'train'


class ShardWriter:
    """Writes documents to STEM.bin, and to STEM_001.bin, ... after every SHARD_TOKENS tokens.

    eot: 'append' ends each document with end-of-text, 'none' does not.
    """

    def __init__(self, stem, tokenizer, eot='append'):
        self.stem, self.tokenizer, self.eot = stem, tokenizer, eot
        self.dtype = token_type(tokenizer.vocab_size)
        self.ids, self.text_bytes = bytearray(), 0              # of the shard that is being filled
        self.counts = {'documents': 0, 'tokens': 0, 'bytes': 0, 'shards': 0}
        self.written = []                                   # [name, tokens, bytes] of each shard

    def add(self, text, text_bytes):
        ids = self.tokenizer.encode(text)
        if self.eot == 'append':
            ids = np.append(ids, ids.dtype.type(self.tokenizer.eot))
        self.ids += ids.tobytes()
        self.text_bytes += text_bytes
        self.counts['documents'] += 1
        self.counts['tokens'] += len(ids)
        self.counts['bytes'] += text_bytes
        if len(self.ids) >= SHARD_TOKENS * self.dtype.itemsize:
            self.write()

    def write(self):
        """Write what was added since the last shard."""
        if self.ids:
            number = self.counts['shards']
            path = Path(f'{self.stem}_{number:03d}.bin' if number else f'{self.stem}.bin')
            ids = np.frombuffer(self.ids, self.dtype)
            write_ids(path, ids, self.tokenizer, self.eot, self.text_bytes)
            self.written.append([path.name, len(ids), self.text_bytes])
            self.counts['shards'] += 1
            self.ids, self.text_bytes = bytearray(), 0


def write_ids(path, ids, tokenizer, eot, text_bytes):
    """Write the ids [n] of documents as a shard."""
    write_shard(path, ids, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.name,
                eot=tokenizer.eot if eot == 'append' else None, text_bytes=text_bytes)


def join_pieces(folder, split, pieces, tokenizer, eot):
    """Join small shards, in their order, to shards of up to SHARD_TOKENS; return their number.

    pieces: [name, tokens, bytes] of each. If this is interrupted, the next call continues.
    """
    groups = in_groups(pieces, [tokens for _, tokens, _ in pieces], SHARD_TOKENS)
    for number, group in enumerate(groups):
        path, parts = folder / f'{split}_{number:05d}.bin', [folder / name for name, _, _ in group]
        if not path.exists() and len(parts) == 1:
            parts[0].rename(path)
        elif not path.exists():
            dtype = token_type(tokenizer.vocab_size)
            ids = [np.fromfile(part, dtype, offset=HEADER_BYTES) for part in parts]
            text_bytes = sum(n for _, _, n in group)
            write_ids(path, np.concatenate(ids), tokenizer, eot, text_bytes)
        for part in parts:
            part.unlink(missing_ok=True)
    return len(groups)


def write_corpus(documents, name, data_dir='data', *, val=0.05):
    """Write texts as shards of bytes to data_dir/name, which appears whole or not at all."""
    splits = ((split_of(hash_of(text.encode('utf-8')), val), text) for text in documents)
    write_splits(splits, name, data_dir, {'val': val})


def write_splits(documents, name, data_dir, settings):
    """write_corpus for documents whose split is known: pairs of a split and a text."""
    folder, partial = Path(data_dir, name), Path(data_dir, f'.{flat(name)}.{os.urandom(4).hex()}')
    require(not folder.exists(), f'{folder} already exists. Delete it, or choose another name.')
    partial.mkdir(parents=True)
    try:
        tokenizer = load_tokenizer('bytes')
        writers = {split: ShardWriter(partial / f'{split}_00000', tokenizer)
                   for split in ('train', 'val')}
        for split, text in documents:
            writers[split].add(text, len(text.encode('utf-8')))
        for writer in writers.values():
            writer.write()
        counts = {split: writer.counts for split, writer in writers.items()}
        require(counts['train']['tokens'], f'{name}: no documents to train on.')
        write_summary(partial, {'tokenizer': 'bytes', 'eot': 'append', **settings}, counts)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flat(name):
    """The name of a source, which may be a path, as the name of one file or folder."""
    return name.replace('/', '+')


def read_documents(name, split, data_dir='data'):
    """Yield the texts of a corpus of bytes, in the order of its shards."""
    for path in find_shards(name, split, data_dir):
        shard = open_shard(path)
        require(shard.tokenizer == tokenizer_hash('bytes') and shard.eot is not None,
                f'{path}: its documents are not bytes that end with end-of-text. Choose a corpus '
                'that was prepared without --tokenizer and --eot.')
        ends = np.flatnonzero(shard.tokens == shard.eot)
        for start, end in zip([0, *(ends[:-1] + 1)], ends):
            yield bytes(shard.tokens[start:end].astype(np.uint8)).decode()


def write_summary(folder, settings, counts):
    """summary.json beside the shards: how they were made, and counts {split: {what: number}}."""
    splits = {split: {**n, 'bytes_per_token': n['bytes'] / n['tokens']}
              for split, n in counts.items() if n.get('tokens')}
    summary = json.dumps({**settings, 'splits': splits}, indent=1)
    write_whole(folder / 'summary.json', summary.encode())


def in_groups(items, sizes, limit):
    """Neighbours in lists, each up to a size: [[item, ...], ...]. A larger item is alone."""
    groups, filled = [], 0
    for item, size in zip(items, sizes):
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


@contextlib.contextmanager
def worker_pool(workers):
    """A function like map(), with results in the order of the jobs, that uses several processes."""
    if workers == 1:
        yield map
        return
    # spawn, because a fork of a process with threads (torch's, for example) can hang
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context('spawn'), initializer=start_worker)

    def run(function, jobs):
        futures = [pool.submit(function, job) for job in jobs]
        return (future.result() for future in futures)
    try:
        yield run
    except BrokenProcessPool:
        raise UserError('a worker process was killed, perhaps because memory ran out. Run the same '
                        'command again to continue, with fewer --workers.') from None
    finally:
        # After Ctrl-C or an error, do not wait for jobs that are still running.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown()


def start_worker():
    """In a new worker: leave Ctrl-C to the parent process, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait_for_parent, daemon=True).start()
