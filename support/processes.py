"""The processes that torchrun starts: what they tell each other, signals, locks, devices, the end.

Nobody needs this to understand a run. All of it also works in a single process. say() and Record
write on the first process alone, so that the training loop never asks which process it is.
"""
import atexit
import contextlib
import ctypes
import datetime
import errno
import os
import platform
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError, require

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


# ------------------------------------------------------------------------------
# Which process this is. torchrun sets these variables.

def rank():
    return int(os.environ.get('RANK', 0))


def local_rank():
    return int(os.environ.get('LOCAL_RANK', 0))


def world_size():
    return int(os.environ.get('WORLD_SIZE', 1))


def local_world_size():
    return int(os.environ.get('LOCAL_WORLD_SIZE', world_size()))


def is_first():
    return rank() == 0


# ------------------------------------------------------------------------------
# What they tell each other

def join(device):
    """Join the other processes: nccl between GPUs, gloo elsewhere."""
    global parent_process
    parent_process = os.getppid()
    received.clear()
    for number in STOP_SIGNALS:                         # until a run notes them, nothing is lost
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    if device == 'cuda':
        torch.cuda.set_device(local_rank())
    elif device == 'cpu':
        keep_freed_memory()
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo',
                                timeout=datetime.timedelta(minutes=30))


def from_first(value=None):
    """The value that the first process has, on every one. Also where all wait for each other."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def add_up(values):
    """Sums of a list of numbers over all processes, in float64."""
    if not dist.is_initialized():
        return values
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def agree(loss):
    """(the mean of a loss over all processes, whether any of them was asked to stop)."""
    total, signals = add_up([loss / world_size(), wants_to_stop()])
    return total, signals > 0


def from_all(value):
    """[the value of each process, ...]."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def say(*lines, sep=' '):
    """Print on the first process, above its progress bar, unless there is nothing to say."""
    if is_first() and any(lines):
        tqdm.write(sep.join(map(str, lines)), file=sys.stdout)
        sys.stdout.flush()


# ------------------------------------------------------------------------------
# Being asked to stop

class Stopped(Exception):
    """A signal asked the run to stop. It has been saved and can be resumed."""


STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP')
                if hasattr(signal, name)]               # Windows has no SIGHUP
received = []                   # signals of this process; the loop looks at them after every step
parent_process = None           # torchrun, once join() has looked


def note_signal(number, frame):
    if received and number == signal.SIGINT:            # a second Ctrl-C means now
        os._exit(130)
    received.append(number)


@contextlib.contextmanager
def signals_are_noted():
    """Inside, a signal to stop is only noted: see wants_to_stop(). What nohup ignores stays so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wants_to_stop():
    """Whether this process was asked to stop, or torchrun is gone: kill -9 of it leaves us."""
    is_orphan = 'RANK' in os.environ and os.getppid() != parent_process
    return bool(received) or is_orphan


# ------------------------------------------------------------------------------
# The lock of a run

@contextlib.contextmanager
def locked(out_dir, wait=False):
    """Hold the folder of a run. The kernel releases it when the process ends, however it ends.

    wait: for another process that trains it. A folder that is still empty at the end is removed.
    """
    is_new, handle = not os.path.exists(out_dir), None
    if is_first():
        handle = lock(out_dir, wait)
    from_first()                                        # the other processes wait for the lock
    try:
        yield
        from_first()                                    # all leave together
    finally:
        if is_first() and is_new and not os.listdir(out_dir):
            os.rmdir(out_dir)                           # the run failed before its first step
        if handle is not None:
            os.close(handle)


def lock(out_dir, wait):
    try:
        os.makedirs(out_dir, exist_ok=True)
        require(os.access(out_dir, os.W_OK), f'out_dir {out_dir} is not writable. Choose another.')
        handle = os.open(out_dir, os.O_RDONLY)
        import fcntl                                    # not on Windows, where nothing is locked
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        require(wait, f'out_dir {out_dir} is in use by another run. Wait for it, stop it, or '
                'choose another out_dir.')
        say(f'waiting for the process that trains {out_dir}')
        fcntl.flock(handle, fcntl.LOCK_EX)
    except ImportError:
        return None
    except OSError as error:
        raise UserError(f'out_dir {out_dir}: {error.strerror}. Choose another.')
    return handle


# ------------------------------------------------------------------------------
# Devices

def pick(device, dtype):
    """(the device, the type of matrix products) that two knobs name."""
    device = pick_device(device)
    return device, pick_dtype(dtype, device)


def pick_device(name):
    found = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
             'cpu': True}
    if name == 'auto':
        return [device for device in found if found[device]][0]
    require(found.get(name), f'device = {name!r}, but this PyTorch finds none. Use --device=auto.')
    return name


def pick_dtype(name, device):
    """The type of matrix products: bf16 if the hardware has it, fp16 on older GPUs, else fp32."""
    if name == 'auto' and device == 'cuda':
        name = 'bf16' if torch.cuda.get_device_capability() >= (8, 0) else 'fp16'
    elif name == 'auto':
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = 'bf16' if device == 'cpu' and has_bf16 else 'fp32'
    return DTYPES[name]


def to_device(arrays, device):
    """NumPy arrays as tensors on the device."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device == 'cuda':
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def moved(state, device):
    """Nested values with their tensors on the device."""
    if isinstance(state, dict):
        return {key: moved(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(moved(value, device) for value in state)
    return state.to(device) if torch.is_tensor(state) else state


def keep_freed_memory():
    """Let glibc keep the memory that a step frees, which saves a tenth of a step on a CPU.

    By default it goes back to the kernel, and every step faults in tens of thousands of new pages.
    """
    if sys.platform == 'linux' and platform.libc_ver()[0] == 'glibc':
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# Dense bfloat16 peaks of the data sheets, in FLOP/s.
GPU_PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
                  '4090': 165e12}


def utilisation(model, tokens_per_s):
    """Model FLOPs as a share of the peak, for the progress bar. '' where the peak is unknown."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ''
    peaks = [peak for name, peak in GPU_PEAK_FLOPS.items() if name in gpu]
    if not peaks:
        return ''
    return f' mfu {tokens_per_s * model.flops_per_token() / world_size() / peaks[0]:.0%}'


# ------------------------------------------------------------------------------
# The command: its streams, its errors, its end

class Tolerant:
    """A stream that nobody may be reading any more: a closed terminal or pipe, a full disk."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            return self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def tolerate_streams():
    """Printing is no reason to stop, also on a terminal without Unicode, or without any."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name) or open(os.devnull, 'w')
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')
        if not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))


def fail(program, error):
    """Print what an error means to the user -> exit code. A bug of the program is raised again."""
    text = str(error)
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    signs = 'out of memory', "can't allocate memory", 'bad_alloc'
    if is_memory or any(sign in text for sign in signs):
        text = (f'out of memory ({text[:200]}). Lower micro_batch_size, or use '
                '--checkpoint_activations=true. A run that has saved can be resumed so.')
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = (f'{error.filename}: the disk is full. Make room, and run the same command again '
                'to resume.')
    elif isinstance(error, RuntimeError):
        raise error
    # Most errors occur on every rank. The first one speaks, and torchrun then ends the others.
    time.sleep(0 if is_first() else 3)
    print(f'\n{program}: {text}', file=sys.stderr)
    return 2


def leave(code):
    """Leave the other processes -> code. One that failed stays: they may be waiting for it."""
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    return code


def end(code):
    """End the process."""
    if 'RANK' in os.environ:
        # Destructors of process groups abort a rank now and then at exit ("terminate called
        # without an active exception"), and torchrun then reports a finished run as failed.
        atexit._run_exitfuncs()                         # those of wandb among them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
