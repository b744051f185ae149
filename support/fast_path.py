"""Which code computes the model: the plain path of model.py, or a faster one that is checked.

Nobody needs this to understand a run.
"""
from dataclasses import replace

import torch

from configurator import require
from model import FlashAttention, GPTNeoX, Layer, causal_attention, triton
from support.cpu_attention import cpu_attention


def choose(model, wanted='auto', device='cpu', dtype=torch.float32):
    """Let the model compute by the fastest path -> a sentence that says which, and why.

    wanted: 'torch' is the plain path everywhere, 'triton' the kernels, 'auto' the fastest for the
    device and the type of the products. Weights and their names stay as they are.
    """
    attend, fast = causal_attention, False
    if wanted == 'torch':
        sentence = 'plain PyTorch, as kernels = torch asks'
    elif wanted == 'auto' and device == 'cpu':
        attend, sentence = cpu_attention, 'PyTorch, with a faster attention for CPUs'
    elif wanted == 'auto' and device != 'cuda':
        sentence = 'plain PyTorch'
    elif why_not_triton(model, device, dtype):
        sentence = f'plain PyTorch, not Triton: {why_not_triton(model, device, dtype)}'
    else:
        attend, fast, sentence = FlashAttention.apply, True, 'Triton'

    # no matrix unit multiplies float32 in full precision: there PyTorch's attention is faster
    if fast and wanted == 'auto' and dtype == torch.float32:
        attend, sentence = causal_attention, 'Triton; attention by PyTorch, faster in float32'

    model.fast = fast
    for module in model.modules():
        if hasattr(module, 'attend'):
            module.attend = attend
    return sentence


def why_not_triton(model, device, dtype):
    """Why the kernels cannot run, or '' when they can."""
    if triton is None:
        return 'Triton is not installed'
    interpreted = triton.knobs.runtime.interpret        # TRITON_INTERPRET=1: tests, on a CPU
    if device != 'cuda' and not interpreted:
        return f'they need an NVIDIA GPU, and this is {device}'
    if device == 'cuda' and torch.version.hip:
        return 'they are written for NVIDIA GPUs, and this one is by AMD'
    if device == 'cuda' and torch.cuda.get_device_capability() < (8, 0):
        return 'this GPU is older than Ampere (compute capability 8.0)'
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'they do not compute in {dtype}'
    if type(model) is not GPTNeoX or any(type(layer) is not Layer for layer in
                                         model.gpt_neox.layers):
        return 'the model or its layers are a class of your own'
    if model.config.hidden_size > 8192 or model.config.head_size > 256:
        return 'the model is wider than they support (8192, heads of 256)'
    return ''


def check(build, shape, wanted, device, dtype):
    """Raise unless the fast path gives the loss and gradients of the plain path.

    build(shape) makes a model; one of two layers stands for the whole. Its sequences are as long as
    the block: an edit may act on late positions alone.
    """
    if wanted == 'torch':
        return
    torch.manual_seed(0)
    model = build(replace(shape, num_hidden_layers=min(2, shape.num_hidden_layers))).to(device)
    idx, targets = torch.randint(shape.vocab_size, (2, 2, shape.max_position_embeddings)).to(device)

    def take(kernels):
        choose(model, kernels, device, dtype)

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')       # no TF32, which rounds to 10 bits
    try:
        # In float32, rounding changes the loss of ordinary models by 3e-7 of it, and gradients by
        # 1e-7 to 3e-4. A branch that is 5% too large changes gradients by 8e-3 or more, and 1e-4 of
        # z-loss changes the loss by 1e-4 of it. The bounds lie between.
        loss, gradient = path_difference(model, idx, targets, take, wanted, torch.float32)
        require(not (loss > 1e-5 or gradient > 2e-3), f'{NOT_FOLLOWED} The loss differs by '
                f'{loss:.0e} of it, gradients differ by {gradient:.0e}.')

        # Triton compiles other code for another type. There the plain path tells what rounding is.
        if model.fast and dtype != torch.float32:
            _, rounding = path_difference(model, idx, targets, take, 'torch', dtype)
            _, gradient = path_difference(model, idx, targets, take, wanted, dtype)
            require(not gradient > 3 * rounding + 1e-2, f'{NOT_FOLLOWED} Gradients in {dtype} '
                    f'differ by {gradient:.0e}, where rounding makes {rounding:.0e}.')
    finally:
        torch.set_float32_matmul_precision(precision)


NOT_FOLLOWED = ('the fast path does not compute what the model in model.py says: it does not '
                'follow an edit. Train with --kernels=torch, which runs exactly what is written, '
                'or change the fast path too (triton_layer and triton_loss in model.py, '
                'support/cpu_attention.py).')


def path_difference(model, idx, targets, take, kernels, dtype):
    """How far a path in dtype is from the plain path in float32: (loss, gradient), both relative.

    take(kernels) sets the path. UserError when the plain path works and the other one fails.
    """
    def backward(dtype, sign):
        torch.manual_seed(0)                            # the same dropout, if an edit adds some
        with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(idx, targets)[1]
        (sign * loss).backward()
        return loss.item()

    def gradient_norm():
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return torch.stack(norms).norm().item()

    model.zero_grad(set_to_none=True)
    take('torch')
    exact_loss, exact_norm = backward(torch.float32, sign=-1), gradient_norm()
    # gradients add up, so that what stays after the second pass is the difference
    take(kernels)
    try:
        loss = backward(dtype, sign=1)
    except Exception as error:
        require(kernels == 'torch', f'{NOT_FOLLOWED} It fails: {error}')
        raise                                           # an error in the plain path is its own
    return abs(loss - exact_loss) / exact_loss, gradient_norm() / exact_norm


@torch.no_grad()
def copy_of(model, copy, weights):
    """The copy of a model with other weights, on its device and by its path."""
    copy.load_state_dict(weights)
    copy.to(next(model.parameters()).device)
    copy.fast = model.fast
    attends = [module.attend for module in model.modules() if hasattr(module, 'attend')]
    for module in copy.modules():
        if hasattr(module, 'attend'):
            module.attend = attends[0]
    return copy
