"""Does replay need the old data? The old model writes the text that is replayed.

Self-generated replay, arXiv:2605.26097. Whoever continues a published model rarely has the data it
was trained on. What the model samples at temperature 1 follows the distribution that it has learned
from them, so that text is replayed instead.

    python train.py config/pretrain_docs.py
    python -m projects.self_replay out/pretrain_docs --name=self_docs
    python train.py config/rewarm_docs_code.py --replay_data="{'self_docs': 1}" --out_dir=out/self

3 minutes to sample 600,000 tokens on one core, as long as the stage itself. Expect 1.781 nats per
byte on docs with 5% and 1.615 with 25% of it, against 1.759 and 1.557 with real text and 2.121
without replay. Yet the text makes no sense: "For work graph. Args: desiting restire} 3)". Try other
temperatures, or an old model that has converged. The paper says that it fails when a model is near
its capacity.

Tokens are sampled in `batch` streams side by side, and the shard is the streams one after another.
A stream begins with end-of-text, and so does every document within it. A document may be longer
than the block size T: when a block is full, its last T/2 tokens begin the next one. Training cuts
the shard into windows of T + 1 tokens anywhere, as it cuts real text. (If every window began with
end-of-text, the model would rehearse beginnings alone, and an end after every T tokens.) The last
document of a stream is cut short, so take long streams: `tokens` far above `batch` times T.
"""
import argparse
import contextlib
import sys
from pathlib import Path

import torch

import data
import eval
from configurator import UserError, require
from corpora.formats import write_shard
from support.sampling import generate


def sample_streams(model, eot, streams, length, temperature=1.0, generator=None):
    """Token ids (streams, length). Each stream is text that begins with end-of-text."""
    T = model.config.max_position_embeddings
    device = model.embed_out.weight.device
    ids = torch.full((streams, 1), eot, device=device)                          # (streams, so far)
    while ids.shape[1] < length:
        context = ids[:, -max(T // 2, 1):]
        # a block is full at T tokens, and one more is sampled from all of them
        new = min(T + 1 - context.shape[1], length - ids.shape[1])
        block = generate(model, context, new, temperature, generator=generator)
        ids = torch.cat((ids, block[:, context.shape[1]:]), dim=1)
    return ids


def loss_on(model, folder, windows=128):
    """The loss of a model on its own text. It is near the loss on the real text if all is well."""
    T = model.config.max_position_embeddings
    source = data.Source(folder.name, [folder / 'train_00000.bin'], T)
    own = {folder.name: (source, data.val_windows(source, windows))}
    return eval.evaluate(model, own, 16, contextlib.nullcontext())[folder.name]['loss']


def main(argv):
    devices = ['cuda', 'cpu'] if torch.cuda.is_available() else ['cpu']
    parser = argparse.ArgumentParser(prog='projects.self_replay', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='the old model: a run, a checkpoint or a Hugging Face folder')
    parser.add_argument('--name', required=True, help='of the source, for replay_data')
    parser.add_argument('--tokens', type=int, default=600_000)
    parser.add_argument('--temperature', type=float, default=1.0)
    parser.add_argument('--batch', type=int, default=64, help='streams that are sampled together')
    parser.add_argument('--seed', type=int, default=1, help='the same seed gives the same bytes')
    parser.add_argument('--data_dir', default='data')
    parser.add_argument('--tokenizer', help='bytes, gpt2, a tokenizer.json, or a folder with one')
    parser.add_argument('--device', default=devices[0], choices=devices)
    args = parser.parse_args(argv)
    folder = Path(args.data_dir, args.name)
    require(not any(folder.glob('train*')), f'{folder} already contains text to train on. Delete '
            'it, or choose another --name.')
    state, model = eval.load_run(args.run)
    tokenizer = eval.tokenizer_of(args.run, state, model, args.tokenizer)
    T = model.config.max_position_embeddings
    require(args.batch > 0 and args.tokens > args.batch * T, f'--tokens {args.tokens:,}: expected '
            f'more than --batch {args.batch} times the block size {T}. Lower the batch.')

    # Rows above the vocabulary are padding. Without them, they cannot be drawn.
    model.embed_out.weight = torch.nn.Parameter(model.embed_out.weight[:tokenizer.vocab_size])
    model.to(args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    length = -(-args.tokens // args.batch)                                      # rounded up
    streams = sample_streams(model, tokenizer.eot, args.batch, length, args.temperature, generator)
    ids = streams.flatten()[:args.tokens].cpu().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / 'train_00000.bin', ids, vocab_size=tokenizer.vocab_size,
                     tokenizer=tokenizer.name, eot=tokenizer.eot)
    print(f'{folder}: {len(ids):,} tokens, on which the loss of {args.run} is '
          f'{loss_on(model, folder):.3f} nats per token. They begin:')
    print(tokenizer.decode(ids[1:500]))


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')            # a terminal without Unicode is no error
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.self_replay: {error}')
