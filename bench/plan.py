"""Does a run fit its GPUs, how long does it take, how large are its checkpoints? Needs no GPU.

    python bench/plan.py config/pretrain_pile_10b.py --world_size=8
    python bench/plan.py config/pretrain_pile_10b.py --world_size=32 --nodes=4 --mfu=0.45

Knobs of train.py work as there; Options has those of this script. The formulas follow the code of
model.py without torch.compile, which keeps about as much or less.
Letters: N tokens of a micro-batch, C hidden_size, V vocab_size, b bytes of a matrix product's
number: 2 in bf16, 4 in fp32. The residual stream and everything that is trained are in fp32.
"""
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import common  # noqa: F401 (puts the repository on the path)
import configurator
import train
from configurator import UserError, require
import data
from model import LOSS_ROWS, PYTHIA, GPTNeoX, GPTNeoXConfig
from support import checkpoints, checks, parallel, processes, record
from support.cpu_attention import QUERY_BLOCK
from support.huggingface import read_hf_config
from support.processes import GPU_PEAK_FLOPS


@dataclass
class Options(train.Config):
    world_size: int = 1         # processes, one for each GPU
    nodes: int = 1              # machines
    gpu: str = 'H100'           # a name in GPU_PEAK_FLOPS of support/processes.py
    gpu_memory: float = 80.0    # GB of it, 10^9 bytes; a tenth is left for CUDA, NCCL and gaps
    mfu: float = 0.4            # the share of its peak that training reaches


@dataclass
class Plan:
    """One run on one machine. Every method says what a GPU holds of something, in bytes."""
    cfg: Options
    model: GPTNeoX          # on meta: shapes without memory
    path: str               # 'triton', 'plain', or 'cpu': whose functions the layers call
    b: int                  # bytes of a number in matrix products

    def __post_init__(self):
        shape = self.model.config
        self.C, self.V, self.L = shape.hidden_size, shape.vocab_size, shape.num_hidden_layers
        self.parameters = self.model.num_params()
        self.layer = sum(p.numel() for p in self.model.gpt_neox.layers[0].parameters())
        self.root = self.parameters - self.L * self.layer       # embeddings, head, last norm
        self.sharded = parallel.is_sharded(self.cfg)
        self.shards = processes.local_world_size() if self.sharded else 1
        rows = self.cfg.batch_size // processes.world_size()
        self.rows, self.accumulation = data.micro_batches(rows, self.cfg.micro_batch_size)
        self.T = self.cfg.block_size
        self.N = self.rows * self.T

    def weights(self):
        """float32, this GPU's share: 1 / shards of every tensor."""
        return 4 * self.parameters / self.shards

    def moments(self):
        """Adam's two, of the same shapes as the weights."""
        return 8 * self.parameters / self.shards

    def gradients(self):
        """float32, sharded too: fsdp exchanges them in every micro-step."""
        return 4 * self.parameters / self.shards

    def buckets(self):
        """DDP exchanges gradients in buckets, which are copies of them all."""
        return 4 * self.parameters if processes.world_size() > 1 and not self.sharded else 0

    def gathered(self, layers):
        """fsdp: whole tensors of the root, which stays gathered, and of so many layers."""
        return 4 * (self.root + layers * self.layer) if self.sharded else 0

    def copies(self):
        """Weights of linear layers in bf16, which autograd keeps for the backward pass.

        fsdp cannot free them. Recomputed layers make them again, and only a layer's exist at a
        time; but under ddp the cache of autocast holds them to the end of the forward pass.
        """
        matrices = self.layer_matrices() * self.L
        if self.cfg.checkpoint_activations and self.sharded:
            matrices = self.layer_matrices()
        head = 0 if self.path == 'triton' else self.V * self.C      # HeadLoss counts its own
        return 2 * (matrices + head) if self.b == 2 else 0

    def layer_matrices(self):
        return sum(p.numel() for p in self.model.gpt_neox.layers[0].parameters() if p.dim() == 2)

    def kept_by_a_layer(self):
        """What autograd keeps of a layer: inputs of norms, products, attention and GELU."""
        shape = self.model.config
        norms = 2 if self.path != 'triton' or not shape.use_parallel_residual else 1
        residual = 1 if shape.use_parallel_residual else 2          # both norms read the same x
        numbers = 4 * residual + 2 * self.b                         # x, and both norms' outputs
        numbers += 2 * self.b * shape.intermediate_size / self.C    # before and after GELU
        numbers += 4 * self.b                                       # qkv; attention's output
        if self.path == 'plain':
            numbers += 3 * self.b                                   # q, k rotated; output again
        per_head = 4 * self.T                                       # log of the softmax's sum
        if self.path == 'cpu':
            per_head = self.b * self.T * (self.T + QUERY_BLOCK) / 2     # CpuAttention: P itself
        heads = self.rows * shape.num_attention_heads
        return self.N * self.C * numbers + 8 * self.N * norms + heads * per_head

    def input_of_a_layer(self):
        """What is kept of a layer that is recomputed. Triton's also takes the branches before."""
        branches = 2 if self.model.config.use_parallel_residual else 1
        return self.N * self.C * (4 + (branches * self.b if self.path == 'triton' else 0))

    def activations(self):
        """All layers, the last norm's input and output, and token ids."""
        one = self.input_of_a_layer() if self.cfg.checkpoint_activations else self.kept_by_a_layer()
        return self.L * one + self.N * self.C * (4 + self.b) + 24 * self.N

    def loss(self):
        """Triton: logits of LOSS_ROWS rows, the head in bf16, its gradient, a product to add to it.

        Plain: in the backward pass, probabilities and two gradients of all logits in float32.
        """
        if self.path != 'triton':
            return 12 * self.N * self.V
        head = self.C * self.V
        return min(self.N, LOSS_ROWS) * self.V * self.b + head * (4 + self.b + self.b % 4)

    def work(self):
        """The backward pass of a layer: gradients around GELU and of the residual stream.

        A layer that is recomputed is first made again. fsdp has two gradients of a whole layer: a
        result, and the copy that is exchanged.
        """
        numbers = 2 * self.b * self.model.config.intermediate_size / self.C + 8
        again = self.kept_by_a_layer() if self.cfg.checkpoint_activations else 0
        return self.N * self.C * numbers + again + (8 * self.layer if self.sharded else 0)

    def moments_of_a_step(self):
        """{when: {part: bytes}} of the three moments of a step, one of which is the peak."""
        always = {'weights': self.weights(), 'Adam moments': self.moments(),
                  'buckets of ddp': self.buckets()}
        # gradients of the micro-steps before this one
        before = self.gradients() if self.accumulation > 1 else 0
        head = 4 * self.V * self.C
        kept = {'activations': self.activations(), 'weights in bf16': self.copies()}
        return {
            'the loss': always | {
                'gradients': before, 'gathered by fsdp': self.gathered(0)} | kept | {
                'logits and loss': self.loss()},
            'the last layer, backwards': always | {
                'gradients': before + head, 'gathered by fsdp': self.gathered(2)} | kept | {
                'work in a layer': self.work()},
            'the end of a step': always | {
                'gradients': self.gradients(), 'gathered by fsdp': 2 * self.gathered(0)}}

    def peak(self):
        """(when, {part: bytes}) of the largest moment."""
        found = self.moments_of_a_step()
        when = max(found, key=lambda name: sum(found[name].values()))
        return when, found[when]

    def gpu_bytes(self):
        return sum(self.peak()[1].values())

    def checkpoint_bytes(self):
        """Weights and moments, on disk and on the way there in the CPU memory of rank 0."""
        return 12 * self.parameters

    def tokens_per_step(self):
        return self.cfg.batch_size * self.T

    def flops(self):
        """Of the whole run. Layers that are computed again are not counted."""
        tokens = self.tokens_per_step() * self.cfg.max_steps
        return self.model.flops_per_token(self.T) * tokens


def make(words):
    """The Plan of `train.py WORDS...`. Sets the variables with which torchrun tells the number."""
    cfg, origin = configurator.load(Options, words)
    require(cfg.world_size >= 1 and cfg.nodes >= 1 and cfg.world_size % cfg.nodes == 0,
            f'world_size = {cfg.world_size} does not divide among {cfg.nodes} nodes.')
    require(cfg.gpu in GPU_PEAK_FLOPS, f'gpu = {cfg.gpu!r}: expected one of '
            f'{", ".join(GPU_PEAK_FLOPS)}.')
    os.environ['WORLD_SIZE'] = str(cfg.world_size)
    os.environ['LOCAL_WORLD_SIZE'] = str(cfg.world_size // cfg.nodes)
    device = 'cuda' if cfg.device == 'auto' else cfg.device
    checks.check_knobs(replace(cfg, device='cpu'), origin)      # also where there is no GPU

    path = 'plain'
    if cfg.kernels != 'torch' and device == 'cuda':
        path = 'triton'
    elif cfg.kernels == 'auto' and device == 'cpu' and cfg.block_size <= 1024:
        path = 'cpu'
    dtype = 'bf16' if (cfg.dtype, device) == ('auto', 'cuda') else cfg.dtype
    with torch.device('meta'):
        model = GPTNeoX(shape_of(cfg, origin))
    cfg = replace(cfg, block_size=model.config.max_position_embeddings)
    return Plan(cfg, model, path, dtype_of(dtype, device).itemsize)


def dtype_of(name, device):
    """The type of matrix products; of a GPU that is not here, what its name says."""
    return processes.pick('cpu', name)[1] if device == 'cpu' else processes.DTYPES[name]


def shape_of(cfg, origin):
    """The shape of the model that a run trains: what its parents had, else what its knobs say."""
    start, parent = cfg.init_from or cfg.branch_from, None
    if start.endswith('.py'):
        parent = shape_of(*configurator.load(train.Config, [start]))
    elif Path(start, 'config.json').is_file() and record.read_config(start) is None:
        parent = read_hf_config(Path(start, 'config.json'))
    elif start and (Path(start).is_file() or checkpoints.find(start)):
        state = checkpoints.read(checkpoints.newest(start), verify=False)
        parent = GPTNeoXConfig(**state['model']['shape'])
    elif start:
        # released weights that are not here yet: pythia-410m, say
        sizes = [size for size in PYTHIA if f'pythia-{size}' in Path(start).name.lower()]
        require(sizes, f'{start} is not here. Give --init_from= --pythia=SIZE to plan without it.')
        parent = GPTNeoXConfig.pythia(sizes[-1])
    if parent and origin['block_size'] == 'default':
        cfg = replace(cfg, block_size=parent.max_position_embeddings)
    # the ids of GPT-NeoX-20B's tokenizer, where neither a knob nor a parent says more
    model = {'shape': asdict(parent)} if parent else {}
    way = 'init_from' if cfg.init_from else 'branch_from' if cfg.branch_from else 'scratch'
    begin = train.Start(way, start, {}, model, {}, {}, {}, {})
    return train.model_shape(cfg, origin, begin, cfg.vocab_size or 50304)


def report(plan):
    """The page that is printed."""
    cfg, gb, tokens = plan.cfg, 1e9, plan.tokens_per_step()
    when, parts = plan.peak()
    other = replace(plan, cfg=replace(cfg, checkpoint_activations=not cfg.checkpoint_activations))
    names = ['kept', 'recomputed'][::-1 if cfg.checkpoint_activations else 1]
    most, peak = 0.9 * cfg.gpu_memory, plan.gpu_bytes() / gb
    verdict = 'It fits' if peak <= most else 'IT DOES NOT FIT'
    speed = cfg.world_size * GPU_PEAK_FLOPS[cfg.gpu] * cfg.mfu
    lines = [f'{plan.parameters:,} parameters: {plan.L} layers x {plan.C}, vocabulary {plan.V:,}',
             f'processes: {parallel.in_words(cfg)}',
             f'micro-batches of {plan.rows} x {plan.T:,} tokens, {plan.accumulation} a step; '
             f'{plan.path}, {"bf16" if plan.b == 2 else "fp32"}', '',
             f'{"GB per GPU; activations are":28}{names[0]:>11}{names[1]:>13}']
    for name, value in parts.items():
        rest = other.moments_of_a_step()[when].get(name, 0)
        if value + rest > 0:
            lines.append(f'  {name:26}{value / gb:>11.1f}{rest / gb:>13.1f}')
    lines += [f'  {"peak":26}{peak:>11.1f}{other.gpu_bytes() / gb:>13.1f}',
              f'The peak is at {when}.',
              f'{verdict} into {cfg.gpu_memory:.0f} GB, of which {most:.0f} may be planned with.',
              '',
              f'tokens: {tokens:,} a step, {tokens * cfg.max_steps / 1e9:,.1f} billion in all',
              f'FLOPs: {plan.flops():.1e}, {plan.flops() / speed / 3600:,.1f} hours at '
              f'{cfg.mfu:.0%} of {cfg.world_size} x {cfg.gpu}',
              f'a checkpoint: {plan.checkpoint_bytes() / gb:.1f} GB of disk']
    if plan.sharded:
        lines.append(f'to save one: {plan.checkpoint_bytes() / gb:.1f} GB of CPU memory in rank 0')
    return '\n'.join(lines)


def main(argv):
    if not argv or '--help' in argv:
        print(__doc__)
        return 0
    try:
        print(report(make(argv)))
    except UserError as error:
        print(f'plan.py: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
