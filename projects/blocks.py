"""Block expansion: new layers for new data, and the old ones stay as they are.

LLaMA Pro, Wu et al. 2024, arXiv:2401.02415, section 3.2.

After every few layers comes a copy of the last of them, whose two matrices that write into the
residual stream are zero: the copy adds nothing, and the deeper model computes what the old one did.
Then only the copies are trained. What was known remains in the old layers, though the copies can
still disturb it.

    python -m projects.blocks out/pretrain_docs out/blocks.pt --every 2

It writes a checkpoint for --init_from, and prints the patterns for --freeze. Without replay, after
200 steps (2 minutes on 2 cores; results/projects/lora, one seed):

    two layers added to four    1.801 on docs    1.295 on code
    lower half frozen           1.909            1.269
    all weights                 2.072            1.263

Added layers forget least and learn least. All old weights are still there: what is forgotten, the
new layers cover up.

Try next: --every 1 and 4; the new layers removed again; new layers and replay.
"""
import argparse
import sys
from dataclasses import replace

import torch

import eval
from configurator import UserError, require
from model import GPTNeoX
from support import checkpoints

INTO_STREAM = ('attention.dense.', 'mlp.dense_4h_to_h.')


def expand(model, every):
    """(a deeper GPTNeoX that computes the same, the patterns that freeze all but its copies)."""
    layers = model.gpt_neox.layers
    require(1 <= every <= len(layers), f'--every {every}: expected 1 to {len(layers)}, the number '
            'of layers.')
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if not name.startswith('gpt_neox.layers.')}
    frozen = ['gpt_neox.embed_in.*', 'gpt_neox.final_layer_norm.*', 'embed_out.*']
    position = 0
    for i, layer in enumerate(layers):
        frozen.append(f'gpt_neox.layers.{position}.*')
        for name, tensor in layer.state_dict().items():
            weights[f'gpt_neox.layers.{position}.{name}'] = tensor
        position += 1
        if (i + 1) % every == 0:
            for name, tensor in layer.state_dict().items():
                is_zero = name.startswith(INTO_STREAM)
                copy = torch.zeros_like(tensor) if is_zero else tensor
                weights[f'gpt_neox.layers.{position}.{name}'] = copy
            position += 1
    deeper = GPTNeoX(replace(model.config, num_hidden_layers=position))
    deeper.load_state_dict(weights)
    return deeper, frozen


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', help='a run folder, a checkpoint or a Hugging Face directory')
    parser.add_argument('out', help='x.pt, for --init_from')
    parser.add_argument('--every', type=int, default=2, help='layers before each copy')
    args = parser.parse_args(argv)
    state, model = eval.load_run(args.run)
    deeper, frozen = expand(model, args.every)
    checkpoints.save_weights(args.out, deeper, state)
    print(f'{args.out}: {model.config.num_hidden_layers} layers became '
          f'{deeper.config.num_hidden_layers}. To train the new ones alone:\n--freeze="{frozen}"')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.blocks: {error}')
