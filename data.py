"""From files of token ids to training batches, with old data replayed at an exact ratio.

The loader has no state. Everything follows from g, the number of a sample, counted over the run:

    global sample g  ->  source, local index m  ->  window of the source  ->  tokens of a shard
                Mixture.locate             Source.order              Source.read

So a run resumes from its step alone, any number of processes sees the same samples in the same
step, and nothing but the list of shards grows with the corpus. The file follows these arrows from
left to right. Plan, at its end, says what comes when in a stage, and what it is evaluated on.
corpora/ makes shards from text.

    python data.py data/docs/*.bin          # what these shards contain

Shapes: B rows of a batch, T = block_size tokens of a row. A window is T + 1 tokens: inputs and, one
token later, targets.
"""
import bisect
import glob
import math
import mmap
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from configurator import UserError, did_you_mean, require


# ------------------------------------------------------------------------------
# Mixture: which source gives the next sample

def mix_weights(train_data, replay_data=None, replay=0):
    """{source: share} of new and old sources together: Fractions that sum to 1.

    Old data get the share `replay` of the samples and new data the rest, so the total number of
    tokens is that of a run without replay ("compute-equivalent", Ibrahim et al. 2024).
    """
    replay_data = replay_data or {}
    require(isinstance(replay, (int, float)) and 0 <= replay < 1, f'replay = {replay}: the share '
            'of old data must be at least 0 and below 1.')
    both = sorted(set(train_data) & set(replay_data))
    require(not both, f'{", ".join(both)}: in train_data and in replay_data. Keep one.')
    require(not replay or replay_data, f'replay = {replay}, but replay_data is empty. Say what to '
            "replay, for instance replay_data = {'docs': 1.0}.")

    share = Fraction(str(replay))
    new = exact(train_data, 'train_data')
    mixed = {name: (1 - share) * weight / sum(new.values()) for name, weight in new.items()}
    if share:
        old = exact(replay_data, 'replay_data')
        mixed |= {name: share * weight / sum(old.values()) for name, weight in old.items()}
    return mixed


def exact(weights, knob):
    """{source: Fraction} of weights as written: 0.05 is 1/20, not the nearest binary number."""
    numbers = [w for w in weights.values() if type(w) in (int, float) and abs(w) < math.inf]
    require(len(numbers) == len(weights), f'{knob} = {weights}: weights must be finite numbers.')
    fractions = {name: Fraction(str(weight)) for name, weight in weights.items()}
    require(all(w >= 0 for w in fractions.values()) and any(fractions.values()),
            f'{knob} = {weights}: weights must not be negative, and one must be above zero.')
    return fractions


# Sources are split off one at a time, the lightest first. A source with share p of what is left
# gives round(n p) of the first n samples, so it gives the next one exactly when that number grows.
#
# An example: old and new with weights 1 : 3.
#     first n samples            0   1   2   3   4   5   6   7   8
#     of them old, round(n/4)    0   0   1   1   1   1   2   2   2
#     so the samples are           new old new new new old new new
#
# Every split rounds once: with k sources, each count is within (k - 1) / 2 samples of its share at
# every point of the run. Nothing is stored, and integers do not drift.

def taken(n, weight, total):
    """round(n weight / total), in integers, also for arrays n."""
    whole, rest = n // total, n % total
    return whole * weight + (2 * rest * weight + total) // (2 * total)


def in_integers(weights):
    """[(source, integer weight)] of {source: weight}, the lightest first, without those of zero."""
    weights = {name: Fraction(str(weight)) for name, weight in weights.items()}
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    rising = sorted((weight * scale, name) for name, weight in weights.items() if weight)
    return [(name, int(weight)) for weight, name in rising]


class Mixture:
    """Which sample of which source is global sample g. The same on every machine.

    sources: {name: Source}. mixes: [(first sample, {name: weight}), ...], rising from sample 0.
    Where the weights change, every source continues from where it is.
    """

    def __init__(self, sources, mixes):
        self.sources = sources
        self.starts = [first_sample for first_sample, _ in mixes]
        self.weights = [in_integers(weights) for _, weights in mixes]
        self.before = [Counter()]                           # per mix: samples of the mixes before
        for mix, length in enumerate(np.diff(self.starts).tolist()):
            self.before.append(self.before[-1] + self.count_in_mix(mix, length))

    def count_in_mix(self, mix, n):
        """Counter of the sources among the first n samples of a mix."""
        counts, total = Counter(), sum(weight for _, weight in self.weights[mix])
        for name, weight in self.weights[mix]:
            counts[name] = taken(n, weight, total)
            n, total = n - counts[name], total - weight
        return counts

    def counts(self, g):
        """{source: samples} among the first g of the run."""
        mix = bisect.bisect_right(self.starts, g) - 1
        counts = self.before[mix] + self.count_in_mix(mix, int(g) - self.starts[mix])
        return {name: counts[name] for name in self.sources}

    def reaches(self, name, count, total):
        """The first g, up to total, by which a source has given more than `count` samples."""
        return bisect.bisect_right(range(total), count, key=lambda g: self.counts(g)[name])

    def locate(self, g):
        """Yield (source, rows of the batch, local indices) for global samples g [B]."""
        g = np.asarray(g, np.int64)
        mix_of = np.searchsorted(self.starts, g, side='right') - 1
        for mix in np.unique(mix_of).tolist():
            rows = np.flatnonzero(mix_of == mix)
            n, total = g[rows] - self.starts[mix], sum(w for _, w in self.weights[mix])
            if total >= 2**31:
                n = n.astype(object)                        # Python's integers do not overflow
            for name, weight in self.weights[mix]:
                # a row belongs to this source if its count grows there; the others go on to the
                # next source, and are numbered without the samples that this one has taken
                before = taken(n, weight, total)
                mine = taken(n + 1, weight, total) > before
                if mine.any():
                    yield name, rows[mine], before[mine].astype(np.int64) + self.before[mix][name]
                rows, n, total = rows[~mine], (n - before)[~mine], total - weight

    def batch(self, g):
        """Inputs x and targets y, int64 (B, T) each, of global samples g, and the source of each.

        g: a range or an array [B]. The sources are a list of B names.
        """
        block_size = next(iter(self.sources.values())).block_size
        windows = np.empty((len(g), block_size + 1), np.int64)
        names = np.empty(len(g), object)
        for name, rows, m in self.locate(g):
            source = self.sources[name]
            windows[rows] = source.read(source.order(m))
            names[rows] = name
        return windows[:, :-1].copy(), windows[:, 1:].copy(), names.tolist()


# ------------------------------------------------------------------------------
# Order: every window once per epoch

def permute(indices, size, keys):
    """A keyed shuffle of range(size): where the indices, uint64 [n], go.

    Why not np.random.permutation? It would hold an index for each of a billion windows in every
    process. This takes no memory, and no time at the start.

    A Feistel network on pairs of digits in base ceil(sqrt(size)), one round per key: a round adds a
    hash of one digit to the other. That can be undone whatever the hash, so no two indices meet.
    What lands at or past `size` walks on until it is inside (Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains").
    """
    base, indices = math.isqrt(size - 1) + 1, indices.copy()
    outside = np.arange(len(indices))
    while len(outside):
        left, right = np.divmod(indices[outside], base)
        for key in keys:
            h = (right ^ key) * 0xBF58476D1CE4E5B9              # constants of splitmix64
            h = (h ^ h >> 32) * 0x94D049BB133111EB
            left, right = right, (left + (h ^ h >> 29) % base) % base
        indices[outside] = left * base + right
        outside = outside[indices[outside] >= size]
    return indices


class Source:
    """A named list of shards, cut into windows of T + 1 tokens that never cross shards.

    Windows start T tokens apart: neighbours share one token, and each token is a target once. Where
    all sequences of a Megatron file have T + 1 tokens (Pythia's pre-shuffled Pile), these are the
    windows.

    key: seed of the order, or 'stored' for the order of the files in every epoch
    skip: samples that earlier stages took, when this one continues after them
    vocab_size: ids at or past it are errors; it falls to what the shards or the model say
    """

    def __init__(self, name, files, block_size, *, key=0, skip=0):
        self.name, self.block_size, self.key, self.skip = name, block_size, key, skip
        self.shards = [open_shard(file) for file in files]
        self.tokens = sum(shard.count for shard in self.shards)
        self.vocab_size = min([2**63, *(s.vocab_size for s in self.shards if s.vocab_size)])

        # n tokens hold (n - 1) // T windows, or n // (T + 1) sequences
        is_window = np.array([shard.sequence == block_size + 1 for shard in self.shards])
        counts = np.array([shard.count for shard in self.shards])
        self.strides = np.where(is_window, block_size + 1, block_size)
        windows = np.where(is_window, counts, counts - 1) // self.strides
        self.ends = np.cumsum(windows)                      # windows up to the end of each shard
        self.starts = self.ends - windows
        require(len(self) > 0, f'{name}: the longest shard holds {counts.max():,} tokens, but a '
                f'window has block_size + 1 = {block_size + 1}. Add text or lower block_size.')

    def __len__(self):
        return int(self.ends[-1])

    @property
    def bytes_per_token(self):
        """Bytes of text per token, for bits per byte. None when a shard does not say."""
        text_bytes = [shard.text_bytes for shard in self.shards]
        return sum(text_bytes) / self.tokens if all(text_bytes) else None

    def order(self, m):
        """Windows, int64 [n], of local indices m [n]: every window once in each epoch."""
        epoch, position = np.divmod(np.asarray(m, np.int64) + self.skip, len(self))
        if self.key == 'stored':
            return position
        windows = position.astype(np.uint64)
        for e in np.unique(epoch).tolist():
            # the keys follow from the name, so adding a source never reshuffles another
            digest = blake2b(f'{self.key}/{self.name}/{e}'.encode(), digest_size=48).digest()
            keys = np.frombuffer(digest, '<u8').tolist()
            now = epoch == e
            windows[now] = permute(windows[now], len(self), keys)
        return windows.astype(np.int64)

    def read(self, windows):
        """The ids of windows [n] -> int64 [n, T+1]. UserError for ids outside of the vocabulary."""
        windows = np.asarray(windows)
        shard_of = np.searchsorted(self.ends, windows, side='right')
        offsets = (windows - self.starts[shard_of]) * self.strides[shard_of]
        out = np.empty((len(windows), self.block_size + 1), np.int64)
        for row, s, offset in zip(out, shard_of.tolist(), offsets.tolist()):
            row[:] = self.shards[s].tokens[offset:offset + self.block_size + 1]
        if len(out) and (out.max() >= self.vocab_size or out.min() < 0):
            row, column = np.argwhere((out >= self.vocab_size) | (out < 0))[0]
            raise UserError(f'{self.name}: id {out[row, column]:,} at token '
                            f'{offsets[row] + column:,} of {self.shards[shard_of[row]].path} is '
                            f'outside the vocabulary of {self.vocab_size:,}. The shard is damaged, '
                            'or was made with another tokenizer.')
        return out

    def fingerprint(self):
        """A text that differs when the data do: shards, tokens, and a hash of names and contents.

        Of large data, 64 MB evenly spread over the shards stand for the content.
        """
        digest, most = blake2b(digest_size=8), 2**26 // len(self.shards)
        for shard in self.shards:
            digest.update(f'{os.path.basename(shard.path)} {shard.count} '.encode())
            tokens = shard.tokens
            pieces = max(1, min(256, most // 4096))         # of 4096 bytes or more
            length = max(1, most // pieces // tokens.itemsize)
            if tokens.nbytes <= most:
                pieces, length = 1, len(tokens)
            for start in np.linspace(0, len(tokens) - length, pieces).astype(int):
                digest.update(tokens[start:start + length].tobytes())
        return f'{len(self.shards):,} shards, {self.tokens:,} tokens, {digest.hexdigest()}'


def open_source(cfg, name, split, **order):
    """The Source of that name and split, where the knobs data_dir and paths say."""
    return Source(name, find_shards(name, split, cfg.data_dir, cfg.paths), cfg.block_size, **order)


def val_windows(source, n=0):
    """A fixed list of n windows, evenly spread over the source. 0 means all of them."""
    n = min(n or len(source), len(source))
    return [i * len(source) // n for i in range(n)]


# ------------------------------------------------------------------------------
# Shards: files of token ids
#
# Our format is the .bin of llm.c: a header of 256 little-endian int32 words, then the ids. llm.c
# uses words 0 to 2 and leaves the others zero. We use some of those (zero means unknown), so our
# shards open there and theirs open here:
#   0 magic, 1 version, 2 tokens, 3 bytes per token, 4 vocabulary size, 5 end-of-text id + 1,
#   6 hash of the tokenizer's name, 7 and 8 bytes of text (low and high 31 bits)

HEADER_BYTES = 1024
FORMATS = {20240520: (1, np.dtype('<u2')), 20240801: (7, np.dtype('<u4'))}  # magic: version, type


@dataclass(eq=False)
class Shard:
    """One file of token ids. None means that the file does not say."""
    path: str
    format: str                         # 'llm.c', 'headerless' or 'Megatron'
    offset: int                         # bytes before the first token
    dtype: np.dtype
    count: int                          # tokens
    vocab_size: int = None
    eot: int = None                     # id of the end-of-text token
    tokenizer: int = None               # hash of the tokenizer's name
    text_bytes: int = None              # bytes of the text behind the tokens
    sequence: int = None                # Megatron: length of its sequences, if all are equal

    @property
    def tokens(self):
        """The ids [count], mapped from the file: only what is read is loaded."""
        return map_tokens(self)


# A map keeps its file open, and a process may open about a thousand: the last 256 stay mapped.
@lru_cache(256)
def map_tokens(shard):
    try:
        tokens = np.memmap(shard.path, shard.dtype, 'r', shard.offset, (shard.count,))
    except ValueError:
        raise UserError(f'{shard.path}: shorter than when it was opened. Copy it again.')
    if hasattr(mmap, 'MADV_RANDOM'):
        # else every window read from a disk brings up to megabytes of neighbours along
        tokens._mmap.madvise(mmap.MADV_RANDOM)
    return tokens


def open_shard(path):
    """A Shard from a file's header and size. Reads no tokens. UserError for what is none.

    Other programs' formats are opened by corpora/formats.py: nanoGPT's, Megatron's and GPT-NeoX's.
    """
    path = str(path)
    try:
        with open(path, 'rb') as file:
            header = file.read(HEADER_BYTES)
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}).')
    require(size > 0, f'{path}: the file is empty. Prepare it again.')
    if int.from_bytes(header[:4], 'little') not in FORMATS:
        from corpora import formats
        return formats.open_other(path, header, size)

    require(len(header) == HEADER_BYTES, f'{path}: truncated within its header. Copy it again.')
    magic, version, count, itemsize, vocab_size, eot, tokenizer, low, high = np.frombuffer(
        header, '<i4', 9).tolist()
    expected_version, dtype = FORMATS[magic]
    is_sound = version == expected_version and itemsize in (0, dtype.itemsize) and count > 0
    require(is_sound and min(vocab_size, eot, low, high) >= 0, f'{path}: the header is damaged. It '
            f'says version {version}, {count:,} tokens of {itemsize} bytes and a vocabulary of '
            f'{vocab_size:,}. Copy or prepare it again.')
    require(size == HEADER_BYTES + count * dtype.itemsize,
            f'{path}: the header says {count:,} tokens, but the file holds '
            f'{(size - HEADER_BYTES) // dtype.itemsize:,}. Copy or prepare it again.')
    return Shard(path, 'llm.c', HEADER_BYTES, dtype, count, vocab_size or None,
                 eot - 1 if eot else None, tokenizer or None, low + (high << 31) or None)


def find_shards(name, split, data_dir='data', paths=None):
    """The sorted files of a source's split, 'train' or 'val'.

    They are data_dir/name/split*.bin, unless paths = {'pile/train': '/big/pile/*.bin'} names a glob
    or a list of globs.
    """
    folder = glob.escape(os.path.join(data_dir, name))      # a folder may be called x[1]
    patterns = (paths or {}).get(f'{name}/{split}', os.path.join(folder, f'{split}*.bin'))
    patterns = [patterns] if isinstance(patterns, str) else patterns
    files = sorted({file for pattern in patterns for file in glob.glob(pattern)})
    if f'{name}/{split}' not in (paths or {}):
        for file in files:
            number = os.path.basename(file)[len(split):-len('.bin')]
            require(re.fullmatch(r'([-_.]?(\d+|of))*', number), f'{file}: is it a shard of '
                    f'{split}? Such a name has only numbers after {split!r}. Move the file away, '
                    'rename it, or say with --paths which files to read.')
    require(files, f'there are no {split} shards of {name!r}: nothing matches '
            f'{" ".join(patterns)}. Make them: python -m corpora.prepare {name} FILES... '
            '(recipes are in corpora/README.md). Or say where they are: '
            f"--paths=\"{{'{name}/{split}': 'folder/*.bin'}}\". To try the config on built-in "
            'data: --rehearse')
    return files


# ------------------------------------------------------------------------------
# Plan: the data of a stage

class Plan:
    """What comes when in a stage, and what it is evaluated on. The same on every process.

    A run numbers its samples, batch_size of them a step, and its mixes say from which sources they
    come. Here is code with 5% replay of docs, and 25% from step 900 on, at 16 samples a step:

        [(0, {'code': '19/20', 'docs': '1/20'}), (14400, {'code': '3/4', 'docs': '1/4'})]

    The history says what the stages before have read of each source, and in which order:

        {'docs': {'order': '1337', 'read': 16000, 'replayed': 0, 'windows': ...}}

    Replay keeps that order, so it repeats what the model has seen: from the first sample on or,
    with continue_data, from where an earlier stage stopped to replay it.

    start: what the stage takes along, see TAKES in train.py; lr: a switch may wait for a rate.
    """

    def __init__(self, cfg, lr, start):
        self.cfg, self.notes = cfg, []                  # notes: sentences for the user
        self.seen = start.history.get('sources', {})    # the history, as above
        self.context = max(cfg.block_size, start.history.get('context', 0))     # longest windows

        # the mixes that have begun, then those to come. Only a resumed run has planned them before
        self.mixes = list(start.progress.get('mixes', []))
        first_step = start.progress.get('step', 0)
        to_come = start.stage['mixes'] if start.stage else plan_mixes(cfg, lr, first_step)
        for first_sample, weights in to_come:
            if not self.mixes or self.mixes[-1][1] != weights:
                self.mixes.append((first_sample, weights))

        # what is trained on. Where a run goes on, its sources do too
        skips = start.progress.get('skips', {})
        names = {name for _, weights in self.mixes for name in weights}
        self.sources = {name: self.source(name, skips) for name in sorted(names)}
        self.mixture = Mixture(self.sources, self.mixes)

        # what is evaluated: a fixed list of windows of each set, of old data too
        self.val_sets, self.val_prints = {}, {}
        for name in cfg.val_data:
            source = open_source(cfg, name, 'val')
            self.val_sets[name] = source, val_windows(source, cfg.eval_windows)
            self.val_prints[name] = source.fingerprint()
            require_same(f'the validation data of {name}', self.val_prints[name],
                         start.stage.get('val_prints', {}).get(name))

        # ids that the model knows: those of its weights, or of the knob, or what the data need
        self.opened = dict(self.sources)
        for name, (source, _) in self.val_sets.items():
            self.opened[f'{name} (val)'] = source
        ids = max(s.vocab_size or 50304 for source in self.opened.values() for s in source.shards)
        self.vocab_size = cfg.vocab_size or math.ceil(ids / 128) * 128
        if start.model:
            self.vocab_size = start.model['shape']['vocab_size']
        self.tokenizer = one_tokenizer(self.opened, start.history.get('tokenizer'))
        self.notes += limit_ids(self.opened, self.vocab_size)

        known = {*cfg.val_data, *self.sources}
        for name in cfg.old_data:
            require(any(teaches(name, other) or teaches(other, name) for other in known),
                    f'old_data = {cfg.old_data}: {name!r} is not evaluated, nor trained on.'
                    f'{did_you_mean(name, known)}')
        unknown = sorted(self.named('replay_data') - set(self.seen)) if self.seen else []
        if unknown:
            self.notes.append(f'NOTE: {", ".join(unknown)} is replayed, but no earlier stage has '
                              'read it under this name: to this run it is new data.')

        # a process takes its rows of a batch in micro-batches of equal size
        from support import processes       # not above: corpora/ reads shards without torch
        self.rank, self.world_size = processes.rank(), processes.world_size()
        self.micro_batch_size, self.micro_steps = micro_batches(
            cfg.batch_size // self.world_size, cfg.micro_batch_size)

        # {validation set: what it is to this stage}, worked out once, when the stage begins
        first, last = self.counts(first_step), self.counts(cfg.max_steps)
        read = {name for name in self.sources if last[name] > first[name]}
        self.roles = start.stage.get('roles') or {name: self.role(name, start, read)
                                                  for name in self.val_sets}

    def source(self, name, skips):
        """The Source of that name, in the order and from the sample on that this stage reads it."""
        cfg, seen = self.cfg, self.seen.get(name, {})
        order, skip = seen.get('order', str(cfg.seed)), 0
        if name in cfg.replay_data and cfg.replay_order != 'first-seen':
            order = 'stored' if cfg.replay_order == 'stored' else f'{cfg.seed}/reshuffled'
        if name in skips:
            skip = skips[name]
        elif cfg.continue_data:
            skip = seen.get('read' if name in self.named('train_data') else 'replayed', 0)

        # is it still what the order was made for?
        source = open_source(cfg, name, 'train', key=order, skip=skip)
        source.windows = f'windows of {cfg.block_size} tokens, {source.fingerprint()}'
        before = seen.get('windows')
        if name in skips or cfg.continue_data:
            require_same(f'the data of {name}', source.windows, before)
        elif order == seen.get('order') != 'stored' and source.windows != before:
            self.notes.append(f'NOTE: {name} comes in another order than in the earlier stage, '
                              f'which had {before}; now there are {source.windows}.')
        return source

    def named(self, knob):
        """The sources in train_data or replay_data, also those of switches."""
        groups = [getattr(self.cfg, knob), *(s.get(knob, {}) for s in self.cfg.switches)]
        return {name for group in groups for name in group}

    def role(self, name, start, read):
        """What a validation set is to this stage, which reads these sources. Only that teaches."""
        def is_taught_by(sources):
            return any(teaches(source, name) for source in sources)

        # of weights from elsewhere, what is replayed must be what they know
        replayed = set() if self.seen else read & self.named('replay_data')
        was_known = is_taught_by({*self.seen, *self.cfg.old_data, *replayed})
        if not was_known and not is_taught_by(read):
            return 'never trained on'
        if not start.model:
            return 'training data'                      # from scratch nothing is old
        if not was_known:
            return 'new data'
        if not is_taught_by(read & self.named('train_data')):
            return 'old data'
        # a new stage reads it again, and a branch goes on with it
        return 'training data' if start.progress else 'the same data again'

    def batch(self, step, micro_step):
        """Inputs x and targets y, int64 (B, T) each, and the sources [B] of a micro-step's rows."""
        return self.mixture.batch(batch_rows(step, self.cfg.batch_size, self.rank, self.world_size,
                                             self.micro_batch_size, micro_step))

    def counts(self, step):
        """{source: samples} in the first steps of the run."""
        return self.mixture.counts(step * self.cfg.batch_size)

    def change(self, step, weights):
        """From a step on, the weights of sources are others, up to the next switch. None: as is."""
        if weights is None:
            return
        unknown = sorted(set(weights) - set(self.sources))
        require(not unknown, f'the mixture names {unknown}, which the run has not opened. Name '
                'them in train_data too, with weight 0 if they come later.')
        sample, weights = step * self.cfg.batch_size, as_text(weights)
        begun = [mix for mix in self.mixes if mix[0] <= sample]
        if begun[-1][1] != weights:
            later = [mix for mix in self.mixes if mix[0] > sample]
            begun = [mix for mix in begun if mix[0] < sample]
            self.mixes = [*begun, (sample, weights), *later]
            self.mixture = Mixture(self.sources, self.mixes)

    # What a checkpoint says of the data, in three of its parts

    def history(self, step):
        """What this stage and those before it have read. Nothing is said of what was not read."""
        seen = dict(self.seen)
        for name, n in self.counts(step).items():
            source, entry = self.sources[name], {'read': 0, 'replayed': 0, **seen.get(name, {})}
            entry |= {'order': str(source.key), 'windows': source.windows}
            for knob, kind in (('train_data', 'read'), ('replay_data', 'replayed')):
                if name in self.named(knob):
                    entry[kind] = max(entry[kind], source.skip + n)
            if n:
                seen[name] = entry
        return {'sources': seen, 'tokenizer': self.tokenizer, 'context': self.context}

    def progress(self, step):
        """The mixes that have begun, and the samples that each source has skipped."""
        return {'mixes': [mix for mix in self.mixes if mix[0] < step * self.cfg.batch_size],
                'skips': {name: source.skip for name, source in self.sources.items()}}

    def stage(self, step):
        """The mixes to come, and what was worked out when the stage began."""
        return {'mixes': [mix for mix in self.mixes if mix[0] >= step * self.cfg.batch_size],
                'roles': self.roles, 'val_prints': self.val_prints}


def teaches(source, val_set):
    """A set is taught by the source of its name and by that source's parts, such as docs/1of3."""
    return source == val_set or source.startswith(f'{val_set}/')


def plan_mixes(cfg, lr, first_step):
    """[(first sample, {source: weight}), ...]: every switch becomes a step before training starts.

    A switch changes what it names of train_data, replay_data and replay, at a step (an integer), at
    a fraction of the run, or when the rate has fallen to lr_below times its peak.
    """
    mixes, earliest = [], first_step
    for switch in [{}, *cfg.switches]:
        step = switch.get('step', first_step)
        if 'lr_below' in switch:
            step = lr.first_below(switch['lr_below'])
        elif isinstance(step, float):
            step = round(step * cfg.max_steps)
        require(step is not None and earliest <= step < cfg.max_steps, f'switches: {switch} falls '
                f'on step {step}, but must come after the switch before it and before max_steps = '
                f'{cfg.max_steps}.')
        knobs = {knob: switch.get(knob, getattr(cfg, knob))
                 for knob in ('train_data', 'replay_data', 'replay')}
        mixes.append((step * cfg.batch_size, as_text(mix_weights(**knobs))))
        earliest = step + 1
    return mixes


def as_text(weights):
    """Fractions as a checkpoint keeps them."""
    return {name: str(weight) for name, weight in weights.items()}


def micro_batches(rows, most):
    """(rows of a micro-batch, micro-batches of a step): equal parts of at most so many rows."""
    size = max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)
    return size, rows // size


def batch_rows(step, batch_size, rank=0, world=1, micro_batch=None, micro_step=0):
    """The global samples of one micro-step of one process: a range of micro_batch numbers."""
    micro_batch = micro_batch or batch_size // world
    first = step * batch_size + (micro_step * world + rank) * micro_batch
    return range(first, first + micro_batch)


# ------------------------------------------------------------------------------
# Checks

def require_same(what, now, then):
    """UserError when a fingerprint has changed. then: None where there was none."""
    require(then in (None, now), f'{what} have changed. There were {then}; now there are {now}. '
            'Put the old ones back, or train anew in another out_dir.')


def one_tokenizer(sources, known=None):
    """The hash of the tokenizer that made all data, and that of the weights, if it is known."""
    paths = {shard.tokenizer: shard.path for source in sources.values() for shard in source.shards
             if shard.tokenizer}
    require(len(paths) <= 1, f'{" and ".join(paths.values())} were made with different tokenizers. '
            'Prepare all data with the same.')
    for tokenizer, path in paths.items():
        require(known in (None, tokenizer), f'{path} was made with another tokenizer than the data '
                'that the weights were trained on. Prepare it with theirs.')
        return tokenizer
    return known


def limit_ids(sources, vocab_size):
    """UserError unless the ids of {label: Source} fit a model of so many -> [a warning] or [].

    From here on, larger ids are refused when they are read. As not every header says everything, 8
    windows of each source are read now.
    """
    for label, source in sources.items():
        for shard in source.shards:
            ids = shard.vocab_size or 0
            require(ids <= vocab_size, f'{label}: {shard.path} has a vocabulary of {ids:,} ids, '
                    f'but the model has {vocab_size:,}. Raise vocab_size, or prepare the data with '
                    'the tokenizer of the model.')
        source.vocab_size = min(source.vocab_size, vocab_size)

    # A token that only the new data contain is learned on them alone, which shows in every curve.
    ends = [s.eot for source in sources.values() for s in source.shards if s.eot is not None]
    without = []
    for label, source in sources.items():
        seen = source.read(val_windows(source, 8))
        if ends and ends[0] not in seen and any(shard.eot is None for shard in source.shards):
            without.append(label)
    return [f'WARNING: {", ".join(without)} contain no end-of-text token, but other sources do. A '
            'token that a model never trained confounds a forgetting curve; see --eot in '
            'corpora/README.md.'] if without else []


# ------------------------------------------------------------------------------
# python data.py SHARD...

def main(names):
    require(names and not names[0].startswith('-'), __doc__)
    for name in names:
        for path in sorted(glob.glob(name)) or [name]:
            shard = open_shard(path)
            print(f'{path}: {shard.count:,} tokens ({shard.format}, {shard.dtype.name})\n'
                  f'  vocabulary {shard.vocab_size}, end-of-text {shard.eot}, tokenizer hash '
                  f'{shard.tokenizer}, bytes of text {shard.text_bytes} (None: unknown)\n'
                  f'  begins with {" ".join(map(str, shard.tokens[:32].tolist()))}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f'data.py: {error}')
