"""bench/gpu.sh and its scripts, without a GPU: the rehearsal runs all of it, and nothing that goes
wrong in one part costs the results of another.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'bench'))
import common
import gpu_check
import gpu_run
import train_step
from configurator import UserError

needs_triton = pytest.mark.skipif('triton' not in common.versions(), reason='needs Triton')
PARTS = ['check', 'probe', 'kernels', 'step_410m_eager', 'step_410m_compiled', 'run',
         'step_1.4b_fsdp', 'step_160m']
# What gpu.sh and the programs that it starts may take from the machine: no git, no nvidia-smi.
TOOLS = ['bash', 'cat', 'dirname', 'env', 'mkdir', 'rm', 'sleep', 'tee', 'timeout', 'uname']


@pytest.fixture
def folder_of_tools(tmp_path):
    """A PATH of its own, with python3 in it."""
    tools = tmp_path / 'tools'
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    write_program(tools / 'python3', f'exec {sys.executable} "$@"')
    return tools


def write_program(path, text):
    path.unlink(missing_ok=True)
    path.write_text(f'#!{shutil.which("bash")}\n{text}\n')
    path.chmod(0o755)


def gpu_sh(tools, out, *options, **environment):
    """Run it -> (exit code, its log, {part: content of its JSON file})."""
    environment = {'PATH': str(tools), 'HOME': str(out.parent), **environment}
    run = subprocess.run([ROOT / 'bench' / 'gpu.sh', out, *options], env=environment, timeout=300,
                         cwd=out.parent, capture_output=True, text=True)
    log = (out / 'gpu.log').read_text()
    assert run.stdout == log
    print(log[-6000:])
    found = {path.stem.removeprefix('gpu_'): json.loads(path.read_text())
             for path in out.glob('*.json')}
    assert len(list(out.iterdir())) <= 9
    return run.returncode, log, found


# --- gpu.sh ---------------------------------------------------------------------------------------

@needs_triton
def test_the_rehearsal_runs_every_part_on_a_machine_without_git(folder_of_tools, tmp_path):
    assert shutil.which('git', path=str(folder_of_tools)) is None
    code, log, found = gpu_sh(folder_of_tools, tmp_path / 'out', '--rehearse')
    assert code == 0 and sorted(found) == sorted(PARTS[:-1])
    for part, result in found.items():
        assert result['commit'] == 'none' and result['rehearsal'], part
        assert result['failed'] == {} and result['wrong'] == [], part
    assert all(case['ok'] for case in found['check']['cases'].values())
    assert len(found['kernels']['410m sweep']) > 3 and found['kernels']['1.4b attention']
    assert found['probe']['layers_compiled']['kernels'] and found['probe']['late_item']
    assert len(found['probe']['parts']) == 6
    assert len(found['step_410m_eager']['seconds_per_step']['ours']) == 2
    assert 'ours+compile' in found['step_410m_compiled']['tokens_per_s']
    assert found['step_1.4b_fsdp']['fsdp_overhead_percent'] > -100
    assert found['run']['killed and resumed']['same_bits']
    killed_at = found['run']['run cut']['killed_at_step']
    assert 0 < killed_at < found['run']['killed and resumed']['steps']


# Stands in for python3: notes what it is asked to do, writes its JSON file, and misbehaves in some
# scripts.
FAKE_PYTHON = '''
printf '%s\\n' "$*" >> "$HOME/asked"
for word; do case $word in --out=*) echo '{"half": 1}' > "${word#--out=}" ;; esac; done
case $1 in
    *gpu_check.py) echo 'WRONG: a kernel'; exit 3 ;;
    *gpu_probe.py) kill -SEGV $$ ;;
    *gpu_kernels.py) trap '' TERM; for _ in {1..100}; do sleep 0.1; done ;;
    *gpu_run.py) exit 1 ;;
esac
'''
# Stands in for timeout: a hundred times as fast.
FAST_TIMEOUT = 'exec {} --kill-after=0.1 "0.$(printf %03d "$2")" "${{@:3}}"'


def test_a_part_that_goes_wrong_in_any_way_does_not_stop_the_next(folder_of_tools, tmp_path):
    write_program(folder_of_tools / 'python3', FAKE_PYTHON)
    write_program(folder_of_tools / 'timeout', FAST_TIMEOUT.format(shutil.which('timeout')))
    code, log, found = gpu_sh(folder_of_tools, tmp_path / 'out')
    assert code == 3
    # All were started, and what they wrote is there.
    assert sorted(found) == sorted(PARTS)
    summary = log[log.index('s in all'):]
    assert 'check: 0 s, WRONG RESULTS' in summary and 'exit code 3' in summary
    assert 'probe: 0 s, FAILED, exit code 139' in summary
    assert 'kernels: ' in summary and 'OUT OF TIME' in summary
    assert 'run: 0 s, FAILED, exit code 1' in summary
    assert 'step_160m: 0 s\n' in summary


def test_every_command_of_the_script_parses(folder_of_tools, tmp_path, monkeypatch):
    write_program(folder_of_tools / 'python3', FAKE_PYTHON.replace('{1..100}', ''))
    gpu_sh(folder_of_tools, tmp_path / 'out')
    commands = [line.split() for line in (tmp_path / 'asked').read_text().splitlines()]
    steps, known = 0, {*train_step.ON_GPU.split(','), 'ours-fsdp'}
    for script, *options in commands:
        if script == 'bench/train_step.py':
            monkeypatch.setattr(sys, 'argv', [script, *options, '--device=cuda'])
            args = train_step.parse_arguments()
            assert args.block == 2048 and set(args.contenders) <= known
            steps += 1
    assert len(commands) == len(PARTS) and steps == 4


@pytest.mark.parametrize('seconds, started', [(10, []), (25, PARTS[:4]), (50, PARTS[:-1])])
def test_the_deadline_is_kept(seconds, started, folder_of_tools, tmp_path):
    """Parts get what is left at most, and those that could do nothing with it are skipped."""
    write_program(folder_of_tools / 'python3', 'true')
    write_program(folder_of_tools / 'timeout', 'echo "limit $2"')
    code, log, found = gpu_sh(folder_of_tools, tmp_path / 'out', GPU_SECONDS=str(seconds))
    assert code == 0 and log.count('limit ') == len(started)
    assert all(int(line.split()[1]) <= seconds for line in log.splitlines() if line[:6] == 'limit ')
    summary = log[log.index('s in all'):]
    assert summary.count('skipped') == len(PARTS) - len(started)


# --- what the scripts share -----------------------------------------------------------------------

def options(path, **changes):
    return Namespace(**{'out': str(path), 'seconds': 60, 'rehearse': True, **changes})


def test_a_record_is_on_disk_after_every_item_and_survives_those_that_fail(tmp_path, capsys):
    path = tmp_path / 'folder' / 'record.json'
    record = common.Record(options(path), 'cpu')
    record.item('good', lambda x: {'value': x}, 5)
    assert json.loads(path.read_text())['good'] == {'value': 5}
    record.item('bad', lambda: 1 // 0)
    record.item('after', lambda: {'value': 6})
    found = json.loads(path.read_text())
    assert 'ZeroDivisionError' in found['failed']['bad'] and found['after'] == {'value': 6}
    assert record.finish() == common.FAILED
    record.say_wrong('two and two are five')
    assert json.loads(path.read_text())['wrong'] == ['two and two are five']
    assert record.finish() == common.WRONG
    assert capsys.readouterr().out.endswith('wrong:\n  two and two are five\n')


def test_an_item_that_comes_too_late_is_skipped(tmp_path):
    record = common.Record(options(tmp_path / 'a.json', seconds=0.01), 'cpu')
    time.sleep(0.02)
    record.item('late', lambda: 1 // 0)
    assert record.result['skipped'] == ['late'] and record.finish() == 0


def test_a_contender_that_fails_is_left_out_of_the_timing():
    ms, errors = common.milliseconds({'good': lambda: None, 'bad': lambda: 1 // 0}, 'cpu')
    assert list(ms) == ['good'] and 'ZeroDivisionError' in errors['bad']


class FakeEvent:
    """Of a GPU's clock on which every call takes 3 ms."""
    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def test_a_gpu_is_timed_by_its_own_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'Event', FakeEvent)
    monkeypatch.setattr(torch.cuda, '_sleep', lambda cycles: None)

    def call():
        FakeEvent.now += 3
    assert common.milliseconds({'a': call, 'b': call}, 'cuda') == ({'a': 3, 'b': 3}, {})


def test_peak_memory_is_what_comes_on_top(monkeypatch):
    held = {'now': 5 * 2**30, 'most': 9 * 2**30}
    for name in ('synchronize', 'empty_cache', 'reset_peak_memory_stats'):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: held['now'])
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: held['most'])
    assert common.peak_gb(lambda: held.update(most=12 * 2**30)) == 7


# As the real one: a line five times a second, until it is stopped. One reading is missing.
NVIDIA_SMI = """
[[ $* == *-lms* ]] || { echo "NVIDIA H200, 580, 345 MHz"; exit; }
[[ $* == *--query-gpu=clocks.sm,power.draw,temperature.gpu* ]] || exit 1
for clock in 1980 1755 '[N/A]' 1830; do echo "$clock, 690.5, 61"; done
exec sleep 60
"""


def test_clocks_and_power_are_read_while_the_gpu_works(tmp_path, monkeypatch):
    import gpu_probe
    write_program(tmp_path / 'nvidia-smi', NVIDIA_SMI)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    assert gpu_probe.nvidia_smi('name,driver_version') == 'NVIDIA H200, 580, 345 MHz'
    watch = gpu_probe.Watch()
    time.sleep(0.3)
    found = watch.stop()
    assert found == {'clocks.sm': [1755, 1830, 1980], 'power.draw': [690.5] * 3,
                     'temperature.gpu': [61] * 3}
    monkeypatch.setenv('PATH', str(tmp_path / 'nothing'))
    assert gpu_probe.Watch().stop() == {} and 'FileNotFound' in gpu_probe.nvidia_smi('name')


@needs_triton
def test_a_tile_is_put_back_and_what_was_compiled_is_read(monkeypatch):
    import internals
    import model
    compiled = Namespace(n_regs=126, n_spills=0, metadata=Namespace(shared=81920))
    kernel = {(3, 4): lambda *args, **options: compiled}
    monkeypatch.setattr(model, 'attention_dq_kernel', kernel)
    before = dict(model.ATTENTION_TILES)
    with internals.use_tile(80, internals.DQ, (64, 64, 4, 3)):
        assert internals.tile_in_use(80, internals.DQ) == (64, 64, 4, 3)
        assert internals.tile_in_use(64, internals.DQ) == before[2, 64][1]
        with internals.keep_compiled(internals.DQ) as keeper:
            assert keeper.resources() == {}
            model.attention_dq_kernel[3, 4](1, 2, num_warps=4)
    assert model.ATTENTION_TILES == before and model.attention_dq_kernel is kernel
    assert keeper.resources() == {'registers': 126, 'spills': 0, 'shared_kb': 80}


def test_a_part_by_pytorch_runs_inside_of_the_context_only(monkeypatch):
    import internals
    import model
    monkeypatch.setattr(model, 'triton', None)          # what still calls a kernel fails
    net = model.GPTNeoX(train_step.config_of(Namespace(model='toy', block=8)))
    batch = torch.randint(64, (2, 3, 8))
    plain = net(*batch)[1]
    net.fast = True
    with internals.parts(net, attend=model.causal_attention, norms=internals.plain_add_norm,
                         loss=internals.PlainHeadLoss):
        assert net(*batch)[1].item() == pytest.approx(plain.item(), abs=1e-6)
    with pytest.raises(Exception):
        net(*batch)


def test_no_module_of_bench_hides_a_library():
    """The scripts put bench/ on the path. A kernels.py there was imported by transformers."""
    script = ('import sys, importlib.util\n'
              'print(*filter(importlib.util.find_spec, sys.argv[1:]))')
    names = {path.stem for path in (ROOT / 'bench').glob('*.py')}
    run = subprocess.run([sys.executable, '-I', '-c', script, *names, 'torch'], text=True,
                         stdout=subprocess.PIPE, check=True)
    assert run.stdout.split() == ['torch']
    # Libraries that transformers looks for, installed or not.
    assert not {'kernels', 'tokenizers', 'datasets', 'evaluate'} & names


# --- train_step.py --------------------------------------------------------------------------------

@pytest.fixture
def race(tmp_path, monkeypatch, one_thread):
    """race('ours,...') runs a toy race in this process -> (exit code, content of its file)."""
    def run(contenders, *more):
        out = tmp_path / 'step.json'
        monkeypatch.setattr(sys, 'argv', ['train_step.py', '--rehearse', f'--out={out}',
                                          f'--contenders={contenders}', *more])
        return train_step.main(), json.loads(out.read_text())
    return run


def test_a_compiler_that_fails_does_not_lose_what_was_measured(race, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('no compiler here')
    monkeypatch.setattr(torch.nn.Module, 'compile', fail)
    code, found = race('ours+compile,ours,ours-pytorch')
    assert code == common.FAILED
    assert found['failed'] == {'ours+compile': 'RuntimeError: no compiler here'}
    assert list(found['tokens_per_s']) == ['ours', 'ours-pytorch']
    assert [len(times) for times in found['seconds_per_step'].values()] == [2, 2]


def test_a_contender_that_fails_in_the_middle_keeps_its_rounds(race, monkeypatch):
    real, calls = train_step.Contender.step, []

    def fail_at_fifth(self, *batch):
        calls.append(self)
        if calls.count(self) == 5 and self is calls[0]:     # 3 steps to prepare, 1 of round 0
            raise torch.OutOfMemoryError('no memory is left')
        return real(self, *batch)
    monkeypatch.setattr(train_step.Contender, 'step', fail_at_fifth)
    code, found = race('ours,ours-pytorch')
    assert code == common.FAILED and 'OutOfMemoryError' in found['failed']['ours']
    assert [len(found['seconds_per_step'][name]) for name in ('ours', 'ours-pytorch')] == [1, 2]


def test_without_peers_ours_is_measured(race, monkeypatch):
    for package in ('transformers', 'litgpt'):
        monkeypatch.setitem(sys.modules, package, None)
    code, found = race('ours,transformers,litgpt,nanogpt')
    assert code == 0 and list(found['tokens_per_s']) == ['ours']
    assert 'ratio_of_medians' not in found
    assert list(found['absent']) == ['transformers', 'litgpt', 'nanogpt']
    assert '--nanogpt=FOLDER' in found['absent']['nanogpt']


# As nanoGPT's model.py, as far as the race uses it.
NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_nanogpt_runs_from_a_clone_and_may_have_other_losses(race, tmp_path):
    (tmp_path / 'model.py').write_text(NANOGPT)
    code, found = race('ours,nanogpt', f'--nanogpt={tmp_path}')
    assert code == 0 and list(found['tokens_per_s']) == ['ours', 'nanogpt']
    assert found['best'] == ['ours', 'nanogpt'] and found['ratio_of_medians'] > 0


def test_on_a_gpu_memory_and_share_of_the_peak_are_shown(race, monkeypatch, capsys):
    """The GPU is a CPU that says it is one."""
    real = train_step.Race.compare_losses

    def on_gpu(self):
        real(self)
        self.args.device = 'cuda'
    monkeypatch.setattr(train_step.Race, 'compare_losses', on_gpu)
    monkeypatch.setattr(train_step, 'synchronize', lambda device: None)
    monkeypatch.setattr(train_step, 'peak_gb', lambda function: 41.5)
    monkeypatch.setattr(common, 'hardware', lambda device: 'NVIDIA H200')
    code, found = race('ours,ours-pytorch')
    assert code == 0 and found['peak_gb_above_state'] == {'ours': 41.5, 'ours-pytorch': 41.5}
    assert 0 < found['mfu']['ours'] < 1 and '  0%     41.5' in capsys.readouterr().out


def test_losses_that_differ_are_reported_and_nothing_is_lost(race, monkeypatch):
    real = train_step.Contender.step
    monkeypatch.setattr(train_step.Contender, 'step', lambda self, *batch: real(self, *batch) + (
        0.1 if 'plain' in self.path else 0))
    code, found = race('ours,ours-pytorch')
    assert code == common.WRONG and 'losses of step 0 differ by more than 0.02' in found['wrong'][0]
    assert list(found['tokens_per_s']) == ['ours', 'ours-pytorch']


def test_ours_is_compiled_layer_by_layer(race, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda self, **_: compiled.append(type(self).__name__))
    assert race('ours+compile')[0] == 0 and compiled == ['Layer']


# --- gpu_check.py and gpu_run.py ------------------------------------------------------------------

@pytest.mark.parametrize('fault', ['', 'near', 'nan', 'bits', 'refused'])
def test_the_check_finds_a_kernel_that_is_wrong(fault, monkeypatch):
    real, calls = gpu_check.step, []

    def step(net, batch, kernels, dtype):
        calls.append(kernels)
        found = real(net, batch, 'torch', dtype)
        name = 'gpt_neox.layers.0.attention.query_key_value.bias'
        if kernels == 'triton' and fault == 'near':
            found[name] = found[name] * 1.001
        if kernels == 'triton' and fault == 'nan':
            found[name][0] = float('nan')
        if fault == 'bits' and calls == ['triton', 'triton']:
            found[name][0] = torch.nextafter(found[name][0], torch.tensor(1.0))
        return found
    monkeypatch.setattr(gpu_check, 'step', step)
    if fault == 'refused':
        def refuse(*args):
            raise UserError('it does not follow an edit')
        monkeypatch.setattr(gpu_check.fast_path, 'check', refuse)
    found = gpu_check.check(gpu_check.Case('410m', 'fp32', 1, 20), 'cpu', True)
    assert found['ok'] == (not fault)
    assert bool(found['train_py_refuses']) == (fault == 'refused')
    assert found['same_bits'] == (fault not in ('bits', 'nan'))
    assert found['finite'] == (fault != 'nan')


def test_without_triton_the_check_fails(monkeypatch):
    """It must not compare PyTorch with itself."""
    monkeypatch.setattr(gpu_check.fast_path, 'triton', None)
    with pytest.raises(UserError, match='Triton is not installed'):
        gpu_check.check(gpu_check.Case('410m', 'fp32', 1, 20), 'cpu', True)


def test_one_bit_of_a_moment_is_a_difference():
    def state():
        moments = {'step': 1, 'm': torch.ones(2)}
        return {'weights': {'w': torch.ones(3)}, 'optimizer': [{'state': {0: moments}}]}

    one, other = state(), state()
    assert gpu_run.differences(gpu_run.leaves(one), gpu_run.leaves(other)) == []
    other['optimizer'][0]['state'][0]['m'][1] += 2**-23
    assert gpu_run.differences(gpu_run.leaves(one), gpu_run.leaves(other)) == [
        'optimizer.0.state.0.m']
    other['weights']['more'] = torch.ones(1)
    assert len(gpu_run.differences(gpu_run.leaves(one), gpu_run.leaves(other))) == 2


def test_without_a_gpu_a_script_says_so_and_ends():
    if torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    with pytest.raises(SystemExit, match='needs an NVIDIA GPU'):
        common.device_of(Namespace(rehearse=False))
