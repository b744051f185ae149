"""Weight files: Hugging Face directories of a GPTNeoXForCausalLM.

Nobody needs this to understand a run.
"""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F

from configurator import UserError, require
from model import GELU_KINDS, GPTNeoX, GPTNeoXConfig, rotary_tables
from support.files import PARTIAL

# Fields of GPTNeoXConfig that config.json has under the same name.
SAME_FIELDS = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
               'intermediate_size', 'max_position_embeddings', 'layer_norm_eps', 'hidden_act',
               'use_parallel_residual')
# What old files contain beside parameters: the causal mask, its fill value, rotary frequencies.
LEGACY_BUFFERS = ('.attention.bias', '.attention.masked_bias', '.attention.rotary_emb.inv_freq')


def load_hf(path):
    """Read a Hugging Face directory -> GPTNeoX with float32 parameters, on the CPU.

    Always float32: an update of 1e-4 of a weight would be rounded away in bfloat16 or float16. No
    code in the directory runs. UserError for what is missing, damaged or of another architecture.
    """
    path = Path(path)
    config = read_hf_config(path / 'config.json')
    with torch.device('meta'):                          # shapes alone: no memory, no random numbers
        model = GPTNeoX(config)
    tensors = {name: tensor.float() for name, tensor in read_hf_tensors(path)}
    load_weights(model, tensors, path)
    model.cos, model.sin = rotary_tables(config)
    return model


def read(path):
    """The part of a checkpoint that a directory has: the model, without moments and history."""
    return {'shape': asdict(read_hf_config(Path(path, 'config.json'))), 'built_by': '',
            'weights': dict(read_hf_tensors(Path(path)))}


def load_weights(model, tensors, where):
    """Put tensors {name: tensor} into a model. UserError where names or shapes differ."""
    require('embed_out.weight' in tensors, f'{where}: the output matrix embed_out.weight is '
            'missing. Save the whole GPTNeoXForCausalLM, not the GPTNeoXModel inside it.')
    try:
        model.load_state_dict(tensors, assign=any(p.is_meta for p in model.parameters()))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f'{where}: the weights do not fit the model. {error}')
    require(all(p.is_meta or p.isfinite().all() for p in model.parameters()),
            f'{where}: the weights contain NaN or infinity.')


def read_json(file):
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{file}: cannot be read as JSON ({error}).')
    require(isinstance(content, dict), f'{file}: found {type(content).__name__}, not an object.')
    return content


def read_hf_config(file):
    """config.json -> GPTNeoXConfig. Reads the rotary fields of transformers 4 and 5."""
    raw = read_json(file)
    missing = [name for name in SAME_FIELDS[:6] if name not in raw]
    require(not missing, f'{file}: {", ".join(missing)} is missing.')
    rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
    require(isinstance(rope, dict), f'{file}: the rotary parameters are {rope!r}.')
    supported = {'model_type': (raw.get('model_type'), 'gpt_neox'),
                 'rope_type': (rope.get('rope_type', rope.get('type', 'default')), 'default'),
                 'tie_word_embeddings': (raw.get('tie_word_embeddings', False), False),
                 'attention_bias': (raw.get('attention_bias', True), True)}
    for name, (value, expected) in supported.items():
        require(value == expected, f'{file}: {name} is {value!r}. Only {expected!r} is supported.')
    for name in ('hidden_dropout', 'attention_dropout'):
        if raw.get(name):
            print(f'{file}: {name} = {raw[name]} is ignored. This model has no dropout.')

    fields = {name: raw[name] for name in SAME_FIELDS if name in raw}
    fields['rotary_pct'] = rope.get('partial_rotary_factor', raw.get('rotary_pct', 0.25))
    fields['rotary_emb_base'] = rope.get('rope_theta', raw.get('rotary_emb_base', 10000))
    try:
        return GPTNeoXConfig(**fields)
    except (UserError, TypeError) as error:
        raise UserError(f'{file}: {error}')


def read_hf_tensors(path):
    """Yield (name, tensor) of a model directory, whole or in shards, .safetensors or .bin."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        index = path / f'{name}.index.json'
        if (path / name).exists():
            files = [name]
        elif index.exists():
            weight_map = read_json(index).get('weight_map')
            require(isinstance(weight_map, dict), f'{index}: there is no weight_map.')
            files = sorted(set(map(str, weight_map.values())))
        else:
            continue
        for file in files:
            require(file == os.path.basename(file), f'{index}: {file!r} is not in this directory.')
            require((path / file).exists(), f'{index}: {file} is missing. Download it too.')
            yield from read_tensor_file(path / file)
        return
    raise UserError(f'{path}: there is no model.safetensors or pytorch_model.bin.')


def read_tensor_file(file):
    """Yield (name, tensor) of one file. Pickles are read with weights_only, so no code runs."""
    try:
        if file.suffix == '.safetensors':
            tensors = safetensors.torch.load_file(file)
        else:
            tensors = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:                          # three libraries have many kinds of them
        # without torch's own text, which explains how to load what it refuses
        reason = error if isinstance(error, OSError) else type(error).__name__
        raise UserError(f'{file}: damaged, truncated, or not only tensors ({reason}). '
                        'Download it again.')
    require(isinstance(tensors, dict), f'{file}: found {type(tensors).__name__}, not tensors.')
    for name, tensor in tensors.items():
        name = 'embed_out.weight' if name == 'lm_head.weight' else str(name)    # transformers 5
        if name.endswith(LEGACY_BUFFERS):
            continue
        is_plain = torch.is_tensor(tensor) and tensor.layout == torch.strided and tensor.is_cpu
        require(is_plain and tensor.is_floating_point(), f'{file}: {name} is not a tensor of '
                'floating-point numbers. Quantized models cannot be trained.')
        yield name, tensor


# ------------------------------------------------------------------------------
# Writing

def save_hf(model, path, eot=0, files=None, dtype=torch.float32):
    """Write config.json and model.safetensors into a new or empty directory (transformers 4 and 5).

    eot: id of end-of-text. files: {name: bytes} of a tokenizer. All or nothing: a directory beside
    it is filled, then renamed. UserError for a model that transformers would not compute.
    """
    path = Path(path)
    require(not path.exists() or (path.is_dir() and not any(path.iterdir())),
            f'{path} already exists and is not empty. Choose another directory.')
    check_is_gpt_neox(model)
    config = {name: getattr(model.config, name) for name in SAME_FIELDS}
    config |= {'architectures': ['GPTNeoXForCausalLM'], 'model_type': 'gpt_neox',
               # the names of transformers 4, which transformers 5 reads too
               'rotary_pct': model.config.rotary_pct,
               'rotary_emb_base': model.config.rotary_emb_base,
               'tie_word_embeddings': False, 'bos_token_id': eot, 'eos_token_id': eot,
               'torch_dtype': str(dtype).removeprefix('torch.')}
    tensors = {name: t.detach().cpu().to(dtype).contiguous()
               for name, t in model.state_dict().items()}
    require(all(t.isfinite().all() for t in tensors.values()), f'some weights are too large for '
            f'{dtype}. Use bf16 or fp32.')

    partial = path.with_name(f'{path.name}{PARTIAL}')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        weights = safetensors.torch.save(tensors, {'format': 'pt'})
        (partial / 'model.safetensors').write_bytes(weights)
        (partial / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def check_is_gpt_neox(model):
    """UserError unless the model computes what GPTNeoXForCausalLM computes from its weights."""
    weights = {name: t.detach().float() for name, t in model.state_dict().items()}
    length = min(128, model.config.max_position_embeddings)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=draw)
    known = set()
    try:
        expected = reference_logits(weights, model.config, ids, known)
    except KeyError as name:
        raise UserError('an export would not compute what this model does: it has no '
                        f'{name}, which GPTNeoXForCausalLM has. Its architecture was changed.')
    extra = sorted(set(weights) - known)
    require(not extra, f'an export would not compute what this model does: GPTNeoXForCausalLM has '
            f'no {", ".join(extra[:3])}. Its architecture was changed.')
    p = next(model.parameters())
    logits = model(ids.to(p.device))[0].float().cpu()
    bound = 1e-3 if p.dtype == torch.float32 else 0.03
    off = ((logits - expected).norm() / expected.norm()).item()
    require(off < bound, f'an export would not compute what this model does: the logits of '
            f'GPTNeoXForCausalLM differ by {off:.1%} of their size. Its architecture was changed.')


def reference_logits(weights, config, ids, known):
    """The logits of a GPT-NeoX, written once more from its weights; their names go into `known`."""
    def get(name):
        known.add(name)
        return weights[name]

    def linear(name, x):
        return F.linear(x, get(f'{name}.weight'), get(f'{name}.bias'))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], get(f'{name}.weight'), get(f'{name}.bias'),
                            config.layer_norm_eps)

    def rotated(x):                                                             # (B, T, H, D)
        R, T = config.rotary_dims, x.shape[1]
        pairs = torch.complex(x[..., :R // 2], x[..., R // 2:R])
        steps = torch.arange(0, R, 2, dtype=torch.float64) / max(R, 1)
        angles = torch.arange(T)[:, None] * config.rotary_emb_base**-steps      # (T, R / 2)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None].to(pairs.dtype)
        return torch.cat((pairs.real, pairs.imag, x[..., R:]), dim=-1)

    def attention(name, x):
        B, T, C = x.shape
        heads = linear(f'{name}.query_key_value', x).view(B, T, config.num_attention_heads, 3, -1)
        q, k, v = rotated(heads[..., 0, :]), rotated(heads[..., 1, :]), heads[..., 2, :]
        scores = torch.einsum('bthd,bshd->bhts', q, k) / config.head_size**0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        y = torch.einsum('bhts,bshd->bthd', scores.softmax(-1), v)
        return linear(f'{name}.dense', y.reshape(B, T, C))

    x = F.embedding(ids, get('gpt_neox.embed_in.weight'))                       # (B, T, C)
    for i in range(config.num_hidden_layers):
        name = f'gpt_neox.layers.{i}'
        attended = attention(f'{name}.attention', norm(f'{name}.input_layernorm', x))
        middle = x if config.use_parallel_residual else x + attended
        hidden = norm(f'{name}.post_attention_layernorm', middle)
        hidden = linear(f'{name}.mlp.dense_h_to_4h', hidden)
        hidden = F.gelu(hidden, approximate=GELU_KINDS[config.hidden_act])
        x = x + attended + linear(f'{name}.mlp.dense_4h_to_h', hidden)
    return norm('gpt_neox.final_layer_norm', x) @ get('embed_out.weight').T
