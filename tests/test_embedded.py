"""corpora/embedded.py and write_corpus: the corpora that every Python installation contains."""
import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from test_prepare import children_of, content, documents, wait_until

from configurator import UserError
from corpora import embedded, shards
from corpora.embedded import TOPICS, build, code_of, docs_of, examples_of, prose_of, python_files
from corpora.shards import write_corpus

LIBRARY = Path(argparse.__file__).parent
SAMPLE = '''"""Module docstring, long enough to be kept: there are over eighty characters in it."""
import os  # a comment
# a whole line of comment

def f(x):
    \'\'\'Function docstring, also long enough to be kept: there are over eighty characters.\'\'\'
    return '# no comment', "it's # none", """
# nor this"""  # but this


class A:
    "short"
    y = 'x'   # trailing
    def g(self):
        if self:
            "deep"
            return 'é#'
'''
CODE = '''import os

def f(x):
    return '# no comment', "it's # none", """
# nor this"""


class A:
    y = 'x'
    def g(self):
        if self:
            return 'é#'
'''


def test_docs_are_docstrings_and_code_is_the_rest():
    assert [text.split()[0] for text in docs_of('x.py', SAMPLE)] == ['Module', 'Function']
    filler = ''.join(f'name_{i} = {i}\n' for i in range(40))
    assert code_of('x.py', SAMPLE + filler) == [CODE + filler]
    assert code_of('x.py', SAMPLE) == []                        # too short


def test_prose_and_examples_are_apart():
    prose = ('A first paragraph, which is long enough to be kept as prose, since it has more than '
             'eighty characters.')
    examples = '>>> f(1)\n1\n>>> for i in range(2):\n...     print(i)\n0\n1'
    last = ">>> g('the last one, up to the end, with more characters than the required eighty')\n2"
    text = f'{prose}\n\n{examples}\n\n{prose}\n\n{last}'.replace('\n', '\n    ')
    source = f"def f():\n    '''{text}'''\n"
    assert prose_of('x.py', source) == [f'{prose}\n\n{prose}']
    assert examples_of('x.py', source) == [f'{examples}\n{last}']
    pytest.importorskip('networkx')
    for file in random.sample(python_files('networkx'), 15):    # each line of a doctest is in one
        source = Path(file).read_text('utf-8')
        questions, rest, whole = (
            Counter(line.strip() for text in extract(file, source) for line in text.splitlines()
                    if line.lstrip().startswith('>>> '))
            for extract in (examples_of, prose_of, docs_of))
        assert not rest and questions <= whole


def test_built_corpora(tmp_path, capsys):
    """The same files for any number of workers; without copies, and without what is not Python."""
    files = [*sorted(LIBRARY.glob('[a-c]*.py')), LIBRARY / 'queue.py', LIBRARY / TOPICS]
    copy = (LIBRARY / 'queue.py').read_text()
    for name, text in (('bad.py', 'def ('), ('copy.py', copy), ('null.py', 'x = "\0"')):
        files.append(tmp_path / name)
        files[-1].write_text(text)
    for name in ('docs', 'maths', 'docs/1of3', 'docs/2of3', 'docs/3of3', 'code'):
        one = build(name, tmp_path / '1', files=list(map(str, files)), workers=1)
        assert f'{name}: ' in capsys.readouterr().out
        texts = [text for split in ('train', 'val') for text in documents(one, split)]
        assert len(set(texts)) == len(texts)
    three = build('code', tmp_path / '3', files=list(map(str, files)), workers=3)
    assert content(one) == content(three) and 'train_00000.bin' in content(one)
    assert not any('The following sections describe' in text for text in texts)
    assert any('lambda' in text for text in documents(tmp_path / '1' / 'docs'))
    for split in ('train', 'val'):                              # three parts make the whole
        parts = [documents(tmp_path / '1' / f'docs/{i}of3', split) for i in (1, 2, 3)]
        assert sorted(sum(parts, [])) == sorted(documents(tmp_path / '1' / 'docs', split))

    before = (one / 'train_00000.bin').stat().st_mtime_ns       # what is there is not built again
    assert build('code', tmp_path / '1') == one and capsys.readouterr().out.count('\n') == 2
    assert (one / 'train_00000.bin').stat().st_mtime_ns == before
    os.remove(one / 'val_00000.bin')
    with pytest.raises(UserError, match='has no train or no val shards. Move it away'):
        build('code', tmp_path / '1')


def test_workers_end_with_their_parent(tmp_path):
    command = [sys.executable, '-m', 'corpora.prepare', 'docs', '--data_dir', tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: len(children_of(process.pid)) >= 2)
    time.sleep(random.random())
    workers = children_of(process.pid)
    process.send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))
    process.wait()
    assert wait_until(lambda: not any(Path(f'/proc/{pid}').exists() for pid in workers))
    assert not os.listdir(tmp_path)


def test_a_package_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded.importlib.util, 'find_spec', lambda package: None)
    with pytest.raises(UserError, match='sympy.* not installed. Run: pip install sympy'):
        build('maths', tmp_path)
    assert not list(tmp_path.iterdir())


def test_file_lists_are_sorted_and_of_the_library_alone():
    files = python_files('python')
    assert files == sorted(files) and len(files) > 300 and any(f.endswith(TOPICS) for f in files)
    assert not any('site-packages' in f or 'dist-packages' in f for f in files)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=50), min_size=1, max_size=40), st.integers(1, 500),
       st.randoms(use_true_random=False))
def test_write_corpus_writes_every_document_once(tmp_path_factory, texts, shard_tokens, random):
    """The split of a document depends on nothing but its text."""
    folder, texts = tmp_path_factory.mktemp('corpus'), ['anchor 1', *texts]
    shuffled = random.sample(texts, len(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, 'SHARD_TOKENS', shard_tokens)
        for name, some in (('a', texts), ('b', shuffled)):
            write_corpus(some, name, folder, val=0.3)
    train, val = documents(folder / 'a'), documents(folder / 'a', 'val')
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)
    assert sorted(train) == sorted(documents(folder / 'b'))


def test_a_failed_corpus_leaves_nothing(tmp_path):
    def texts():
        yield 'one' * 100
        raise RuntimeError('power cut')
    with pytest.raises(RuntimeError):
        write_corpus(texts(), 'a', tmp_path)
    with pytest.raises(UserError, match='no documents to train on'):
        write_corpus([], 'a', tmp_path)
    assert not os.listdir(tmp_path)
    write_corpus(['text'], 'a', tmp_path, val=0)
    with pytest.raises(UserError, match='exists'):
        write_corpus(['other'], 'a', tmp_path)
    assert documents(tmp_path / 'a') == ['text']
