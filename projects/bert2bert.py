"""bert2BERT: ways to grow a finished model in width and depth.

Chen et al. 2021, arXiv:2110.07143; stacking is that of Gong et al. 2019 (StackBERT).

Function-preserving initialisation (FPI) copies units, drawn at random, and divides what leaves
them by the number of copies. Advanced initialisation (AKI) takes the new units from the layer
above: the function changes, but the copies are no longer alike, and upper layers know more. The
depth grows by laying the whole model on itself.

    python -m projects.bert2bert out/pretrain_docs out/aki.pt --width=aki --hidden_size=256
    python -m projects.bert2bert out/pretrain_docs out/stack.pt --layers=8
    python train.py config/rewarm_docs_code.py --init_from=out/aki.pt --out_dir=out/wide

Seconds on 2 cores, and 8 minutes for the last command.

Expect (results/projects/bert2bert, one seed, 60 steps at half the old peak) that AKI does not help
a model of 4 layers: it starts at 3.198 on code and reaches 1.520. FPI starts at 1.784 and reaches
1.452, HyperCloning with noise 1.448, the wide shape from scratch 2.377. The copies of FPI have
equal gradients and stay alike. Try next: AKI on a deeper model; a stack, whose upper half is
trained first (the paper's second idea); noise on the copies.
"""
import argparse
import sys
from dataclasses import replace

import torch

import eval
from configurator import UserError, require
from model import GPTNeoX
from projects.hyperclone import difference
from support import checkpoints


def draw(old, new, generator):
    """g: the unit of the old model that each of the new model's units copies."""
    return torch.cat((torch.arange(old), torch.randint(old, (new - old,), generator=generator)))


def units_of_heads(heads, size):
    """The numbers of all units of the heads, `size` units each."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def expand_inputs(w, g):
    """Columns w[:, g], divided by the number of times that g names each."""
    return w[:, g] / torch.bincount(g, minlength=w.shape[1])[g]


def widen(model, hidden_size, kind='fpi', seed=1337):
    """A GPTNeoX of width hidden_size, with heads of the same size as those of `model`.

    The residual stream has one map for all layers, or its sums would mix units. A LayerNorm weighs
    a unit by its copies, so with FPI the function is preserved exactly only if all units have
    equally many; the paper ignores this gap.
    """
    config, D = model.config, model.config.head_size
    require(hidden_size % D == 0 and hidden_size >= config.hidden_size, f'hidden_size = '
            f'{hidden_size}: expected a multiple of the head size {D}, at least '
            f'{config.hidden_size}.')
    heads, F = hidden_size // D, round(config.intermediate_size * hidden_size / config.hidden_size)
    wide = GPTNeoX(replace(config, hidden_size=hidden_size, num_attention_heads=heads,
                           intermediate_size=F))
    generator = torch.Generator().manual_seed(seed)
    residual = draw(config.hidden_size, hidden_size, generator)
    g_heads = draw(config.num_attention_heads, heads, generator)
    g_mlp = draw(config.intermediate_size, F, generator)
    # {module: (map of its inputs or None, map of its outputs)}
    maps = {'query_key_value': (residual, units_of_heads(g_heads, 3 * D)),
            'dense': (units_of_heads(g_heads, D), residual),
            'dense_h_to_4h': (residual, g_mlp), 'dense_4h_to_h': (g_mlp, residual),
            'embed_out': (residual, torch.arange(config.vocab_size))}
    old, new = model.state_dict(), {}
    for name, w in old.items():
        if name == 'gpt_neox.embed_in.weight':
            new[name] = w[:, residual]
            continue
        inputs, outputs = maps.get(name.split('.')[-2], (None, residual))       # else a LayerNorm
        above = old.get(layer_above(name), w) if kind == 'aki' else w
        if w.dim() == 2:
            w, above = expand_inputs(w, inputs), expand_inputs(above, inputs)
        # the new outputs: FPI copies those of this layer, AKI those of the layer above
        new[name] = torch.cat((w, above[outputs[len(w):]]))
    wide.load_state_dict(new)
    return wide


def layer_above(name):
    """The name of the same weight one layer up; of weights outside the layers, the name itself."""
    words = name.split('.')
    return '.'.join(str(int(word) + 1) if word.isdigit() else word for word in words)


def stack(model, layers):
    """A GPTNeoX of so many layers: the old ones again and again, the topmost ones last."""
    L = model.config.num_hidden_layers
    require(layers >= L, f'layers = {layers}, but the model has {L}.')
    order = [*range(L)] * (layers // L) + [*range(L - layers % L, L)]
    deep = GPTNeoX(replace(model.config, num_hidden_layers=layers))
    deep.load_state_dict(model.state_dict(), strict=False)      # all but the layers
    for layer, source in zip(deep.gpt_neox.layers, order):
        layer.load_state_dict(model.gpt_neox.layers[source].state_dict())
    return deep


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='a finished run, a checkpoint or a Hugging Face directory')
    parser.add_argument('out', help='the checkpoint to write, such as out/grown.pt')
    parser.add_argument('--width', choices=('fpi', 'aki'), default='fpi')
    parser.add_argument('--hidden_size', type=int, help='default: as it is')
    parser.add_argument('--layers', type=int, help='default: as many as there are')
    parser.add_argument('--seed', type=int, default=1337, help='of the units to copy')
    args = parser.parse_args(argv)
    state, model = eval.load_run(args.run)
    grown = model
    if args.hidden_size is not None:
        grown = widen(grown, args.hidden_size, args.width, args.seed)
    if args.layers is not None:
        grown = stack(grown, args.layers)
    checkpoints.save_weights(args.out, grown, state)
    print(f'{args.out}: {model.num_params():,} parameters became {grown.num_params():,}; logits '
          f'differ by {difference(model, grown):.1e} at most')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.bert2bert: {error}')
