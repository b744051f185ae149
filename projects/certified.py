"""Certified robustness: what a warmup is for, on another task.

Shi et al. 2021, "Fast certified robust training with short warmup", arXiv:2103.17268. The bounds
are those of Gowal et al. 2018, arXiv:1810.12715.

Interval bound propagation sends a box, the image plus or minus eps, through the network: where even
the worst corner of the outputs has the right class, no change of the pixels by eps can fool it.
Training on that corner fails at the full eps, so eps is warmed up, for hundreds of epochs. The
paper makes the warmup short by weights and norms that keep boxes from growing, and by a penalty on
wide boxes and one-sided ReLUs while the warmup lasts.

    python -m projects.certified --warmup=5
    python -m projects.certified --warmup=5 --initialise=false --normalise=false --regularise=false

5 seconds each. Expect 10% of the digits without a certificate, and 92% without the three parts,
which is chance. A warmup of 45 of the 60 epochs reaches 7% and 19%.
Normalisation does most of it, and the penalty shows little on a net of three hidden layers. Try
more layers, a larger eps, or smoother warmups; eps is a schedule of schedules.py.
"""
import math
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import configurator
import schedules
from configurator import UserError, require
from corpora.tokenizer import import_optional


@dataclass
class Config:
    warmup: int = 5                     # epochs until eps is whole
    initialise: bool = True             # weights that keep boxes from growing
    normalise: bool = True              # batch norm before every ReLU
    regularise: bool = True             # the penalty, during the warmup
    eps: float = 0.05                   # half the side of a box; pixels are 0 to 1
    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 2e-3         # Adam's; it decays to a hundredth over the last quarter
    width: int = 100                    # of a hidden layer
    depth: int = 3                      # hidden layers
    penalty: float = 0.5                # lambda_0 of the paper
    tolerance: float = 0.5              # tau of the paper
    seed: int = 1


class Net(nn.Module):
    """Linear layers, each but the last with a ReLU. Boxes are (center, radius), (B, n) each."""

    def __init__(self, cfg):
        super().__init__()
        sizes = [64] + [cfg.width] * cfg.depth
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(sizes, sizes[1:]))
        self.head = nn.Linear(cfg.width, 10)
        self.norms = nn.ModuleList(nn.BatchNorm1d(n) if cfg.normalise else nn.Identity()
                                   for n in sizes[1:])
        for layer in self.layers:
            # a box keeps its mean radius where E|w| = 2/n, for a ReLU halves it (their section 4.1)
            n = layer.in_features
            std = math.sqrt(2 * math.pi) / n if cfg.initialise else math.sqrt(2 / n)
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x, eps, y):
        """x (B, 64), y (B) -> logits (B, 10); upper bounds of logit j minus logit y (B, 10); and
        the boxes before every ReLU, after that of the input."""
        low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        center, radius = (high + low) / 2, (high - low) / 2
        boxes = [(center, radius)]
        for layer, norm in zip(self.layers, self.norms):
            x, center = layer(x), layer(center)
            radius = F.linear(radius, layer.weight.abs())
            if isinstance(norm, nn.BatchNorm1d):
                # the statistics are those of the images themselves
                mean, var = norm.running_mean, norm.running_var
                if self.training:
                    mean, var = x.mean(0), x.var(0, unbiased=False)
                scale = norm.weight / torch.sqrt(var + norm.eps)
                x, center = norm(x), (center - mean) * scale + norm.bias
                radius = radius * scale.abs()
            boxes.append((center, radius))
            x, low, high = x.relu(), (center - radius).relu(), (center + radius).relu()
            center, radius = (high + low) / 2, (high - low) / 2
        # a difference of logits is one linear function, which has tighter bounds than two
        w = self.head.weight - self.head.weight[y][:, None]                     # (B, 10, n)
        b = self.head.bias - self.head.bias[y][:, None]                         # (B, 10)
        worst = (w @ center[..., None] + w.abs() @ radius[..., None])[..., 0] + b
        return self.head(x), worst, boxes


def warmup_penalty(boxes, tau):
    """L_tightness + L_relu (their section 4.3): both are 0 for boxes that are narrow enough and
    ReLUs of which active and inactive ones balance."""
    (_, first), *hidden = boxes
    total = 0
    for center, radius in hidden:
        total = total + (tau - first.mean() / radius.mean()).relu()
        active, inactive = center - radius > 0, center + radius < 0
        spread = (center - center.mean())**2
        for value in (center, spread):
            one, other = (value * active).sum().abs(), (value * inactive).sum().abs()
            if one > 0 and other > 0:
                total = total + (tau - torch.minimum(one / other, other / one)).relu()
    return total / tau / len(hidden)


def load_digits():
    """Images (1797, 64) from 0 to 1 and their digits, in an order of their own."""
    found = import_optional('sklearn.datasets').load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data).float()[order] / 16, torch.tensor(found.target)[order]


def run(cfg, images, labels):
    """Train on three quarters -> errors on the last one: as it is, and in the worst case."""
    torch.manual_seed(cfg.seed)
    net, n = Net(cfg), len(images) * 3 // 4
    per_epoch = n // cfg.batch_size
    steps, W = cfg.epochs * per_epoch, cfg.warmup * per_epoch
    eps = schedules.build('constant', steps=steps, peak=cfg.eps, warmup=W)
    lr = schedules.build('wsd', steps=steps, peak=cfg.learning_rate, warmup=0,
                         decay=0.25, decay_shape='linear', min_lr=cfg.learning_rate / 100)
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(n)
        rows = order[step % per_epoch * cfg.batch_size:][:cfg.batch_size]
        _, worst, boxes = net(images[rows], eps(step), labels[rows])
        loss = F.cross_entropy(worst, labels[rows])
        if cfg.regularise and step < W:
            share = cfg.penalty * (1 - eps(step) / cfg.eps)
            loss = loss + share * warmup_penalty(boxes, cfg.tolerance)
        optimizer.param_groups[0]['lr'] = lr(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        logits, worst, _ = net.eval()(images[n:], cfg.eps, labels[n:])
    wrong = logits.argmax(1) != labels[n:]
    is_certain = (worst > 0).sum(1) == 0            # the bound of logit y minus itself is 0
    return wrong.float().mean().item(), 1 - is_certain.float().mean().item()


def main(argv):
    if '--help' in argv:
        print(f'{__doc__}\n{configurator.help_text(Config)}')
        return
    cfg, _ = configurator.load(Config, argv)
    for knob in ('epochs', 'batch_size', 'width', 'depth', 'eps', 'learning_rate', 'tolerance'):
        require(getattr(cfg, knob) > 0, f'{knob} = {getattr(cfg, knob)}: expected more than 0.')
    images, labels = load_digits()
    require(cfg.batch_size <= len(images) // 2, f'batch_size = {cfg.batch_size}: there are only '
            f'{len(images) * 3 // 4:,} images to train on.')
    error, verified = run(cfg, images, labels)
    print(f'error {error:.3f}, verified error {verified:.3f}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.certified: {error}')
