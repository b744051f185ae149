"""Built-in corpora, made from the Python installation itself: no network and no files are needed.

    docs        English: docstrings of Python, numpy and torch, and pydoc's help topics
    code        Python: the standard library's sources without comments and docstrings
    maths       English: docstrings of sympy, networkx, matplotlib and mpmath, without the doctests
    examples    those doctests: questions and answers

Parts of these are sources too, and are named by a path:

    docs/1of3       a third of the documents of docs, at random; also docs/2of3 and docs/3of3
    maths/sympy     one package of maths; also maths/networkx and maths/matplotlib

The sources are parsed, never imported. Their text depends on the versions of Python and of the
packages. A corpus is built when it is first needed, or by: python -m corpora.prepare docs
"""
import ast
import gc
import importlib.util
import inspect
import itertools
import os
import re
import sysconfig
import time
import tokenize
import warnings
from hashlib import blake2b
from pathlib import Path

from tqdm import tqdm

from configurator import UserError, require
from corpora.shards import read_documents, worker_pool, write_corpus, write_splits

MATHS = ('sympy', 'networkx', 'matplotlib', 'mpmath')           # torch and matplotlib need them
TOPICS = os.path.join('pydoc_data', 'topics.py')                # the texts of help('LAMBDAS') etc.


def make(names, data_dir, paths):
    """Build those of the sources that are embedded, unless `paths` says where they are."""
    for name in sorted(names):
        if name in EMBEDDED and f'{name}/train' not in paths:
            build(name, data_dir)


def build(name, data_dir='data', *, files=None, workers=None):
    """Build an embedded corpus in data_dir/name unless it is there; return its folder.

    A part lies inside of the folder of its corpus, so the whole corpus is built first. The shards
    are the same for any number of workers. files: sources to read instead of the packages' own.
    """
    folder = Path(data_dir, name)
    if folder.exists():
        require(any(folder.glob('train*.bin')) and any(folder.glob('val*.bin')), f'{folder} '
                'exists, but it has no train or no val shards. Move it away and try again.')
        return folder
    whole, _, part = name.partition('/')
    if part:
        build(whole, data_dir, files=files, workers=workers)

    # Say what is made, as this may take a minute, and a log file shows no progress bar.
    start = time.monotonic()
    try:
        if THIRD.fullmatch(part):
            print(f'{name}: choosing from the documents of {whole} ...', flush=True)
            write_splits(third_of(whole, part, data_dir), name, data_dir, {'part_of': whole})
        else:
            extract, packages = EMBEDDED[name]
            files = files or [file for package in packages for file in python_files(package)]
            print(f'{name}: reading {len(files):,} files of {", ".join(packages)} ...', flush=True)
            write_corpus(extract_all(name, extract, files, workers), name, data_dir)
    except (UserError, OSError):
        if not folder.exists():                                 # another process may have built it
            raise
    print(f'{name}: built in {time.monotonic() - start:.0f} s', flush=True)
    return folder


def extract_all(name, extract, files, workers):
    """The documents in the files, in their order and without copies."""
    jobs = [(extract, file) for file in files]
    with worker_pool(workers or min(os.cpu_count(), 8)) as run:
        found = list(tqdm(run(documents_of, jobs), desc=name, total=len(jobs),
                          unit=' files', disable=None))
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def python_files(package):
    """The sorted .py files of an installed package, or of the standard library ('python')."""
    if package == 'python':
        root = Path(sysconfig.get_path('stdlib'))
    else:
        found = importlib.util.find_spec(package)
        require(found, f'{package}, from whose text this corpus is made, is not installed. '
                       f'Run: pip install {package}')
        root = Path(found.origin).parent
    # Installed packages may lie inside the standard library's folder.
    installed = {'site-packages', 'dist-packages'}
    return sorted(str(file) for file in root.rglob('*.py')
                  if not installed & set(file.relative_to(root).parts))


def documents_of(job):
    """In a worker: the documents that `extract` finds in a file; none if it is not valid Python."""
    extract, file = job
    warnings.simplefilter('ignore')                             # about old escapes in strings
    # Syntax trees contain no cycles. To look for some would double the time.
    gc.disable()
    try:
        with tokenize.open(file) as f:                          # knows the declared encoding
            return extract(file, f.read())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    finally:
        gc.enable()


THIRD = re.compile('([123])of3')


def third_of(whole, part, data_dir):
    """Yield (split, text) of the documents in a third of a corpus that is there. A hash decides.

    What the corpus holds out for validation, its thirds hold out too.
    """
    for split in ('train', 'val'):
        for text in read_documents(whole, split, data_dir):
            digest = blake2b(text.encode(), digest_size=8, person=b'part').digest()
            if digest[0] % 3 == int(part[0]) - 1:
                yield split, text


# --- what to extract from a file: functions (file, source) -> [document] --------------------------

def docstrings(body):
    """Every bare string among the statements of `body`, at any depth, in the order of the file."""
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, 'value', None), str):
            yield node
        for field in ('body', 'handlers', 'orelse', 'finalbody', 'cases'):
            inner = getattr(node, field, None)
            if isinstance(inner, list):
                yield from docstrings(inner)


def docs_of(file, source):
    """English: the docstrings of more than 80 characters, or pydoc's help topics."""
    body = ast.parse(source).body
    if file.endswith(TOPICS):
        texts = ast.literal_eval(body[-1].value).values()
    else:
        texts = [inspect.cleandoc(node.value.value) for node in docstrings(body)]
    return [text for text in texts if len(text) > 80]


# A doctest, up to an empty line.
EXAMPLE = re.compile(r'^[ \t]*>>> .*\n?(?:[ \t]*\S.*\n?)*', re.MULTILINE)


def prose_of(file, source):
    """English: what docs_of finds, without the doctests."""
    texts = [EXAMPLE.sub('', text) for text in docs_of(file, source)]
    texts = [re.sub(r'\n{3,}', '\n\n', text).strip() for text in texts]
    return [text for text in texts if len(text) > 80]


def examples_of(file, source):
    """Questions and answers: the doctests of each docstring, without the prose."""
    texts = [''.join(EXAMPLE.findall(text)).strip() for text in docs_of(file, source)]
    return [text for text in texts if len(text) > 80]


# Strings are matched too, because a # in a string does not start a comment.
STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"""' r"|'''(?:\\.|[^\\])*?'''"
    r'|"(?:\\.|[^"\\\n])*"' r"|'(?:\\.|[^'\\\n])*'" r'|#[^\n]*'.encode(), re.DOTALL)


def code_of(file, source):
    """Python: the source without comments and docstrings, if more than 500 characters are left."""
    # Work on bytes, because ast gives columns in bytes.
    text = source.encode('utf-8')
    line_starts = [0] + [match.end() for match in re.finditer(b'\n', text)]
    cuts = [match.span() for match in STRING_OR_COMMENT.finditer(text) if match[0][:1] == b'#']
    for node in docstrings(ast.parse(source).body):
        cuts.append((line_starts[node.lineno - 1] + node.col_offset,
                     line_starts[node.end_lineno - 1] + node.end_col_offset))

    kept, position = [], 0
    for start, end in sorted(cuts):
        # Cut the blanks before it too, and the newline if it has the line for itself.
        before = text[text.rfind(b'\n', 0, start) + 1:start]
        start -= len(before) - len(before.rstrip(b' \t'))
        if not before.strip() and text[end:end + 1] == b'\n':
            end += 1
        kept.append(text[position:start])
        position = max(position, end)
    code = b''.join([*kept, text[position:]]).decode('utf-8')
    return [code] if len(code) > 500 and not file.endswith(TOPICS) else []


EMBEDDED = {'docs': (docs_of, ('python', 'numpy', 'torch')),    # the old data of most configs
            'code': (code_of, ('python',)),                     # far from docs: a strong shift
            'maths': (prose_of, MATHS),                         # near docs: a weak shift
            'examples': (examples_of, MATHS)}                   # few and valuable
EMBEDDED |= {f'docs/{i}of3': EMBEDDED['docs'] for i in (1, 2, 3)}
EMBEDDED |= {f'maths/{package}': (prose_of, (package,)) for package in MATHS[:3]}
