"""Continual pre-training against supervised fine-tuning over a stream: what do features keep?

Cossu et al. 2022, "Continual Pre-Training Mitigates Forgetting in Language and Vision",
arXiv:2205.09357.

A model meets one corpus after the other. It either continues to be pre-trained on each, or is
trained on a supervised task made of the same documents. What it has forgotten is measured by the
loss on old data and by linear probes: classifiers of old text that see frozen features only.

    python -m projects.probe config/pretrain_docs.py --init_from=out/pretrain_docs \\
        --train_data="{'names_sympy': 1}" --switches="[{'step': 60, 'train_data': \\
        {'names_networkx': 1}}, {'step': 120, 'train_data': {'names_matplotlib': 1}}]" \\
        --max_steps=180 --schedule=repeated_cosine --eval_every=60 --out_dir=out/probe
        [--supervised=true]

The documents are beginnings of docstrings, each followed by the name of its function. With
supervised, the loss counts the names alone. Features are the mean over a window of what the last
LayerNorm returns. Linear CKA (Kornblith et al. 2019, arXiv:1905.00414) compares them with those of
the start: 1 means the same up to rotation and scale.

results/projects/probe/run.sh takes about 4 minutes on 2 cores after the old model. Expect (one
seed, 60 steps for each corpus): the loss on docs rises from 1.49 to 1.75 with pre-training and to
3.32 with fine-tuning, and CKA of old text falls to 0.92 and 0.86. But the probe of old text forgets
nothing: 53% of its windows are right at the start, 56% and 55% at the end (chance is 33%, and 2%
the standard error). Either the features that it needs survive both, or it asks too little of them.

Next: probes of each layer; a head that is trained by classification, as in the paper; replay; a
few steps on docs at the end, which show how fast the loss comes back.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import data
import train
from configurator import require
from corpora import embedded
from model import cross_entropy
from projects.finetune_checkpoints import is_answer, names_of
from support import processes

OLD = [f'docs_{package}' for package in ('python', 'numpy', 'torch')]       # the parts of docs
STREAM = [f'names_{package}' for package in ('sympy', 'networkx', 'matplotlib')]
for name in OLD:
    embedded.EMBEDDED[name] = embedded.docs_of, (name.removeprefix('docs_'),)
for name in STREAM:
    embedded.EMBEDDED[name] = names_of, (name.removeprefix('names_'),)


@dataclass
class Knobs(train.Config):
    # --- probes ------------------------------------------------------------------------------
    supervised: bool = False            # the loss counts the last line of each document alone
    probes: dict[str, list] = field(default_factory=lambda: {'old': OLD, 'new': STREAM})
                                        # classifiers, each with the sources that it tells apart
    probe_windows: int = 250            # of each source, to fit a probe; as many to test it
    probe_tokens: int = 64              # of such a window


def linear_probe(x, labels, test_x, test_labels, ridge=0.01):
    """The test accuracy of a linear classifier, fitted to features x (N, C) by ridge regression."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, test_x = [F.pad((part - mean) / scale, (0, 1), value=1) for part in (x, test_x)]
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], device=x.device)
    weights = torch.linalg.solve(gram, x.T @ F.one_hot(labels).to(x) / len(x))  # (C + 1, classes)
    return ((test_x @ weights).argmax(1) == test_labels).double().mean().item()


def linear_cka(a, b):
    """The similarity of two sets of features (N, C) of the same N windows: between 0 and 1."""
    a, b = a - a.mean(0), b - b.mean(0)
    return ((a.T @ b).norm()**2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()


class Probe(train.Method):
    Config, Parent = Knobs, train.Method

    def start(self, model, saved):
        self.net, self.first = model, saved or {}     # {probe: features at the start}
        self.windows = {}
        for probe, names in self.cfg.probes.items():
            require(len(names) > 1, f'probes[{probe!r}] = {names}: expected two sources or more.')
            self.windows[probe] = [self.read(names, split) for split in ('train', 'val')]

    def read(self, names, split):
        """Windows of a split of sources: (ids (N, T), the number of the source of each)."""
        ids, labels = [], []
        for label, name in enumerate(names):
            if processes.is_first() and name in embedded.EMBEDDED:
                embedded.build(name, self.cfg.data_dir)
            processes.from_first()                     # the others wait for the files
            shards = data.find_shards(name, split, self.cfg.data_dir, self.cfg.paths)
            length = min(self.cfg.probe_tokens, self.net.config.max_position_embeddings)
            source = data.Source(name, shards, length)
            windows = data.val_windows(source, self.cfg.probe_windows)
            ids.append(torch.from_numpy(source.read(windows))[:, 1:])           # (windows, T)
            labels += [label] * len(windows)
        device = self.net.cos.device
        return torch.cat(ids).to(device), torch.tensor(labels, device=device)

    @torch.no_grad()
    def features(self, ids):
        """(N, C) of windows (N, T)."""
        found = []
        norm = self.net.gpt_neox.final_layer_norm
        hook = norm.register_forward_hook(lambda *call: found.append(call[-1].double().mean(1)))
        for part in ids.split(64):
            self.net(part)
        hook.remove()
        return torch.cat(found)

    def objective(self, model, x, y, sources):
        if not self.cfg.supervised:
            return super().objective(model, x, y, sources)
        logits, _ = model(x)                                                    # (B, T, V)
        wanted = is_answer(y)
        losses = cross_entropy(logits, y, 'none') * wanted                      # (B, T)
        return losses.sum() / wanted.sum().clamp(min=1), {}

    def after_evaluation(self, step, val):
        values = {}
        for probe, (fit, test) in self.windows.items():
            x, test_x = self.features(fit[0]), self.features(test[0])
            self.first.setdefault(probe, test_x)
            values[f'{probe} probe'] = linear_probe(x, fit[1], test_x, test[1])
            values[f'{probe} CKA'] = linear_cka(self.first[probe], test_x)
        return values, None

    def state_dict(self):
        return self.first


if __name__ == '__main__':
    train.launch(Probe)
