"""Gradient episodic memory: no step may raise the loss on old data, as far as gradients tell.

GEM, Lopez-Paz & Ranzato 2017, arXiv:1706.08840; A-GEM, Chaudhry et al. 2019, arXiv:1812.00420.
Liu et al. 2020, arXiv:2004.14218, fine-tune cross-lingual models in this way.

Every step also computes the gradient r of the loss on a batch of old data. If the gradient g of
the new data has a negative product with it, g is replaced by the nearest g' with g'.r >= 0
(A-GEM, equation 11: g' = g - (g.r / r.r) r). With --gem=true there is a constraint for each old
source, and the nearest g' solves a small quadratic program (GEM, equation 11).
AdamW then scales g' and adds momentum, so the constraint holds for the gradient, not for the step.

    python -m projects.gem config/rewarm_docs_code.py --replay=0 --out_dir=out/agem

The old data are those of replay_data; replay=0 keeps them out of the batches. A step takes twice as
long as without. After 200 steps (2 minutes on 2 cores; results/projects/gem, one seed):

    no replay    2.072 on docs    1.263 on code
    A-GEM        2.061            1.263            3.5% of the gradients are projected
    5% replay    1.787            1.266

The gradients seldom disagree: their cosine is near 0.2 at first, where most is forgotten, and near
0 at the end. So there is little to project. The old loss rises although each gradient may allow it:
steps are long, and AdamW changes their direction.

Try next: the product with AdamW's step in place of the gradient; GEM's margin (v >= 0.5); a smaller
memory; the cosine layer by layer.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

import data
import train
from configurator import require
from support import parallel, processes


@dataclass
class Knobs(train.Config):
    # --- GEM ---------------------------------------------------------------------------------
    gem: bool = False                   # a constraint for each old source; False: one for all
    memory: int = 0                     # windows of old data that are kept; 0: all
    memory_batch: int = 16              # windows of old data for the gradient of a step


class GEM(train.Method):
    Config, Parent = Knobs, train.Method

    def start(self, model, saved):
        cfg = self.cfg
        require(cfg.replay_data, 'gem: replay_data must name the old data. A replay of 0 is fine.')
        require(not parallel.is_sharded(cfg), 'gem: gradients must be whole. Use --parallel=ddp.')
        n, world = cfg.memory_batch, processes.world_size()
        require(n >= 1 and n % world == 0, f'memory_batch = {n} does not divide among '
                f'{world} processes.')
        self.counts = saved or {'steps': 0, 'projected': 0}

        # what the memory contains: a mixture of all old sources, or each by itself
        together = [cfg.replay_data]
        if cfg.gem:
            together = [{name: 1.0} for name in cfg.replay_data]
        self.memories = []
        for weights in together:
            sources = {name: data.open_source(cfg, name, 'train', key=cfg.seed)
                       for name in weights}
            self.memories.append(data.Mixture(sources, [(0, data.mix_weights(weights))]))

    def reference(self, model, parameters, memory, step):
        """The gradient [n] of the loss on the batch of old data of a step."""
        device, n = parameters[0].device, self.cfg.memory_batch
        samples = np.arange(step * n, (step + 1) * n)
        if self.cfg.memory:
            samples %= self.cfg.memory
        samples = samples[processes.rank()::processes.world_size()]
        total = torch.zeros(sum(p.numel() for p in parameters), device=device)
        for start in range(0, len(samples), self.cfg.micro_batch_size):
            part = samples[start:start + self.cfg.micro_batch_size]
            x, y, _ = memory.batch(part)                                        # (B, T) each
            with self.autocast:
                _, loss = model(*processes.to_device((x, y), device.type))
            # scaled as in train(): fp16 rounds small gradients to 0
            gradients = torch.autograd.grad(self.scaler.scale(loss), parameters)
            total += flat(gradients) * (len(part) / len(samples) / self.scaler.get_scale())

        # p.grad is a mean over the processes, and so is this
        if dist.is_initialized():
            dist.all_reduce(total)
        return total / processes.world_size()

    def change_gradients(self, model, step, batches):
        parameters = [p for p in model.parameters() if p.grad is not None]
        g = flat(p.grad for p in parameters)                                    # (n)
        references = torch.stack([self.reference(model, parameters, memory, step)
                                  for memory in self.memories])                 # (K, n)
        products = references @ g
        cosines = products / (references.norm(dim=1) * g.norm())
        self.counts['steps'] += 1
        if products.isfinite().all() and products.min() < 0:
            self.counts['projected'] += 1
            g = project(g, references)
            parts = g.split([p.numel() for p in parameters])
            for p, part in zip(parameters, parts):
                p.grad.copy_(part.view_as(p))
        return {'cosine': cosines.mean().item(),
                'projected': self.counts['projected'] / self.counts['steps']}

    def state_dict(self):
        return dict(self.counts)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def project(g, references):
    """The vector nearest to g [n] whose product with each of the references (K, n) is >= 0.

    It is g + references^T v, where v >= 0 minimizes v Q v / 2 + c v with Q = references
    references^T and c = references g. One number of v after the other is set to its best value
    until none changes. For K = 1 the first is exact.
    """
    Q = (references @ references.T).double().cpu().numpy()
    c = (references @ g).double().cpu().numpy()
    v = np.zeros(len(c))
    for _ in range(10_000):
        before = v.copy()
        for k in range(len(c)):
            v[k] = max(0.0, v[k] - (Q[k] @ v + c[k]) / Q[k, k])
        if np.allclose(v, before, rtol=1e-9, atol=0):
            break
    return g + references.T @ torch.from_numpy(v).to(g)


if __name__ == '__main__':
    train.launch(GEM)
