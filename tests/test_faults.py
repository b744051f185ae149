"""What train.py does when something goes wrong: disks, folders, checkpoints, terminals."""
import errno
import fcntl
import io
import os
import pickle
import random
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (before_batch, contents, crash, ends_well, evaluated, metrics, plain,
                      same_run, saved, stage)

import eval
import train
from configurator import UserError
from model import GPTNeoX, GPTNeoXConfig
from support import checkpoints, processes
from support.huggingface import save_hf

pytestmark = pytest.mark.usefixtures('one_thread', 'fast')


def save_weights(folder):
    """A Hugging Face directory of the shape of these runs."""
    save_hf(GPTNeoX(GPTNeoXConfig(384, 32, num_hidden_layers=1, num_attention_heads=2,
                                  max_position_embeddings=32)), folder)


@pytest.fixture
def killed(config, monkeypatch):
    """killed('a', ...): the config of a run with checkpoints of steps 5 and 10, killed in 12."""
    def kill(name, **changes):
        file = config(name, **changes)
        crash([file], 12, monkeypatch)
        return file
    return kill


# ------------------------------------------------------------------------------
# Checkpoints that are truncated, damaged, unreadable or not ours

@pytest.mark.parametrize('keep', [0, 0.5, -1])
def test_a_truncated_checkpoint_is_passed_over(config, killed, capsys, keep):
    ends_well(config('whole'))
    name, path = killed('a'), Path('out/a/ckpt_00000010.pt')
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] if keep == -1 else raw[:int(len(raw) * keep)])
    capsys.readouterr()
    ends_well(name)
    said = capsys.readouterr().out
    assert f'{path}: truncated or damaged' in said and 'Trying an older checkpoint' in said
    same_run('out/whole', 'out/a')


def test_without_a_whole_checkpoint_no_run_starts_over(killed, fails):
    name = killed('a')
    for path in checkpoints.find('out/a').values():
        path.write_bytes(b'')
    before = contents('out/a')
    for _ in range(2):                                              # nor at the second attempt
        fails(name, says=['out/a', 'no checkpoint is whole', 'delete it'])
    assert contents('out/a') == before


NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")


@pytest.mark.parametrize('owner, function, error', [
    (zipfile, 'ZipFile', PermissionError(errno.EACCES, 'Permission denied')),
    (zipfile.ZipFile, 'testzip', OSError(errno.EIO, 'Input/output error')),
    (zipfile.ZipFile, 'testzip', MemoryError()), (torch, 'load', MemoryError()),
    (torch, 'load', NO_MEMORY), (torch, 'load', OSError(errno.EMFILE, 'Too many open files'))],
    ids=lambda value: type(value).__name__)
def test_what_cannot_be_read_is_not_damaged(killed, fails, monkeypatch, owner, function, error):
    def fail(*args, **kwargs):
        raise error
    name = killed('a')
    before = contents('out/a')
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        said = fails(name, says=['out/a/ckpt_00000010.pt', 'Nothing was changed'])
    assert contents('out/a') == before and 'delete' not in said
    ends_well(name)


def test_flipped_bits_are_detected(killed):
    killed('a')
    path = Path('out/a/ckpt_00000010.pt')
    raw, whole = path.read_bytes(), plain(checkpoints.read(path))
    seed = random.randrange(10**6)
    print('seed', seed)
    draw = random.Random(seed)
    with zipfile.ZipFile(path) as archive:                          # where the large tensors are
        inside = [(entry.header_offset + 512, entry.header_offset + entry.file_size)
                  for entry in archive.infolist() if entry.file_size > 4096]
        directory = archive.start_dir
    flips = [(draw.randrange(*draw.choice(inside)), True) for _ in range(8)]
    flips += [(draw.randrange(directory, len(raw)), False) for _ in range(200)]
    flips += [(draw.randrange(len(raw)), False) for _ in range(30)]
    for offset, must_be_found in flips:
        flipped = bytearray(raw)
        flipped[offset] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            state = checkpoints.read(path)
        except UserError as error:
            assert str(path) in str(error) and isinstance(error, checkpoints.Damaged), error
            continue
        assert not must_be_found, offset
        assert plain(state) == whole, offset                        # padding, or a date


class Payload:
    def __reduce__(self):
        return os.system, ('touch was_run',)


@pytest.mark.parametrize('form', ['zip', 'pickle'])
def test_a_malicious_checkpoint_runs_nothing(config, fails, form):
    name = stage(config, 'b', init_from='evil.pt')
    if form == 'zip':
        torch.save({'step': 1, 'weights': Payload()}, 'evil.pt')
    else:
        Path('evil.pt').write_bytes(pickle.dumps(Payload()))
    fails(name, says=['evil.pt'])
    Path('out/a').mkdir(parents=True)
    shutil.copy('evil.pt', 'out/a/ckpt_00000010.pt')
    assert 'weights_only' not in fails(config('a'), says=['out/a'])
    assert not Path('was_run').exists()


def changed(state, where, value):
    """A copy of nested dictionaries with another value at a path 'a/b'; ... drops the key."""
    key, _, rest = where.partition('/')
    key = int(key) if key.isdigit() else key
    state = dict(state)
    if rest:
        state[key] = changed(state[key], rest, value)
    elif value is ...:
        del state[key]
    else:
        state[key] = value
    return state


WRONG = [(f'{part}/{key}', value) for part in checkpoints.PARTS if part != 'optimizer'
         for key in checkpoints.CONTENTS[part] if key != 'tokenizer' for value in (..., None, 3.5)]
WRONG += [(part, value) for part in checkpoints.PARTS for value in (..., None, 'x', 3.5)]
WRONG += [('model', {}), ('history', {}), ('config', ...), ('config', None),
          ('model/shape', {'hidden_size': 'x'}), ('model/shape', {'hidden_size': 64}),
          ('model/shape/hidden_sise', 3), ('model/shape/num_hidden_layers', 10**9),
          ('model/shape/vocab_size', 10**15),
          ('model/weights', {}), ('model/weights/embed_out.weight', ...),
          ('model/weights/embed_out.weight', 3),
          ('model/weights/embed_out.weight', torch.zeros(384, 16)),
          ('model/weights/embed_out.weight', torch.full((384, 32), float('nan'))),
          ('history/sources/old', None), ('history/sources/old/read', 'x'),
          ('progress/step', True), ('progress/step', 10**30), ('stage/start_step', 11),
          ('progress/seed', 'x'), ('progress/batch_size', 3.5), ('progress/batch_size', -1),
          ('progress/skips', {'old': 2**63}), ('progress/skips', {'old': 'x'}),
          ('config/seed', torch.zeros(3))]
WRONG += [('progress/mixes', mixes) for mixes in (
    [None], [(0, 5)], [], [(5, {'old': '1'})], [(0, {'old': '1e999999999'})], [(0, {'old': 'nan'})],
    [(0, {'old': '0'})], [(0, {'old': '1/0'})], [(0, {'x': '1'})], [(0, {'old': 1})])]


def test_a_checkpoint_with_missing_or_wrong_values_is_an_error(killed, fails):
    name = killed('a')
    state, path = saved('out/a', 10), Path('out/a/ckpt_00000010.pt')
    before = metrics('out/a')
    for where, value in WRONG:
        print(where, value)
        torch.save(changed(state, where, value), path)
        fails(name)
        assert metrics('out/a') == before
    torch.save(state, path)
    ends_well(name)


FIRST = 'gpt_neox.embed_in.weight'
WRONG_MOMENTS = [('optimizer', {}), ('optimizer/kind', 'SGD'), ('optimizer/moments', {FIRST: {}})]
WRONG_MOMENTS += [(f'optimizer/moments/{FIRST}{rest}', value) for rest, value in (
    ('', ...), ('', None), ('/step', ...), ('/step', 'x'), ('/step', torch.zeros(3)),
    ('/exp_avg', ...), ('/exp_avg', 3), ('/exp_avg', torch.zeros(3)),
    ('/exp_avg_sq', torch.zeros(1)),
    ('/exp_avg_sq', torch.zeros(384, 32, dtype=torch.int64)))]


def test_moments_that_do_not_fit_never_reach_the_optimizer(config, killed, fails):
    name = killed('a')
    state, path = saved('out/a', 10), Path('out/a/ckpt_00000010.pt')
    for where, value in WRONG_MOMENTS:
        print(where, value)
        torch.save(changed(state, where, value), path)
        fails(name, says=['moments'])
    fails(config('b', branch_from=str(path)), says=['moments'])
    fails(stage(config, 'b', init_from=str(path), keep_optimizer=True), says=['moments'])
    ends_well(stage(config, 'b', init_from=str(path)))              # the weights are all right
    save_weights('hf')
    fails(stage(config, 'c', init_from='hf', keep_optimizer=True),
          says=['keep_optimizer', 'moments'])


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory.'), MemoryError(), RuntimeError('std::bad_alloc'),
    NO_MEMORY], ids=repr)
def test_a_full_memory_is_one_message(config, killed, fails, monkeypatch, error):
    def fail(*args):
        raise error
    name = killed('a')
    with monkeypatch.context() as patch:
        before_batch(patch, 3, lambda: fail())
        fails(name, says=['out of memory', 'micro_batch_size'])
    ends_well(name, '--micro_batch_size=2')                         # from step 10


# ------------------------------------------------------------------------------
# What is kept, and a full disk

def test_retention(config):
    """The newest two stay, and the milestones."""
    ends_well(config('a', save_every=3, milestones=[0, 4, 9, 10]))
    assert list(checkpoints.find('out/a')) == [0, 4, 9, 10, 18, 20]
    assert saved('out/a', 0)['progress']['step'] == 0 and saved('out/a', 4)['progress']['step'] == 4


def test_a_damaged_newest_checkpoint_does_not_push_out_what_is_saved(config, killed, forked):
    """What is newer than the step that is saved was damaged, or the run had resumed from it."""
    name = killed('a')
    Path('out/a/ckpt_00000010.pt').write_bytes(b'')
    Path('out/a/ckpt_00000015.pt').write_bytes(b'')
    assert forked([name], at=('batch', 3), signals=[signal.SIGTERM])[0] == [0]
    assert list(checkpoints.find('out/a')) == [5, 8]


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'No space left on device'),
    RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')], ids=str)
def test_a_full_disk_loses_nothing(config, fails, monkeypatch, error):
    ends_well(config('whole'))
    name, real, calls = config('a'), torch.save, []

    def save(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b'half')
            raise error
        return real(state, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', save)
        fails(name, says=['ckpt_00000010.pt', str(error), 'GB are free', 'same command again'])
    assert list(checkpoints.find('out/a')) == [5]
    assert not list(Path('out/a').glob('*partial'))
    ends_well(name)
    same_run('out/whole', 'out/a')


def test_a_disk_that_is_full_from_the_start_names_the_file(config, fails, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, 'No space left on device')
    name = config('a')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        fails(name, says=['out/a/metrics.jsonl', 'Make room'])
    assert not Path('out/a').exists()
    ends_well(name)


# ------------------------------------------------------------------------------
# The folder of a run

def test_a_folder_in_use_by_another_run(config, fails, monkeypatch):
    ends_well(config('whole'))
    name, tried = config('a'), []

    def start_again():                                              # while this run trains
        tried.append(fails(name, says=['out/a', 'in use', 'out_dir']))
        fails(config('a', seed=3), says=['in use'])
        config('a')
    with monkeypatch.context() as patch:
        before_batch(patch, 2, start_again)
        ends_well(name)
    assert tried
    same_run('out/whole', 'out/a')


def test_folders_that_hold_something_else_are_not_written_into(config, fails):
    ends_well(config('a'))
    shutil.copytree('out/a', 'removed')
    for path in checkpoints.find('removed').values():
        path.unlink()
    save_weights('hf')
    Path('mine').mkdir()
    Path('mine/thesis.tmp').write_text('mine')
    for folder, changes, says in (
            ('out/a', dict(seed=8, beta2=0.99), ['seed', '1337', '8', 'beta2', '0.95', '0.99']),
            ('removed', {}, ['no checkpoint', 'delete it']),
            ('removed', dict(seed=8), ['seed', 'delete that run']),
            ('hf', {}, ['another']), ('mine', {}, ['another'])):
        before = contents(folder)
        fails(config('a', out_dir=folder, **changes), says=[folder, *says])
        fails(stage(config, 'b', init_from='a.py'), says=[folder])  # nor as the parent of another
        assert contents(folder) == before


def test_only_files_of_the_run_itself_are_removed(killed):
    name = killed('a')
    names = ('thesis.tmp', 'ckpt_original.pt', 'ckpt_00000007.tmp', 'ckpt_5.pt')
    for file in names:
        Path('out/a', file).write_text('mine')
    Path('out/a/cache.tmp').mkdir()
    ends_well(name)
    assert all(Path('out/a', file).read_text() == 'mine' for file in names)
    assert list(checkpoints.find('out/a')) == [15, 20]


@pytest.mark.pictures
def test_nothing_is_written_through_a_link(killed):
    name = killed('a')
    Path('victim').write_text('mine')
    for file in ('config.json', 'metrics.jsonl', 'forgetting.png', 'ckpt_00000015.pt'):
        for path in (Path('out/a', file), Path('out/a', f'{file}.rewarm-partial')):
            path.unlink(missing_ok=True)
            path.symlink_to(Path('victim').resolve())
    ends_well(name)
    assert Path('victim').read_text() == 'mine'
    assert saved('out/a', 15)['progress']['step'] == 15 and evaluated('out/a')[-1] == 20
    assert Path('out/a/forgetting.png').read_bytes()[:4] == b'\x89PNG'


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(config, fails, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt
    fails(config('a', train_data={'odl': 1.0}), says=['odl'])
    fails(config('a', hidden_size=33), says=['33'])
    monkeypatch.setattr(train.fast_path, 'check', interrupt)
    assert train.main([config('a')]) == 130
    assert not Path('out/a').exists()
    Path('mine').mkdir()                                            # this one is not the run's
    fails(config('a', out_dir='mine', hidden_size=33), says=['33'])
    assert Path('mine').exists()


def test_out_dir_that_cannot_be(config, fails):
    name = config('a')
    Path('file').write_text('mine')
    fails(name, '--out_dir=file', says=['out_dir', 'file'])
    fails(name, '--out_dir=file/deeper', says=['out_dir', 'file/deeper'])
    assert Path('file').read_text() == 'mine'
    if sys.platform == 'linux':
        fails(name, '--out_dir=/proc/rewarm', says=['out_dir', '/proc/rewarm'])
    if os.geteuid():                                                # root writes everywhere
        Path('locked').mkdir(mode=0o500)
        fails(name, '--out_dir=locked', says=['locked', 'not writable'])


# ------------------------------------------------------------------------------
# Upstream runs: a finished one is only read

def test_children_read_a_finished_parent_without_a_lock(config):
    config('up')
    ends_well(stage(config, 'first', init_from='up.py'))
    folder = Path('out/up')
    before = contents(folder)
    folder.chmod(0o500)
    others = os.open(folder, os.O_RDONLY)
    fcntl.flock(others, fcntl.LOCK_EX)                              # as if other starters were here
    try:
        ends_well(stage(config, 'b', init_from='up.py'))
    finally:
        os.close(others)
        folder.chmod(0o700)
    assert contents(folder) == before
    same_run('out/first', 'out/b', 12)


def test_a_second_starter_waits_for_the_upstream_run(config, monkeypatch):
    ends_well(config('up', out_dir='elsewhere'))
    config('up')
    Path('out/up').mkdir(parents=True)
    other = os.open('out/up', os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    def say(*lines, sep=' '):
        if 'waiting for' in str(lines):                             # now the other process finishes
            assert 'out/up' in lines[0]
            shutil.copytree('elsewhere', 'out/up', dirs_exist_ok=True)
            os.close(other)
    monkeypatch.setattr(processes, 'say', say)
    ends_well(stage(config, 'b', init_from='up.py'))
    assert contents('out/up') == contents('elsewhere')              # it was not trained once more


def test_a_signal_in_the_last_evaluation_upstream_is_not_passed_on(config, forked):
    config('up')
    assert forked([stage(config, 'whole', init_from='up.py')])[0] == [0]
    shutil.rmtree('out/up')
    name = stage(config, 'b', init_from='up.py')
    assert forked([name], at=('evaluate', 10), signals=[signal.SIGTERM])[0] == [0]
    assert not checkpoints.find('out/b')
    assert forked([name])[0] == [0]
    same_run('out/whole', 'out/b', 12)


# ------------------------------------------------------------------------------
# Data that change under a run

def test_an_infinite_switch_is_an_error(config, fails):
    Path(config('a')).write_text("switches = [{'step': 1e400, 'train_data': {'new': 1}}]\n"
                                 "train_data = {'old': 1.0}\n")
    fails('a.py', says=['switches', 'inf'])


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_replaced_shard_is_noticed_on_resume(corpora, killed, fails, split):
    shutil.copytree(corpora, 'mine')
    name, file = killed('a', data_dir='mine'), Path(f'mine/old/{split}_00000.bin')
    raw = bytearray(file.read_bytes())
    raw[1024:] = raw[1024:][2:] + raw[-2:]                          # other ids, the same size
    file.write_bytes(raw)
    fails(name, says=['old', 'changed', 'another out_dir'])
    assert list(checkpoints.find('out/a')) == [5, 10]


# ------------------------------------------------------------------------------
# The end of a run cannot fail

@pytest.mark.pictures
def test_a_run_that_ends_in_nan_ends_well(config):
    ends_well(config('a', max_steps=1, warmup=0, learning_rate=9e18, min_lr=1e18))
    text = Path('out/a/metrics.jsonl').read_text()
    assert 'NaN' not in text and metrics('out/a', 'eval')[-1]['val']['old']['loss'] is None


@pytest.mark.pictures
def test_a_run_draws_its_curve_and_prints_its_row(config, capsys):
    ends_well(config('a', max_steps=5, warmup=1))
    assert Path('out/a/forgetting.png').read_bytes()[:4] == b'\x89PNG'
    assert '| a ' in capsys.readouterr().out
    ends_well(config('b', val_data=[], max_steps=5, warmup=1))      # there is nothing to draw


def test_a_picture_that_cannot_be_drawn_is_no_error(config, capsys, monkeypatch):
    monkeypatch.setattr(eval, 'plot', lambda *args: 1 / 0)
    ends_well(config('a', max_steps=5, warmup=1))
    said = capsys.readouterr().out
    assert 'could not be drawn' in said and list(checkpoints.find('out/a')) == [5]


def test_a_terminal_without_unicode_is_no_error(config, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', terminal)
    ends_well(config('a', max_steps=5, warmup=1))                   # its row has a dash
    assert b'| a ' in terminal.buffer.getvalue()


class Pipe(io.StringIO):
    """A pipe to `head`, which leaves when it has seen a word."""

    def __init__(self, word):
        super().__init__()
        self.word, self.is_closed = word, False

    def write(self, text):
        self.is_closed = self.is_closed or self.word in text
        if self.is_closed:
            raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
        return len(text)


@pytest.mark.parametrize('word', ['max_steps', 'phase', 'step 0', 'step 5', '| a '])
def test_a_pipe_that_closes_is_no_error(config, monkeypatch, word):
    pipe = Pipe(word)
    monkeypatch.setattr(sys, 'stdout', pipe)
    ends_well(config('a', max_steps=5, warmup=1))
    assert pipe.is_closed and evaluated('out/a') == [0, 5]
