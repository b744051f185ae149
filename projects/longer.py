"""Longer windows: continue with twice the block size, and look at the loss by position.

Position interpolation, Chen et al. 2023, arXiv:2306.15595; a larger rotary base, Code Llama
(Roziere et al. 2023, arXiv:2308.12950); "NTK-aware" scaling, in YaRN (Peng et al. 2023,
arXiv:2309.00071, section 3.1).

An old model has never seen positions past its block size, and their rotary angles are new to it.
Interpolation divides all positions by the factor, so that no angle is new. The NTK-aware base
stretches the slow dimensions as much and leaves the fast ones, which tell neighbours apart, nearly
as they were; 'base' takes any base.

    python -m projects.longer config/rewarm_docs_docs.py --block_size=512 --batch_size=8 \
        --stretch=ntk --out_dir=out/longer_ntk
    python -m results.positions docs out/longer_* --out longer.png

One minute a run of 100 steps on 2 cores. The loss on docs over windows of 512 tokens, where the old
model has 1.464 over 256 (results/projects/longer, one seed, --learning_rate=1e-3):

    as it was        2.463 before the first step    1.544 after 100 steps
    NTK-aware        1.660                          1.464
    interpolation    2.942                          1.498

As it was, the loss climbs from 1.3 to 3.9 between positions 270 and 370. The NTK-aware base moves
the climb to 450, and 100 steps remove it. Interpolation harms all positions alike at first.

Try next: --stretch=base --rotary_base=1e6; factors of 4; code as the new data; YaRN.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import data
import train
from configurator import require


@dataclass
class Knobs(train.Config):
    # --- longer windows ----------------------------------------------------------------------
    stretch: Literal['none', 'ntk', 'base', 'interpolate'] = 'none'     # of rotary positions
    factor: float = 2.0                 # new block size / old one, for ntk and interpolate
    rotary_base: float = 0.0            # for base; Code Llama: 1e6
    buckets: int = 16                   # parts of a window whose losses are recorded


class Longer(train.Method):
    Config, Parent = Knobs, train.Method

    def start(self, model, saved):
        cfg, config = self.cfg, model.config
        R = config.rotary_dims
        require(cfg.factor >= 1, f'factor = {cfg.factor}: expected at least 1.')
        require(cfg.rotary_base > 1 or cfg.stretch != 'base', 'stretch = base needs a rotary_base, '
                'such as 1e6.')
        require(R > 2 or cfg.stretch != 'ntk', 'stretch = ntk needs more than 2 rotary dims.')
        require(cfg.buckets and cfg.block_size % cfg.buckets == 0, f'buckets = {cfg.buckets} does '
                f'not divide a window of {cfg.block_size} tokens.')

        # the base is a field of the model, which checkpoints and exports contain
        self.base = saved['base'] if saved else config.rotary_emb_base
        if cfg.stretch == 'ntk':
            config.rotary_emb_base = self.base * cfg.factor**(R / (R - 2))
        if cfg.stretch == 'base':
            config.rotary_emb_base = cfg.rotary_base
        divisor = cfg.factor if cfg.stretch == 'interpolate' else 1.0
        tables = rotary_tables(config, divisor)
        model.cos, model.sin = (table.to(model.cos.device) for table in tables)

        self.net, self.val_sets = model, {}
        for name in cfg.val_data:
            source = data.open_source(cfg, name, 'val')
            self.val_sets[name] = source, data.val_windows(source, cfg.eval_windows)

    @torch.no_grad()
    def after_evaluation(self, step, val):
        """Record {set: [loss in each part of a window]}. Every process computes all of them."""
        found = {}
        for name, (source, windows) in self.val_sets.items():
            total = np.zeros(self.cfg.block_size)
            for start in range(0, len(windows), self.cfg.micro_batch_size):
                tokens = source.read(windows[start:start + self.cfg.micro_batch_size])
                tokens = torch.from_numpy(tokens).to(self.net.cos.device)       # (B, T + 1)
                _, loss = self.net(tokens[:, :-1], tokens[:, 1:], reduction='none')   # (B, T)
                total += loss.double().sum(0).cpu().numpy()
            parts = (total / len(windows)).reshape(self.cfg.buckets, -1).mean(1)
            found[name] = parts.round(5).tolist()
        return {'by_position': found}, None

    def state_dict(self):
        return {'base': self.base}


def rotary_tables(config, divisor):
    """The tables of model.rotary_tables, with positions divided by a number."""
    R = config.rotary_dims
    frequencies = config.rotary_emb_base ** -(torch.arange(0, R, 2).float() / max(R, 1))
    positions = torch.arange(config.max_position_embeddings).float() / divisor
    angles = positions[:, None] * frequencies                       # (block size, R / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


if __name__ == '__main__':
    train.launch(Longer)
