"""HyperCloning: a model twice as wide that starts where a finished one ended.

Samragh et al. 2024, arXiv:2409.12903.

Every hidden vector h of the old model becomes (h, h) in the new one, so each matrix W becomes
[[W, W], [W, W]] / 2 and the output stays the same. The copies then have equal gradients and stay
equal for ever, so the clone learns no more than the old model could. Noise breaks the symmetry and
still keeps the output: [[W + N1, W - N1], [W + N2, W - N2]] / 2.

    python -m projects.hyperclone out/pretrain_docs out/clone.pt --noise=10
    python train.py config/rewarm_docs_code.py --init_from=out/clone.pt --out_dir=out/wide

Seconds on 2 cores, and 8 minutes for the second command.

Expect (results/projects/hyperclone, one seed, 60 steps) 1.622 on code at the usual peak: AdamW
moves every tile as far as it moved W, and an output adds up two of them. At half the peak the clone
reaches 1.448, the narrow model 1.456, and the wide shape from scratch 2.377. So the width gains
little in so few steps. Try next: more steps, other noise, [[W, 0], [0, W]] as tiles.
"""
import argparse
import sys
from dataclasses import replace

import torch

import eval
from configurator import UserError
from model import GPTNeoX
from support import checkpoints


def clone(model, noise=None, seed=1337):
    """A GPTNeoX of twice the width, with the logits of `model`.

    Heads are doubled too, so a head and its rotary dims stay as they are. noise: the ratio of
    signal to noise in decibels, or None. It holds for both kinds of layers, since x + attention(x)
    and x + mlp(x) of (h, h) are again two equal halves.
    """
    config = model.config
    wide = GPTNeoX(replace(config, hidden_size=2 * config.hidden_size,
                           num_attention_heads=2 * config.num_attention_heads,
                           intermediate_size=2 * config.intermediate_size))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tile(name, w, noise, generator) for name, w in model.state_dict().items()}
    wide.load_state_dict(weights)
    return wide


def tile(name, w, noise, generator):
    """The weight of the wide model that takes the place of w."""
    if w.dim() == 1:
        return w.repeat(2)                              # biases and LayerNorms
    if name == 'gpt_neox.embed_in.weight':
        return w.repeat(1, 2)                           # (V, C) -> (V, 2 C)
    if name == 'embed_out.weight':
        return w.repeat(1, 2) / 2                       # its rows are tokens, and stay
    # Rows of query_key_value are grouped by heads (q, k, v of head 0, then of head 1, ...), so the
    # second half of the tiled rows is a second set of the same heads.
    tiled = w.repeat(2, 2) / 2
    if noise is not None:
        power = tiled.square().mean() / 10**(noise / 10)
        n = torch.randn(2 * w.shape[0], w.shape[1], generator=generator) * power.sqrt()
        tiled += torch.cat((n, -n), dim=1)              # (h, h) does not see it
    return tiled


@torch.no_grad()
def difference(a, b):
    """The largest difference between the logits of two models, on random tokens."""
    T = min(256, a.config.max_position_embeddings)
    tokens = torch.randint(a.config.vocab_size, (4, T), generator=torch.Generator().manual_seed(0))
    return (a(tokens)[0] - b(tokens)[0]).abs().max().item()


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='a finished run, a checkpoint or a Hugging Face directory')
    parser.add_argument('out', help='the checkpoint to write, such as out/clone.pt')
    parser.add_argument('--noise', type=float, help='signal to noise in decibels (default: none)')
    parser.add_argument('--seed', type=int, default=1337, help='of the noise')
    args = parser.parse_args(argv)
    state, model = eval.load_run(args.run)
    wide = clone(model, args.noise, args.seed)
    checkpoints.save_weights(args.out, wide, state)
    print(f'{args.out}: {model.num_params():,} parameters became {wide.num_params():,}; logits '
          f'differ by {difference(model, wide):.1e} at most')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.hyperclone: {error}')
