"""Elastic weight consolidation: keep the weights that the old data need.

Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3; and L2-SP, Li et al. 2018, arXiv:1802.01483.

A weight matters to the old data if the loss on them is sensitive to it, and the diagonal of the
Fisher information says how sensitive. EWC adds ewc/2 * sum_i F_i (w_i - w*_i)^2 to the loss, where
w* are the weights at the start. L2-SP pulls all weights alike: l2/2 * sum_i (w_i - w*_i)^2.

    python -m projects.ewc config/rewarm_docs_code.py --ewc=1000 --replay=0 --out_dir=out/ewc

3 minutes on 2 cores, after the old model. The old data are those of replay_data, of which EWC
reads fisher_windows windows before the first step.

Expect (results/projects/ewc, one seed) that the losses on docs and code are a trade:

    no replay 2.095 and 1.157    EWC 100: 1.967 and 1.165    EWC 1000: 1.781 and 1.229
    5% replay 1.748 and 1.161    L2 0.001: 1.887 and 1.189

L2 lies on the line between the two strengths of EWC, so the Fisher information gains nothing at
this scale. A little replay beats both. Try next: EWC and 1% replay together, or a Fisher
information of more windows.
"""
from dataclasses import dataclass

import torch

import data
import train
from configurator import require


@dataclass
class Knobs(train.Config):
    # --- EWC ---------------------------------------------------------------------------------
    ewc: float = 0.0                    # weight of the distance, measured by the Fisher information
    l2: float = 0.0                     # weight of the distance, all weights alike
    fisher_windows: int = 200           # of old data, to estimate the Fisher information


class EWC(train.Method):
    Config, Parent = Knobs, train.Method

    def start(self, model, saved):
        if saved:
            self.anchor, self.fisher = saved['anchor'], saved['fisher']
            return
        self.anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.fisher = self.fisher_information(model) if self.cfg.ewc else {}

    def fisher_information(self, model):
        """{name: diagonal}, the mean square of the gradients of single windows of old data."""
        require(self.cfg.replay_data, 'ewc: replay_data must name the old data. A replay of 0 is '
                'fine.')
        parameters = dict(model.named_parameters())
        squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
        count = 0
        for source_name in self.cfg.replay_data:
            source = data.open_source(self.cfg, source_name, 'train', key=self.cfg.seed)
            for g in range(self.cfg.fisher_windows // len(self.cfg.replay_data)):
                tokens = torch.from_numpy(source.read([g])).to(model.cos.device)    # (1, T + 1)
                _, loss = model(tokens[:, :-1], tokens[:, 1:])
                gradients = torch.autograd.grad(loss, list(parameters.values()))
                for square, gradient in zip(squares.values(), gradients):
                    square += gradient**2
                count += 1
        return {name: square / count for name, square in squares.items()}

    def objective(self, model, x, y, sources):
        loss, _ = super().objective(model, x, y, sources)
        penalty = torch.zeros((), device=x.device)
        for name, p in model.named_parameters():
            distance = (p - self.anchor[name])**2
            penalty = penalty + self.cfg.l2 / 2 * distance.sum()
            if self.cfg.ewc:
                penalty = penalty + self.cfg.ewc / 2 * (self.fisher[name] * distance).sum()
        return loss + penalty, {'penalty': penalty}

    def state_dict(self):
        return {'anchor': self.anchor, 'fisher': self.fisher}


if __name__ == '__main__':
    train.launch(EWC)
