"""projects/lesson.ipynb: what the repository holds, and the same lesson on tiny data."""
import os
import re
import shutil
import sys

import pytest
from conftest import ROOT, make_documents

LESSON = ROOT / 'projects/lesson.ipynb'
TINY = ('--eval_every=4 --eval_windows=7 --hidden_size=32 --num_hidden_layers=1 --block_size=32 '
        '--num_attention_heads=2 --batch_size=4')


@pytest.fixture(scope='module')
def nbformat():
    return pytest.importorskip('nbformat', reason='it reads notebooks: pip install nbformat')


def outputs(notebook):
    """Every output of every code cell, as [[...], ...]."""
    return [cell.outputs for cell in notebook.cells if cell.cell_type == 'code']


def texts(notebook):
    return ''.join(output.get('text', '') for cell in outputs(notebook) for output in cell)


def pictures(notebook):
    return [output for cell in outputs(notebook) for output in cell
            if 'image/png' in output.get('data', {})]


def test_the_lesson_is_short_and_executed(nbformat):
    notebook = nbformat.read(LESSON, 4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 12 and LESSON.stat().st_size < 1_000_000
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(pictures(notebook)) == 3
    assert not re.search(r'Traceback|(?<!\w)/(home|root|work|tmp|usr)/', texts(notebook))


def test_what_the_lesson_says_is_what_came_out(nbformat):
    tables = texts(nbformat.read(LESSON, 4))
    rows = dict(re.findall(r'^\| (\w+) +\| 1 +\| ([\d.]+ +\| [\d.]+) ', tables, re.M))
    docs, code = ({name: float(row.split('|')[i]) for name, row in rows.items()} for i in (0, 1))
    assert docs['replay'] < docs['no_replay'] and abs(code['replay'] - code['no_replay']) < 0.05
    assert docs['constant'] < docs['no_replay'] and code['constant'] > code['no_replay']
    assert docs['replay'] < docs['constant'] and code['replay'] < code['constant']
    assert docs['release'] < docs['infinite'] and code['release'] < code['infinite']
    assert docs['release'] < docs['replay'] and code['release'] < code['replay']


def test_the_lesson_runs(nbformat, tmp_path, monkeypatch):
    nbclient = pytest.importorskip('nbclient', reason='it runs notebooks: pip install nbclient')
    pytest.importorskip('ipykernel', reason='it runs cells: pip install ipykernel')
    from corpora.shards import write_corpus
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    for name in ('config', 'corpora', 'projects', 'results', 'support'):
        shutil.copytree(ROOT / name, tmp_path / name)
    write_corpus(make_documents('abcdefghij', 1), 'docs', tmp_path / 'data', val=0.2)
    write_corpus(make_documents('KLMNOPQRST', 2), 'code', tmp_path / 'data', val=0.2)
    for name, value in (('OLD', '20'), ('NEW', '20'), ('KNOBS', TINY)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('PATH', os.path.dirname(sys.executable), prepend=os.pathsep)

    notebook = nbformat.read(LESSON, 4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3', resources={
        'metadata': {'path': str(tmp_path / 'projects')}})
    client.execute()
    assert len(pictures(notebook)) == 3 and 'Traceback' not in texts(notebook)
    assert {path.name for path in (tmp_path / 'out/lesson').iterdir() if path.is_dir()} == {
        'old', 'infinite', 'no_replay', 'replay', 'constant', 'release'}
