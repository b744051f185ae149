"""What several test files share: two tiny corpora, tiny configs, and a server that forks runs.

Run as a script, this file is that server. It imports train once and forks a process for each job,
so a run that is killed, stopped or shared by two ranks costs milliseconds, not an import of torch.
"""
import importlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

# The models here are so small that a second thread only waits, and keeps a core busy with it. The
# cores have better to do: pytest -n 2 runs two tests at a time.
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# The files of published tokenizers. Tests that need them are skipped where they are missing.
TOKENIZERS = Path(os.environ.get('REWARM_TOKENIZERS', ROOT.parent / 'shared' / 'tokenizers'))

TINY = dict(train_data={'old': 1.0}, val_data=['old', 'new'], hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, block_size=32, batch_size=4, max_steps=20, learning_rate=3e-3,
            min_lr=3e-4, warmup=4, device='cpu', dtype='fp32', eval_every=10, eval_windows=7,
            log_every=1, save_every=5)


def make_documents(letters, seed, n=60):
    """Texts that repeat a few words in letters of their own, so any token tells its corpus."""
    draw = random.Random(seed)
    words = [''.join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(20)]
    return [' '.join(draw.choices(words, k=80)) for _ in range(n)]


def pytest_configure(config):
    for marker in ('pictures: draws the curve of a run, which takes a second',
                   'plain_model: compares model.py with a GPT-NeoX, so a change turns it red',
                   'quick: one of those that take a minute together'):
        config.addinivalue_line('markers', marker)


def pytest_collection_modifyitems(items):
    """The longest tests first, so that pytest -n 2 does not end with one of them alone."""
    long = ['test_gpu_bench', 'test_kernels', 'test_plan', 'test_sharded', 'test_lesson',
            'test_walk']
    items.sort(key=lambda item: item.path.stem not in long)


@pytest.fixture
def figures(monkeypatch):
    """The figures that a program has drawn, once it has saved them."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    found = []
    monkeypatch.setattr(plt, 'close', found.append)
    return found


@pytest.fixture(scope='session')
def corpora(tmp_path_factory):
    """A data_dir with the sources 'old' (small letters) and 'new' (capitals)."""
    from corpora.shards import write_corpus
    folder = tmp_path_factory.mktemp('data')
    write_corpus(make_documents('abcdefghij', 1), 'old', folder, val=0.2)
    write_corpus(make_documents('KLMNOPQRST', 2), 'new', folder, val=0.2)
    return folder


def train_bpe(folder, texts, vocab_size, runs=range(24, 1, -1), end='<|endoftext|>'):
    """A small tokenizer.json built like GPT-NeoX-20B's: NFC, byte level, runs of spaces."""
    tokenizers = pytest.importorskip('tokenizers', reason='it trains the tokenizer')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[end, '<|padding|>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens([tokenizers.AddedToken(' ' * n, normalized=True) for n in runs])
    tokenizer.save(str(folder / 'tokenizer.json'))
    return tokenizer


@pytest.fixture(scope='session')
def bpe(tmp_path_factory):
    """A folder with a tokenizer.json trained on the documents of 'old'."""
    folder = tmp_path_factory.mktemp('bpe')
    train_bpe(folder, make_documents('abcdefghij', 1), 340)
    return folder


@pytest.fixture(scope='session')
def finished(corpora, tmp_path_factory):
    """A finished run on 'old', evaluated on all windows."""
    import eval
    import train
    out = tmp_path_factory.mktemp('finished') / 'a'
    knobs = {**TINY, 'out_dir': str(out), 'data_dir': str(corpora), 'eval_windows': 0,
             'max_steps': 30}
    Path(f'{out}.py').write_text(''.join(f'{key} = {value!r}\n' for key, value in knobs.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval, 'plot', lambda *args: None)
        assert train.main([f'{out}.py']) == 0
    return out


@pytest.fixture
def config(tmp_path, corpora, monkeypatch):
    """config('a', key=value, ...) writes a.py in an empty working directory and returns its name.

    Its out_dir is 'out/a'. None leaves a key out.
    """
    import schedules
    monkeypatch.chdir(tmp_path)

    def write(name, **changes):
        schedule = changes.get('schedule', 'cosine')
        takes = schedules.knobs_of(schedule) if schedule in schedules.SCHEDULES else {}
        idle = {'min_lr', 'warmup'} - set(takes)
        knobs = {'out_dir': f'out/{name}', 'data_dir': str(corpora), **TINY}
        knobs = {key: value for key, value in knobs.items() if key not in idle} | changes
        lines = [f'{key} = {value!r}\n' for key, value in knobs.items() if value is not None]
        Path(f'{name}.py').write_text(''.join(lines))
        return f'{name}.py'
    return write


@pytest.fixture(scope='module')
def one_thread():
    """For models this small a second thread only waits, and keeps a core busy with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_signals_afterwards():
    """A run in this process handles Ctrl-C itself, and pytest wants it back."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # in the workers of pytest -n
        signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def saved(run, step=20):
    """The checkpoint of a run folder at a step."""
    return torch.load(Path(run, f'ckpt_{step:08d}.pt'), weights_only=True)


def metrics(run, event=None):
    """The rows of metrics.jsonl of one event, or all but the first, which says whose they are.

    They come without what differs in any two runs: the id, and what the clock measures.
    """
    rows = [json.loads(line) for line in Path(run, 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ('run', 'tokens_per_s')}
            for row in rows if row['event'] == event or (event is None and row['event'] != 'start')]


def losses(run):
    return [row['loss'] for row in metrics(run, 'train')]


def evaluated(run):
    """The steps that a run was evaluated at."""
    return [row['step'] for row in metrics(run, 'eval')]


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def plain(state):
    """Nested values with tensors as bytes, so that == is equality bit for bit."""
    if torch.is_tensor(state):
        return str(state.dtype), tuple(state.shape), state.contiguous().numpy().tobytes()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, (list, tuple)) else state


def same_run(a, b, step=20):
    """Weights, moments and the record of two runs are equal bit for bit."""
    for part in ('model', 'optimizer'):
        assert plain(saved(a, step)[part]) == plain(saved(b, step)[part]), part
    assert metrics(a) == metrics(b)


# ------------------------------------------------------------------------------
# Runs in this process

@pytest.fixture
def fast(monkeypatch, request):
    """No test cuts the power, so none waits for the disk; and few look at a picture."""
    import eval
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
    if 'pictures' not in request.keywords:
        monkeypatch.setattr(eval, 'plot', lambda *args: None)


def ends_well(*argv, method=None):
    import train
    assert train.main(list(argv), method or train.Method) == 0


@pytest.fixture
def fails(capsys):
    """fails(argv..., says=[...]): exit code 2 and one message with these words, no traceback."""
    import train

    def check(*argv, says=(), method=train.Method):
        capsys.readouterr()
        code = train.main(list(argv), method)
        err = capsys.readouterr().err
        assert code == 2, err
        assert 'Traceback' not in err and err.count('\ntrain.py: ') == 1
        missing = [text for text in says if not re.search(rf'(?<!\w){re.escape(text)}(?!\w)', err)]
        assert missing == [], err
        return err
    return check


def stage(config, name, **changes):
    """The config of a second stage on 'new', which takes the shape of its parent."""
    shape = dict.fromkeys(('hidden_size', 'num_hidden_layers', 'num_attention_heads'))
    return config(name, **{**shape, 'train_data': {'new': 1.0}, 'learning_rate': 2e-3,
                           'max_steps': 12, **changes})


def before_batch(patch, n, do):
    """Call do() before the n-th batch that is trained on, n = 1, 2, ..."""
    import data
    real, count = data.batch_rows, [0]

    def batch_rows(*args):
        count[0] += 1
        if count[0] == n:
            do()
        return real(*args)
    patch.setattr(data, 'batch_rows', batch_rows)


class Crash(BaseException):
    """The power goes."""


def crash(argv, after, monkeypatch, method=None):
    """Run in this process, train on `after` batches, then end as in a crash."""
    import train

    def fail():
        raise Crash
    with monkeypatch.context() as patch, pytest.raises(Crash):
        before_batch(patch, after + 1, fail)
        train.main(argv, method or train.Method)


# ------------------------------------------------------------------------------
# Runs in processes of their own

@pytest.fixture(scope='session')
def forking():
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    yield server
    server.stdin.close()
    server.wait()


@pytest.fixture
def forked(forking, config, tmp_path):
    """forked(argv, world=1, at=(event, n), signals=[...], rank=0) -> ([exit codes], stderr).

    At the n-th `event` of that rank, the rank sends itself these signals, one after the other.
    Events: 'batch', 'train' (a forward pass), 'update', 'evaluate', 'fsync', 'replace', 'save'
    (when half of a checkpoint is written), or '' for all of them. stderr is that of rank 0.
    method: 'module:Class' of a project.
    """
    def run(argv, world=1, at=('', 0), signals=(signal.SIGKILL,), rank=0, per_node=None,
            method='train:Method'):
        job = dict(argv=argv, world=world, at=at, signals=[int(s) for s in signals], rank=rank,
                   per_node=per_node or world, cwd=str(tmp_path), method=method)
        forking.stdin.write(json.dumps(job) + '\n')
        forking.stdin.flush()
        codes = json.loads(forking.stdout.readline())
        return codes, (tmp_path / 'stderr_0').read_text()
    return run


def serve():
    """For every job on stdin: fork its ranks, wait for them, print their exit codes."""
    import train
    import corpora.embedded                 # what a run imports late, for a second each time
    import numpy.ma
    import torch._dynamo
    import torch.utils.serialization
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        pids = []
        for rank in range(job['world']):
            pid = os.fork()
            if pid == 0:
                child(job, rank, port, train)
            pids.append(pid)
        codes = []
        for pid in pids:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            if codes[0]:                    # like torchrun: when one rank fails, end the others
                for other in pids[len(codes):]:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def child(job, rank, port, train):
    os.chdir(job['cwd'])
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        os.dup2(os.open(f'{name}_{rank}', flags, 0o644), number)
    signal.alarm(60)                        # no test waits longer for a run that hangs
    if job['world'] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % job['per_node']),
                          WORLD_SIZE=str(job['world']), LOCAL_WORLD_SIZE=str(job['per_node']),
                          MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    code = 1
    try:
        install_events(job, rank)
        module, name = job['method'].split(':')
        code = train.main(job['argv'], getattr(importlib.import_module(module), name))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def install_events(job, rank):
    """Count events, send the signals at that of the job, and note the rows that are trained on.

    The batch and the passes with which a run checks its fast path are not counted.
    """
    import data
    import eval
    import model
    seen, training = 0, False
    wanted, at = job['at']
    rows = open(f'rows_{rank}', 'w', buffering=1)

    def event(name):
        nonlocal seen
        if rank == job['rank'] and wanted in ('', name):
            seen += 1
            if seen == at:
                for number in job['signals']:
                    os.kill(os.getpid(), number)

    def wrap(owner, attribute, name):
        real = getattr(owner, attribute)

        def wrapped(*args, **kwargs):
            event(name)
            return real(*args, **kwargs)
        setattr(owner, attribute, wrapped)

    os.fsync = lambda handle: None          # no test cuts the power, so none waits for the disk
    wrap(torch.optim.AdamW, 'step', 'update')
    wrap(os, 'fsync', 'fsync')
    wrap(os, 'replace', 'replace')
    real_rows, real_batch = data.batch_rows, data.Mixture.batch
    real_forward, real_save = model.GPTNeoX.forward, torch.save

    def batch_rows(*args):
        nonlocal training
        training = True                     # until the forward pass of this micro-step
        event('batch')
        return real_rows(*args)

    def batch(self, g):
        x, y, names = real_batch(self, g)
        if training:
            for number, row in zip(g, x.tolist()):
                rows.write(json.dumps([number, row]) + '\n')
        return x, y, names

    def forward(self, idx, targets=None, reduction='mean', position=0):
        nonlocal training
        if reduction == 'none':
            event('evaluate')
        elif training:
            event('train')
            training = False
        return real_forward(self, idx, targets, reduction, position)

    def save(state, file):
        buffer = io.BytesIO()
        real_save(state, buffer)
        raw = buffer.getvalue()
        file.write(raw[:len(raw) // 2])
        file.flush()
        event('save')
        file.write(raw[len(raw) // 2:])

    data.batch_rows, data.Mixture.batch = batch_rows, batch
    model.GPTNeoX.forward, torch.save = forward, save
    eval.plot = lambda *args: None          # a second each; it has tests of its own


if __name__ == '__main__':
    serve()
