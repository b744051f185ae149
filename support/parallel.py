"""Several processes, one model: DDP keeps it whole on each, FSDP2 a share of it, for large models.

Nobody needs this to understand a run. train.py calls the same functions for one process, for DDP
and for FSDP: over_processes, exchange_gradients, gathered, whole.
"""
import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from configurator import require
from support.processes import is_first, local_rank, local_world_size, say, world_size


def is_sharded(cfg):
    return cfg.parallel == 'fsdp' and world_size() > 1


def in_words(cfg):
    """The processes of a run, for its record."""
    nodes = world_size() // local_world_size()
    text = f'{world_size()}'
    if is_sharded(cfg):
        text += f', the model sharded over {local_world_size()}'
    elif cfg.parallel == 'fsdp':
        text += ', so nothing is sharded'
    return f'{text}, replicated on {nodes} nodes' if nodes > 1 else text


# ------------------------------------------------------------------------------
# DDP

class Replicated(DistributedDataParallel):
    """DDP, but its parts and the names of its parameters are those of the model inside."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('module'), name)

    def named_parameters(self, *args, **kwargs):
        return self.module.named_parameters(*args, **kwargs)


def over_processes(model, cfg, device):
    """What training calls: the model, or DDP's wrapper, which averages gradients over processes."""
    if is_sharded(cfg) or world_size() == 1:
        return model
    constants = [name for name, _ in model.named_buffers()]
    Replicated._set_params_and_buffers_to_ignore_for_model(model, constants)
    return Replicated(model, device_ids=[local_rank()] if device == 'cuda' else None)


def exchange_gradients(forward, is_last_micro_step):
    """A context in which gradients are averaged over the processes, or only added to their own.

    A sharded model averages in every micro-step, since whole gradients would not fit.
    """
    if isinstance(forward, Replicated) and not is_last_micro_step:
        return forward.no_sync()
    return contextlib.nullcontext()


# ------------------------------------------------------------------------------
# FSDP2: a parameter is a DTensor, of which each process holds a share

def shard(model, whole_model, device):
    """Turn a model without memory into this process's share of it, filled from whole_model.

    whole_model: the same with its weights, on the CPU of the first process; None on the others. A
    layer is gathered when it is needed; the embeddings and the last norm stay gathered during a
    step. On several nodes, the model is sharded inside each and replicated between them.
    """
    check_memory_to_save(model)
    nodes, per_node = world_size() // local_world_size(), local_world_size()
    mesh = init_device_mesh(device, (per_node,))
    if nodes > 1:
        mesh = init_device_mesh(device, (nodes, per_node), mesh_dim_names=('replicate', 'shard'))
    for module in (*model.gpt_neox.layers, model):
        fully_shard(module, mesh=mesh)
        if device == 'cpu':
            module.set_force_sum_reduction_for_comms(True)      # gloo has no mean
    model.to_empty(device=device)

    weights = dict(whole_model.named_parameters()) if whole_model else {}
    constants = dict(whole_model.named_buffers()) if whole_model else {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(share_of(weights.get(name), p))
        for name, constant in model.named_buffers():            # cos and sin
            if is_first():
                constant.copy_(constants[name])
            dist.broadcast(constant, 0)


def share_of(tensor, p):
    """A whole tensor in the form of a parameter: this process's share of it, or all of it.

    Of a sharded one, the first process has the tensor, and gives the others their shares.
    """
    if not isinstance(p, DTensor):
        return tensor.clone()
    here = torch.empty(p.shape, dtype=torch.float32, device=p.device_mesh.device_type)
    if is_first():
        here.copy_(tensor)
    return distribute_tensor(here, p.device_mesh, p.placements, src_data_rank=0)


def is_share(p):
    return isinstance(p, DTensor)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state):
    """A state dict with whole tensors, on the CPU of rank 0, in the place of shares of them.

    All processes must call it, since each gives its share of every tensor.
    """
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if is_first() else None
    return state


def check_memory_to_save(model):
    """A sharded run is saved from the CPU of rank 0: weights and two moments, 12 bytes each."""
    needed = 12 * model.num_params() / 1e9
    say(f'every checkpoint takes {needed:.1f} GB of CPU memory in the first process, and of disk')
    if is_first() and Path('/proc/meminfo').exists():
        meminfo = dict(line.split(':') for line in Path('/proc/meminfo').read_text().splitlines())
        free = int(meminfo['MemAvailable'].split()[0]) * 1024 / 1e9
        require(needed < free, f'a checkpoint of this model takes {needed:.1f} GB of CPU memory, '
                f'but {free:.1f} GB are free. Use a machine with more, or a smaller model.')
