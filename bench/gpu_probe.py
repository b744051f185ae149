"""What is needed to tune a training step without another GPU: where its time goes, piece by piece.

    python3 bench/gpu_probe.py --out=probe.json             # about 2 minutes on an H200

Matrix products by shape, passes over memory, optimizer, parts by Triton or not, layers compiled,
a profile by kernel, clocks and power under load, and what each idea of bench/README.md can win.
"""
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import common
import internals
from common import Record, peak_gb, synchronize, time_one
from configurator import require
from model import GPTNeoX, GPTNeoXConfig
from support import fast_path


def main():
    parser = common.option_parser(__doc__)
    parser.add_argument('--model', default='410m', help='a size of Pythia')
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--block', type=int, default=2048, help='tokens of a sequence')
    args = parser.parse_args()
    device = common.device_of(args)
    record, probe = Record(args, device), Probe(args, device)
    # what compiles for long comes last
    for name in ('machine', 'products', 'passes', 'optimizer', 'parts', 'profile_eager',
                 'sustained', 'late_item', 'layers_compiled'):
        record.item(name, getattr(probe, name))
        show(record.result.get(name, {}))
    return record.finish()


def show(found, most=25):
    """Print the first entries, a line each. All of them are in the file."""
    for key, value in list(found.items())[:most]:
        if isinstance(value, dict):
            print(f'  {key}:')
            show(value, most)
        else:
            print(f'  {key}: {value:.3f}' if isinstance(value, float) else f'  {key}: {value}')


class Probe:
    """The measurements, for one Pythia and a micro-batch.

    B sequences of T tokens are N tokens; C is hidden_size, V the vocabulary.
    """

    def __init__(self, args, device):
        self.B, self.T, self.device = args.batch, args.block, device
        self.config = GPTNeoXConfig.pythia(args.model)
        self.dtype, self.backend = torch.bfloat16, 'inductor'
        if args.rehearse:
            # the interpreter multiplies bfloat16 wrongly
            self.B, self.T, self.dtype, self.backend = 1, 16, torch.float16, 'eager'
            self.config = GPTNeoXConfig.pythia(args.model, num_hidden_layers=1, hidden_size=32,
                                               num_attention_heads=2, vocab_size=64)
        self.C, self.V, self.N = self.config.hidden_size, self.config.vocab_size, self.B * self.T

    def random(self, *shape):
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def ms(self, function, **settings):
        return time_one(function, self.device, **settings)

    def build(self, compiled=False):
        """(a model that runs by Triton, a function that takes a micro-step with it)"""
        with torch.device(self.device):
            net = GPTNeoX(self.config)
            idx, targets = torch.randint(self.V, (2, self.B, self.T))
        path = fast_path.choose(net, 'triton', self.device, self.dtype)
        require(path == 'Triton', path)
        if compiled:                                    # layer by layer, as train.py does
            for layer in net.gpt_neox.layers:
                layer.compile(backend=self.backend)

        def micro_step():
            with torch.autocast(self.device, self.dtype):
                loss = net(idx, targets)[1]
            loss.backward()
        return net, micro_step

    # --- items ----------------------------------------------------------------------------------

    def machine(self):
        """Clocks and power of the GPU at rest, and the order in which PyTorch tries attention."""
        fields = 'name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit'
        return {'nvidia_smi': nvidia_smi(fields), 'cpus': os.cpu_count(),
                # by number; 3 is cuDNN
                'sdpa_order': list(torch._C._get_sdp_priority_order())}

    def products(self):
        """TFLOP/s of each matrix product: forward, gradient of the input, of the weight."""
        C, found = self.C, {}
        shapes = {'qkv': (self.N, C, 3 * C), 'dense': (self.N, C, C), 'fc1': (self.N, C, 4 * C),
                  'fc2': (self.N, 4 * C, C), 'both outputs in one': (self.N, 5 * C, C),
                  'head, half the rows': (self.N // 2, C, self.V)}
        for name, (rows, k, n) in shapes.items():
            x, dy = self.random(rows, k), self.random(rows, n)
            w, b = self.random(n, k), self.random(n)
            total = torch.zeros(n, k, device=self.device)
            ways = {'forward': lambda: F.linear(x, w), 'forward + bias': lambda: F.linear(x, w, b),
                    'dx': lambda: dy @ w, 'dw': lambda: dy.T @ x, 'dw and its sum in fp32':
                    lambda: torch.addmm(total, dy.T, x, out_dtype=torch.float32)}
            for way, function in ways.items():
                ms = self.ms(function)
                known = not isinstance(ms, str)
                found[f'{name}, {way}'] = round(2 * rows * k * n / ms / 1e9, 1) if known else ms
        return found

    def passes(self):
        """ms of everything that only moves memory and is not ours."""
        C, found = self.C, {}
        h, dh = self.random(self.N, 4 * C), self.random(self.N, 4 * C)
        gelu_backward = torch.ops.aten.gelu_backward
        for kind in ('none', 'tanh'):
            found[f'gelu {kind}'] = self.ms(lambda: F.gelu(h, approximate=kind))
            found[f'gelu {kind}, backward'] = self.ms(
                lambda: gelu_backward(dh, h, approximate=kind))
        ones = torch.ones(1, self.N, device=self.device, dtype=self.dtype)
        for width in (1, 3, 4):
            dy = dh[:, :width * C].contiguous()
            found[f'column sum, {width} C'] = self.ms(lambda: dy.sum(0))
            found[f'column sum, {width} C, as a product'] = self.ms(lambda: ones @ dy)
        found['copy, 4 C'] = self.ms(lambda: dh.copy_(h))
        ids = torch.randint(self.V, (self.N,), device=self.device)
        gradient = torch.randn(self.N, C, device=self.device)
        embedding_backward = torch.ops.aten.embedding_dense_backward
        found['embedding, backward'] = self.ms(
            lambda: embedding_backward(gradient, ids, self.V, -1, False))
        return found

    def optimizer(self):
        """ms of what comes once a step, and of what comes once a micro-step for every weight."""
        net, _ = self.build()
        optimizer = internals.make_optimizer(net, self.device)
        for p in net.parameters():
            p.grad = torch.full_like(p, 1e-4)
        params, found = list(net.parameters()), {}
        found['AdamW'] = self.ms(optimizer.step)
        found['clip'] = self.ms(lambda: torch.nn.utils.clip_grad_norm_(params, 1.0))
        found['AdamW, the CPU\'s part'] = self.cpu_ms(optimizer.step)
        matrices = [p for p in params if p.dim() == 2]
        found['casts of weights'] = self.ms(lambda: [p.to(self.dtype) for p in matrices])
        found['gradients added'] = self.ms(lambda: [p.grad.add_(p) for p in matrices])
        return found

    def cpu_ms(self, function):
        """ms until function() returns, while the GPU may still work."""
        synchronize(self.device)
        began = time.perf_counter()
        function()
        took = (time.perf_counter() - began) * 1e3
        synchronize(self.device)
        return took

    def parts(self):
        """ms of a micro-step, and of others in which a part runs by PyTorch or by cuDNN."""
        net, micro_step = self.build()
        found = {'all by Triton': self.ms(micro_step, calls=2),
                 'all by Triton, the CPU\'s part': self.cpu_ms(micro_step)}
        if self.device == 'cuda':
            found['all by Triton, peak GB'] = peak_gb(micro_step)
        cases = {'norm by PyTorch': dict(norms=internals.plain_add_norm),
                 'loss by PyTorch': dict(loss=internals.PlainHeadLoss),
                 'attention by PyTorch': dict(attend=internals.causal_attention)}
        for name, case in cases.items():
            with internals.parts(net, **case):
                found[name] = self.ms(micro_step, rounds=5, calls=2)
        fast_path.choose(net, 'torch')
        found['all by PyTorch'] = self.ms(micro_step, rounds=5, calls=2)
        return found

    def profile_eager(self):
        return self.profile(self.build()[1])

    def layers_compiled(self):
        """Seconds to compile the layers; then ms and a profile."""
        _, micro_step = self.build(compiled=True)
        began = time.perf_counter()
        micro_step()
        synchronize(self.device)
        seconds = time.perf_counter() - began
        return {'first_micro_step_s': seconds, 'ms': self.ms(micro_step, calls=2),
                **self.profile(micro_step)}

    def profile(self, micro_step, steps=2):
        """GPU time of a micro-step by kernel: {name: [ms, launches]}, the longest first."""
        for _ in range(2):
            micro_step()
        synchronize(self.device)
        kind, activities = DeviceType.CPU, [ProfilerActivity.CPU]
        if self.device == 'cuda':
            kind, activities = DeviceType.CUDA, [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                micro_step()
            synchronize(self.device)
        times = {}
        for event in profiler.events():
            if event.device_type == kind:
                times.setdefault(event.name, []).append(event.time_range.elapsed_us())
        ranked = sorted(times.items(), key=lambda row: -sum(row[1]))
        kernels = {name[:110]: [round(sum(found) / steps / 1e3, 3), len(found) // steps]
                   for name, found in ranked[:60]}
        return {'total_ms': sum(map(sum, times.values())) / steps / 1e3,
                'launches': sum(map(len, times.values())) / steps, 'kernels': kernels}

    def sustained(self, seconds=6):
        """ms of a micro-step, back to back as in training, and clocks and power meanwhile.

        Everything else here is timed in bursts, in which a GPU may clock higher.
        """
        _, micro_step = self.build()
        seconds = seconds if self.device == 'cuda' else 0.1
        micro_step()
        synchronize(self.device)
        watch = Watch()
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for _ in range(4):
                micro_step()
            steps += 4
            synchronize(self.device)
        ms = (time.perf_counter() - began) / steps * 1e3
        return {'ms': ms, 'tokens_per_s': self.N / ms * 1e3, 'steps': steps, 'watch': watch.stop()}

    def late_item(self, steps=5):
        """ms of an optimizer step that waits for the gradient's norm before AdamW, and of one that
        reads it after."""
        net, micro_step = self.build()
        optimizer, params = internals.make_optimizer(net, self.device), list(net.parameters())

        def run(early):
            for _ in range(steps):
                micro_step()
                norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
                if early:
                    norm.item()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                norm.item()
            synchronize(self.device)
        run(True)
        return {'early': self.cpu_ms(lambda: run(True)) / steps,
                'late': self.cpu_ms(lambda: run(False)) / steps}


# ------------------------------------------------------------------------------
# The GPU's own instruments: read, never set

def nvidia_smi(fields):
    command = ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return common.describe(error)


class Watch:
    """Reads clock, power and temperature five times a second until it is stopped."""

    FIELDS = ('clocks.sm', 'power.draw', 'temperature.gpu')

    def __init__(self):
        command = ['nvidia-smi', f'--query-gpu={",".join(self.FIELDS)}', '-lms', '200',
                   '--format=csv,noheader,nounits']
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            self.process = None

    def stop(self):
        """{field: [least, median, most]} in MHz, W and degrees; empty without nvidia-smi."""
        if not self.process:
            return {}
        self.process.terminate()
        rows, _ = self.process.communicate(timeout=20)
        columns = zip(*(row.split(', ') for row in rows.splitlines() if row.count(', ') == 2))
        found = {}
        for field, column in zip(self.FIELDS, columns):
            numbers = sorted(float(word) for word in column if word.replace('.', '').isdigit())
            if numbers:
                found[field] = [numbers[0], numbers[len(numbers) // 2], numbers[-1]]
        return found


if __name__ == '__main__':
    sys.exit(main())
