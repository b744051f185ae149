"""results/: every command of every run.sh is one that train.py and eval.py take, and claims name rows of their tables."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import configurator
import eval
import train

# In place of python: notes what it is asked to do. Only the small sums of the scripts are worked out.
NOTES = f"""#!/usr/bin/env bash
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
printf '%s\\n' "$@" > asked/$EPOCHREALTIME.$$      # a file each, for two may write at once
"""


def commands(question, folder):
    """[words of each command] that a run.sh gives to python."""
    for name in ('results', 'config'):
        shutil.copytree(ROOT / name, folder / name)
    Path(folder, 'asked').mkdir()
    Path(folder, 'python').write_text(NOTES)
    Path(folder, 'python').chmod(0o755)
    subprocess.run([folder / 'results' / question / 'run.sh'], check=True, cwd='/', timeout=60,
                   env={'PATH': f'{folder}:/usr/bin:/bin'})
    return [path.read_text().splitlines() for path in sorted(Path(folder, 'asked').iterdir())]


@pytest.mark.parametrize('question', sorted(path.parent.name for path in (ROOT / 'results').glob('*/run.sh')))
def test_the_commands_of_a_question(question, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, made, tables = commands(question, tmp_path), set(), 0
    for script, *words in given:
        if script == 'train.py':
            values, origin = configurator.load(train.__file__, words)
            cfg = train.Config(**values)
            train.check(cfg, origin, 1)
            lr = train.schedules.build(cfg.schedule, steps=cfg.max_steps, peak=cfg.learning_rate, **values)
            train.resolve_phases(cfg, lr, 0, None)
            parent = re.sub(r'/ckpt_\d+\.pt$', '', train.parent_name(cfg))
            assert cfg.out_dir not in made and (not parent or parent in made), words       # in an order that works
            made.add(cfg.out_dir)
        else:
            command, *rest = words
            named = {option: rest[rest.index(option) + 1] for option in ('--out', '--claims') if option in rest}
            runs = [word for word in rest if word.startswith('out/')]
            rows = {re.sub(r'_seed.$', '', Path(run).name) for run in runs}
            assert script == 'eval.py' and named['--out'].startswith(f'results/{question}/')
            assert rows <= {re.sub(r'_seed\d$', '', Path(folder).name) for folder in made}, words
            if command == 'table':
                tables += 1
                for line in Path(named['--claims']).read_text().splitlines():
                    terms = re.split(r'\s(?:<|~[\d.]+)\s', line.partition('|')[0].partition(':')[2].strip())
                    assert len(terms) > 1 and line.partition('|')[2].strip(), line
                    assert {eval.TERM.fullmatch(term.strip())[2] for term in terms} <= rows, line
    assert tables and made
