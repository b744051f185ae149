"""New tokens for a new domain: frequent pieces of its text become tokens of a byte-level model.

Koto et al. 2021, arXiv:2109.04607 (new rows are the mean of the old pieces' rows); ChipNeMo, Liu et
al. 2023, arXiv:2311.00176 (continual pre-training with tokens of the domain).

Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909) finds pieces of several bytes in the new
corpus. Each gets a row in both embeddings: the mean of the rows of its bytes, or random numbers.
A window then holds more text. Losses per token cannot be compared, but bits per byte can.

    python -m projects.new_tokens out/pretrain_docs out/new_tokens --learn_from code
    python train.py config/rewarm_docs_code.py --init_from=out/new_tokens/mean.pt \
        --data_dir=out/new_tokens --out_dir=out/tokens_mean
    python -m results.bits out/tokens_* --out bits.md

It writes a tokenizer, every corpus again in the new tokens, and two checkpoints. 2 minutes on 2
cores for 200 steps. Bits per byte (results/projects/new_tokens, one seed, 256 tokens: 2.1 bytes per
token of code, 1.6 of docs):

    bytes as before         2.116 on docs, 2.583 at the end    2.550 on code, 1.827 at the end
    new rows from means     4.862          2.878               3.835          1.809
    random new rows         5.107          2.920               4.095          1.825

After as many steps, which read twice the text, tokens are level with bytes on code and behind on
docs: much of what the old model knew about bytes is lost at first. Means stay ahead of random rows.

Try next: the row of the first byte in embed_out; only the new rows trained at first; 64 tokens.
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import eval
from configurator import UserError, require
from corpora.formats import tokenizer_hash
from corpora.shards import ShardWriter
from corpora.tokenizer import byte_level_json, BYTE_OF, END, load_tokenizer
from model import GPTNeoX
from support import checkpoints
from support.files import write_whole

EOT, LETTER_OF = 256, {byte: letter for letter, byte in BYTE_OF.items()}
# GPT-2's pieces of text, across which no token reaches, in the regex of Python
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def learn_merges(text, count):
    """[(left id, right id), ...]: the i-th merge makes token 257 + i. The most frequent first."""
    words = Counter(WORDS.findall(text))
    ids = [[*word.encode(), EOT] for word in words]
    weights = np.repeat(list(words.values()), [len(word) for word in ids])
    ids, size = np.concatenate(ids), 257 + count
    merges = []
    for new in range(257, size):
        pairs = ids[:-1] * size + ids[1:]
        counts = np.bincount(pairs, weights[:-1] * (ids[:-1] != EOT) * (ids[1:] != EOT))
        best = counts.argmax()
        require(counts[best] > 1, f'{new - 257} pieces occur more than once. Ask for no more.')
        hits = []
        for hit in np.flatnonzero(pairs == best).tolist():
            if not hits or hit > hits[-1] + 1:          # 'aaa' contains the pair 'aa' once
                hits.append(hit)
        ids[hits] = new
        gone = np.array(hits) + 1
        ids, weights = np.delete(ids, gone), np.delete(weights, gone)
        merges.append(divmod(int(best), size))
    return merges


def bytes_of(merges):
    """{id: bytes} of the old tokens and the new ones."""
    known = {i: bytes([i]) for i in range(256)}
    for i, (left, right) in enumerate(merges):
        known[257 + i] = known[left] + known[right]
    return known


def tokenizer_json(merges):
    """The content of a tokenizer.json: the byte tokenizer's, with merges and GPT-2's regex."""
    spec = byte_level_json()
    spec['pre_tokenizer']['use_regex'] = True
    known = {i: ''.join(LETTER_OF[b] for b in token) for i, token in bytes_of(merges).items()}
    spec['model']['vocab'] = {END: EOT} | {letters: i for i, letters in known.items()}
    spec['model']['merges'] = [f'{known[left]} {known[right]}' for left, right in merges]
    return spec


def documents(path):
    """The bytes of every document of a shard of bytes."""
    shard = data.open_shard(path)
    require(shard.tokenizer == tokenizer_hash('bytes') and shard.eot == EOT, f'{path}: not '
            'made of bytes. New tokens can be added to a byte-level corpus only.')
    ends = np.flatnonzero(shard.tokens == EOT)
    parts = [part[part != EOT].astype('u1').tobytes() for part in np.split(shard.tokens, ends)]
    return [part for part in parts if part]


def with_rows(model, merges, rows):
    """The model with rows for the new tokens: rows is 'mean' or 'random'."""
    old, size = model.config.vocab_size, 257 + len(merges)
    grown = GPTNeoX(replace(model.config, vocab_size=max(old, math.ceil(size / 128) * 128)))
    weights = dict(model.state_dict())
    for name in ('gpt_neox.embed_in.weight', 'embed_out.weight'):
        table = grown.state_dict()[name].clone()        # random rows
        table[:257] = weights[name][:257]
        for i, token in bytes_of(merges).items():
            if rows == 'mean':
                table[i] = weights[name][list(token)].mean(0)
        weights[name] = table
    grown.load_state_dict(weights)
    return grown


def retokenize(files, folder, split, content):
    """Write a corpus in the new tokens -> its tokenizer. content: of the tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / 'tokenizer.json', content)
    tokenizer = load_tokenizer(str(folder))
    writer = ShardWriter(folder / f'{split}_00000', tokenizer)
    for file in files:
        for raw in documents(file):
            writer.add(raw.decode(), len(raw))
    writer.write()
    ratio = writer.counts['bytes'] / writer.counts['tokens']
    print(f'{folder.name}/{split}: {ratio:.3f} bytes per token')
    return tokenizer


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', help='a byte-level run or checkpoint')
    parser.add_argument('out', help='a new folder, later --data_dir')
    parser.add_argument('--learn_from', required=True, help='the new corpus')
    parser.add_argument('--tokens', type=int, default=256)
    parser.add_argument('--data_dir', default='data')
    args = parser.parse_args(argv)

    state, model = eval.load_run(args.run)
    require(state['history']['tokenizer'] == tokenizer_hash('bytes'), f'{args.run}: its tokenizer '
            'is '
            'not that of bytes, so it knows longer tokens already. Start from a byte-level model.')
    require(args.tokens >= 1, f'--tokens {args.tokens}: expected at least 1.')
    out = Path(args.out)
    require(not out.exists(), f'{out} already exists. Delete it, or choose another folder.')
    names = dict.fromkeys([args.learn_from, *state['config']['val_data']])
    shards = {(name, split): data.find_shards(name, split, args.data_dir)
              for name in names for split in ('train', 'val')}

    # the tokens, from about a megabyte of documents spread over the new corpus
    texts = documents(shards[args.learn_from, 'train'][0])
    every = max(1, sum(map(len, texts)) // 10**6)
    merges = learn_merges(b''.join(texts[::every]).decode(), args.tokens)
    longest = sorted(bytes_of(merges).values(), key=len)[-6:]
    print(f'{args.tokens} new tokens. The longest:', *(repr(t.decode('utf-8', 'replace'))
                                                       for t in longest))

    # every corpus again, and the weights
    content = json.dumps(tokenizer_json(merges)).encode()
    for (name, split), files in shards.items():
        tokenizer = retokenize(files, out / name, split, content)
    state['history']['tokenizer'] = tokenizer_hash(tokenizer.name)
    write_whole(out / 'tokenizer.json', content)
    torch.manual_seed(1337)                             # for the random rows
    for rows in ('mean', 'random'):
        checkpoints.save_weights(out / f'{rows}.pt', with_rows(model, merges, rows), state)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.new_tokens: {error}')
