"""LoRA: train a few numbers beside frozen weights, which learns less and forgets less.

Hu et al. 2021, arXiv:2106.09685, equation 3; Biderman et al. 2024, arXiv:2405.09673.

The old weights W of the linear layers stay as they are, and W + lora_scale * B A takes their place:
A (r, in) is random, B (out, r) is zero at the start, and these two are trained. As the change has
rank r at most, the model can neither learn nor forget as much as with all of its weights.
Checkpoints contain the sum under the names of GPTNeoX: eval.py and later stages need no adapters.

    python -m projects.lora config/rewarm_docs_code.py --lora_rank=16 --learning_rate=1e-2 \
        --min_lr=1e-3 --replay=0 --out_dir=out/lora

Without replay, after 200 steps (1 to 2 minutes on 2 cores; results/projects/lora, one seed):

    all weights             2.072 on docs    1.263 on code
    rank 4                  1.809            1.369
    rank 16                 1.889            1.296
    rank 64                 2.212            1.344
    rank 64, rate 3e-3      1.868            1.266
    5% replay               1.787            1.266    all weights

A low rank learns less and forgets less. A high rank at a suitable rate learns as much as all
weights do and forgets less; at the rate of the low ranks it does worse in both. 5% replay is
better than any of them. (At a rate of 3e-2, not in the table, rank 16 broke down in 100 steps.)

Try next: a rate for every rank; LoRA with replay; other lora_modules; adapters on the embeddings.
"""
import fnmatch
import math
from dataclasses import dataclass, field

import torch
from torch.nn.utils import parametrize

import train
from configurator import require
from support import parallel, processes


@dataclass
class Knobs(train.Config):
    # --- LoRA --------------------------------------------------------------------------------
    lora_rank: int = 16                 # r, of the change of every matrix
    lora_scale: float = 2.0             # factor of B A: alpha / r. Biderman et al. advise 2
    lora_modules: list[str] = field(default_factory=lambda: ['gpt_neox.layers.*'])
                                        # linear layers that get adapters, by name


class Adapter(torch.nn.Module):
    """W -> W + scale * B A. torch.nn.utils.parametrize calls it whenever W is read."""

    def __init__(self, weight, rank, scale):
        super().__init__()
        rows, columns = weight.shape
        self.scale = scale
        A = torch.empty(rank, columns)                  # on the CPU: the same on every device
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.A = torch.nn.Parameter(A.to(weight.device))
        self.B = torch.nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight):
        # in float32, as the sum is saved
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.B @ self.A)


class LoRA(train.Method):
    Config, Parent = Knobs, train.Method

    def start(self, model, saved):
        cfg = self.cfg
        require(not parallel.is_sharded(cfg), "lora: adapters are not sharded. Use --parallel=ddp.")
        linears = {name: module for name, module in model.named_modules()
                   if isinstance(module, torch.nn.Linear)
                   and any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.lora_modules)}
        require(linears, f'lora_modules = {cfg.lora_modules} matches no linear layer. They have '
                'names such as gpt_neox.layers.0.mlp.dense_h_to_4h.')
        most = min(min(module.weight.shape) for module in linears.values())
        require(1 <= cfg.lora_rank <= most, f'lora_rank = {cfg.lora_rank}: expected 1 to '
                f'{most}, the rank that these matrices have.')

        # freeze all there is, then add what is trained
        self.names = list(model.state_dict())
        model.requires_grad_(False)
        for module in linears.values():
            adapter = Adapter(module.weight, cfg.lora_rank, cfg.lora_scale)
            parametrize.register_parametrization(module, 'weight', adapter)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        processes.say(f'lora: {trained:,} of {model.num_params():,} parameters are trained')

    def parameter_groups(self, model):
        # decay would pull the sum back to the old weights
        return [{**group, 'weight_decay': 0.0} for group in super().parameter_groups(model)]

    def weights(self, model):
        """The sums W + B A. The checkpoint keeps W, A and B as well, for a run that is resumed."""
        merged = {}
        for name in self.names:
            module, _, attribute = name.rpartition('.')
            merged[name] = getattr(model.get_submodule(module), attribute).detach()
        return merged


if __name__ == '__main__':
    train.launch(LoRA)
