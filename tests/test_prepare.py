"""corpora/prepare.py: the same shards for any number of workers, after any kill."""
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import data
from configurator import UserError
from corpora import prepare as module
from corpora import records, shards
from corpora.formats import tokenizer_hash
from corpora.prepare import list_files, prepare
from corpora.tokenizer import END, find_tokenizer, load_tokenizer

SETS = ('RedPajamaCommonCrawl', 'RedPajamaC4', 'RedPajamaStackExchange')


def make_texts(n, seed=0, words=60):
    draw = random.Random(seed)
    some = ('so', 'warm', 'Größe', '再び', 'x = 1\n', '😀')
    return [' '.join(draw.choices(some, k=draw.randint(1, words))) + f' {seed}.{i}'
            for i in range(n)]


def rows_of(texts):
    return [{'text': text, 'meta': {'set': SETS[len(text) % 3]}} for text in texts]


def write(path, rows):
    lines = [json.dumps(row, ensure_ascii=i % 2 > 0) + '\n' for i, row in enumerate(rows)]
    path.write_text(''.join(lines), encoding='utf-8')
    return path


def write_packed(path, raw, parts=1):
    """Bytes, compressed as the name says, in several parts that end anywhere."""
    size = len(raw) // parts + 1
    pieces = [raw[i * size:(i + 1) * size] for i in range(parts)]
    if path.suffix == '.gz':
        pieces = map(gzip.compress, pieces)
    if path.suffix == '.zst':
        pyarrow = pytest.importorskip('pyarrow')
        pieces = [pyarrow.compress(piece, 'zstd', asbytes=True) for piece in pieces]
    path.write_bytes(b''.join(pieces))


def write_parquet(path, rows, **options):
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(sys.modules['pyarrow'].Table.from_pylist(rows), path, **options)


def read(path):
    shard = data.open_shard(path)
    return shard, np.fromfile(path, shard.dtype, offset=shard.offset)


def documents(folder, split='train'):
    """The documents of byte shards, in order."""
    ids = [read(file)[1] for file in sorted(folder.glob(f'{split}_*.bin'))]
    ids = np.concatenate([*ids, np.empty(0, np.uint16)])
    parts = np.split(ids, np.flatnonzero(ids == 256) + 1)
    return [bytes(part[:-1].tolist()).decode() for part in parts if len(part)]


def content(folder):
    """{file: bytes} of everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob('*')) if path.is_file()}


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


# --- the same shards, whatever happens -----------------------------------------------------------

@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """12 files, and what one worker makes of them: (folder, command(data_dir), content)."""
    folder = tmp_path_factory.mktemp('many')
    for i in range(12):
        write(folder / f'{i}.jsonl', rows_of(make_texts(300, i, words=600)))

    def command(name, workers=2):
        code = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); import corpora.records as r;'
                'import corpora.prepare as p; r.GROUP_BYTES = 1_000_000;'
                'sys.exit(p.main(sys.argv[1:]))')
        return [sys.executable, '-c', code, 'x', folder, '--by=meta.set', '--val=0.02',
                f'--data_dir={folder}/.{name}', f'--workers={workers}']
    assert subprocess.run(command('one', workers=1)).returncode == 0
    return folder, command, content(folder / '.one')


def test_shards_do_not_depend_on_the_number_of_workers(many):
    folder, command, made = many
    assert subprocess.run(command('three', workers=3)).returncode == 0
    assert content(folder / '.three') == made and len(made) == 9
    rows = [row for i in range(12) for row in rows_of(make_texts(300, i, words=600))]
    for name in SETS:                                           # in the order of the files
        texts = [row['text'] for row in rows if row['meta']['set'] == name]
        hashes = [blake2b(text.encode(), digest_size=8).digest() for text in texts]
        held_out = [int.from_bytes(key, 'little') < 0.02 * 2**64 for key in hashes]
        source = folder / '.one' / 'x' / name.lower().removeprefix('redpajama')
        assert documents(source) == [text for text, out in zip(texts, held_out) if not out]
        assert documents(source, 'val') == [text for text, out in zip(texts, held_out) if out]
        for split, n in summary(source)['splits'].items():
            found = [data.open_shard(file) for file in source.glob(f'{split}_*.bin')]
            assert (n['shards'], n['tokens']) == (len(found), sum(s.count for s in found))
            assert n['bytes'] == sum(s.text_bytes for s in found) == n['tokens'] - n['documents']
            assert {(s.eot, s.tokenizer) for s in found} == {(256, tokenizer_hash('bytes'))}


def children_of(pid):
    """The processes that a process has started."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            if int(path.read_text().rpartition(')')[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:                                         # it has just ended
            pass
    return found


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT, 'worker'])
def test_killed_at_a_random_moment(many, sig):
    """Workers end with their parent, nothing is visible, and the same command continues."""
    folder, command, made = many
    target = folder / f'.{sig}'
    process = subprocess.Popen(command(sig), stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: (target / '.x.partial').exists()
                      and len(children_of(process.pid)) > 2)
    time.sleep(random.random() * (0.5 if sig == signal.SIGKILL else 0.1))
    workers = children_of(process.pid)
    os.kill(*((max(workers), signal.SIGKILL) if sig == 'worker' else (process.pid, sig)))
    _, errors = process.communicate(timeout=30)
    assert wait_until(lambda: not any(Path(f'/proc/{pid}').exists() for pid in workers))
    expected = {signal.SIGINT: (130, 'prepare: stopped. Run the same command again to continue.\n'),
                'worker': (2, 'prepare: a worker process was killed, '),
                signal.SIGKILL: (-9, '')}[sig]
    if process.returncode != 0:                                 # it may have been too fast
        assert process.returncode == expected[0] and errors.startswith(expected[1])
        assert sig == signal.SIGKILL or (errors.count('\n') == 1 and not list(target.glob('x*')))
        assert subprocess.run(command(sig)).returncode == 0
    assert content(target) == made


def test_killed_at_every_write(tmp_path, monkeypatch):
    """At any sync or rename, of which the last ones publish: the same call makes the same files."""
    files = [write(tmp_path / f'{i}.jsonl', rows_of(make_texts(30, i))) for i in range(4)]
    monkeypatch.setattr(records, 'GROUP_BYTES', 5000)
    kwargs = dict(val=0.2, by='meta.set', val_files=[files[0]], workers=1)
    prepare('x', files, tmp_path / 'whole', **kwargs)

    class Killed(BaseException):
        pass
    left = 10**9

    def dying(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return real(*args, **kwargs)
        return call
    for owner, name in ((os, 'fsync'), (os, 'replace'), (Path, 'rename'), (Path, 'unlink'),
                        (module.shutil, 'rmtree')):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for moment in range(random.randrange(1, 5), 1000, 4):
        left, target = moment, tmp_path / f'{moment}'
        try:
            prepare('x', files, target, **kwargs)
            break
        except Killed:
            prepare('x', files, target, **kwargs)
        assert content(target) == content(tmp_path / 'whole')
    assert moment > 30


def test_a_full_disk(many):
    """Here a limit on the size of a file: one message, and later the same command continues."""
    folder, command, made = many

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    done = subprocess.run(command('full'), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'File too large' in done.stderr and 'run the same command again' in done.stderr
    assert os.listdir(folder / '.full') == ['.x.partial']
    assert subprocess.run(command('full')).returncode == 0 and content(folder / '.full') == made


def test_another_command_in_between(tmp_path, monkeypatch):
    file = write(tmp_path / 'a.jsonl', rows_of(make_texts(50)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, 'report', lambda *args: signal.raise_signal(signal.SIGINT))
        prepare('x', [file], tmp_path)
    for change in ({'val': 0.5}, {'eot': 'none'}, {'by': 'meta'}):
        expected = f'unfinished work of a command with other {list(change)[0]}. Run that command'
        with pytest.raises(UserError, match=expected):
            prepare('x', [file], tmp_path, **change)
    write(file, rows_of(['changed']))
    with pytest.raises(UserError, match='other files. Run that command again to finish it, or'):
        prepare('x', [file], tmp_path)
    module.shutil.rmtree(tmp_path / '.x.partial')
    prepare('x', [file], tmp_path, val=0)
    assert documents(tmp_path / 'x') == ['changed'] and not (tmp_path / '.x.partial').exists()
    with pytest.raises(UserError, match='x already exists. Delete it, or choose another name'):
        prepare('x', [file], tmp_path)
    prepare('x', [file], tmp_path, val=0)                       # the same command: nothing to do
    assert documents(tmp_path / 'x') == ['changed']


@pytest.mark.parametrize('damaged', ['', '[]', '{}', 'null', '[' * 100_000])
def test_records_that_are_damaged(tmp_path, damaged):
    file = write(tmp_path / 'a.jsonl', rows_of(make_texts(50)))
    (tmp_path / 'x_old').mkdir()
    (tmp_path / 'x_old/summary.json').write_text(damaged)       # of another corpus
    (tmp_path / '.x.partial').mkdir()
    (tmp_path / '.x.partial/settings.json').write_text(damaged)
    with pytest.raises(UserError, match='unfinished work .* or delete the folder'):
        prepare('x', [file], tmp_path)
    module.shutil.rmtree(tmp_path / '.x.partial')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, 'report', lambda *args: signal.raise_signal(signal.SIGINT))
        prepare('x', [file], tmp_path)
    (tmp_path / '.x.partial/00000.json').write_text(damaged)    # this group is made again
    prepare('x', [file], tmp_path)
    prepare('whole', [file], tmp_path)
    assert documents(tmp_path / 'x') == documents(tmp_path / 'whole')


# --- files ---------------------------------------------------------------------------------------

def test_other_packings_contain_the_same(tmp_path):
    table = rows_of(make_texts(2000))
    raw = write(tmp_path / 'a.jsonl', table).read_bytes()
    write_packed(tmp_path / 'a.jsonl.gz', raw, parts=3)
    write_packed(tmp_path / 'a.json.zst', raw, parts=3)
    write_parquet(tmp_path / 'a.parquet', table, row_group_size=700)
    as_string = [{**row, 'meta': json.dumps(row['meta']), 'other': b'\xff'} for row in table]
    write_parquet(tmp_path / 'b.parquet', as_string)
    for name in ('a.jsonl', 'a.jsonl.gz', 'a.json.zst', 'a.parquet', 'b.parquet'):
        prepare('x', [tmp_path / name], tmp_path / f'data_{name}', by='meta.set', workers=1)
    expected = content(tmp_path / 'data_a.jsonl')
    for folder in tmp_path.glob('data_*'):
        made = content(folder)
        assert made.keys() == expected.keys() and len(made) == 9
        assert all(made[name] == expected[name] for name in made if name.endswith('.bin'))


def test_text_and_source_files_are_one_document_each(tmp_path):
    in_order = ['2.txt', '10.md', 'a/b.py', 'a/c.h.gz', 'd.C']
    for name in in_order:
        (tmp_path / 'raw' / name).parent.mkdir(exist_ok=True, parents=True)
        write_packed(tmp_path / 'raw' / name, f'Größe {name}\r\n{END}'.encode())
    prepare('t', [tmp_path / 'raw'], tmp_path, val=0)
    assert documents(tmp_path / 't') == [f'Größe {name}\r\n{END}' for name in in_order]


def test_files_folders_and_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('b/2.txt', 'b/10.txt', 'a.jsonl', '[x]/1.txt', 'c.jsonl.part', '.git/x.py',
                 'x.png'):
        Path('raw', name).parent.mkdir(parents=True, exist_ok=True)
        Path('raw', name).write_text('{"text": "a"}')
    for link, target in (('raw/self', '.'), ('raw/b/up', '..'), ('raw/copy.txt', 'b/2.txt')):
        os.symlink(target, link)                                # circles, and a file twice
    found = ['raw/[x]/1.txt', 'raw/a.jsonl', 'raw/b/2.txt', 'raw/b/10.txt']
    for patterns in (['raw'], ['./raw', 'raw/b', tmp_path / 'raw/a.jsonl']):
        files, others = list_files(patterns)
        assert sorted(map(os.path.realpath, files)) == sorted(map(os.path.realpath, found))
        assert others == {'.part': 1, '.png': 1}
    assert list_files(['raw/b/*.txt']) == (found[2:], {})
    assert list_files(['raw/?.jsonl', 'raw/[[]x]']) == (found[:2], {})
    Path('empty').mkdir()
    for pattern, expected in (('no*', 'no such file'), ('no.txt', 'no such file'),
                              ('raw/x.png', 'no readable file found in raw/x.png'),
                              ('empty', 'no readable file found in empty. Readable are .jsonl')):
        with pytest.raises(UserError, match=expected):
            list_files([pattern])


# --- what cannot be read -------------------------------------------------------------------------

NO_TEXT = 'no field text (--text_field FIELD names the right one)'
LATIN = 'not UTF-8, perhaps Latin-1 (then add --encoding cp1252)'
BAD = [(b'{"text": "cut', 'not JSON'), (b'{"title": "x"}', NO_TEXT),
       (b'["x"]', 'not a JSON object'), (b'{"text": "\\ud800"}', 'half of a surrogate pair'),
       (b'{"text": "\xff"}', LATIN), (b'{"text": "a\\u0000b"}', 'NUL byte'),
       (b'null', 'not a JSON object'), (b'{"text": " \\n"}', 'empty'), (b'[' * 100_000, 'not JSON'),
       (b'"' + b'[' * 100_000 + b'"', 'not a JSON object'), (b'\0', 'not JSON'),
       (b'{"text": 5}', 'text is not a string'), (b'9' * 6000, 'not JSON')]


def test_unusable_documents_are_counted_and_shown(tmp_path, capsys):
    lines = [json.dumps({'text': t}).encode() for t in make_texts(100)]
    for i, (line, _) in enumerate(BAD):
        lines.insert(7 * i + 3, line)
    # A byte order mark, Windows line ends and empty lines, as some editors write them.
    (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join([*lines, b'', b'']))
    (tmp_path / 'latin.txt').write_bytes(b'Gr\xf6\xdfe')
    (tmp_path / 'none.txt').write_bytes(b'')
    prepare('x', [tmp_path], tmp_path / 'data', val=0)
    assert documents(tmp_path / 'data' / 'x') == make_texts(100)
    out, shown = capsys.readouterr().out, {}
    for i, (_, problem) in enumerate(BAD):
        shown.setdefault(problem, []).append(f'{tmp_path}/a.jsonl:{7 * i + 4}')
    shown[LATIN].append(f'{tmp_path}/latin.txt:1')
    shown['empty'].append(f'{tmp_path}/none.txt:1')
    shown[NO_TEXT] = [f'{place} contains the fields: title' for place in shown[NO_TEXT]]
    for problem, places in shown.items():
        first_three = '\n    '.join(places[:3])
        assert f'{len(places)} documents left out: {problem}\n    {first_three}\n' in out


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.jsonl.zst', '.txt', '.parquet'])
def test_documents_that_are_too_long(tmp_path, suffix, capsys):
    rows = [{'text': text} for text in ('a' * 10, 'b' * 4900, 'c' * 90_000, 'd' * 5001, 'e' * 30)]
    raw = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    if suffix == '.parquet':
        write_parquet(tmp_path / 'a.parquet', rows)
    else:
        write_packed(tmp_path / f'a{suffix}', raw)
    (tmp_path / 'z.txt').write_text('fine')
    prepare('x', [tmp_path], tmp_path / 'data', val=0, longest=5000 / 2**20, allow_left_out=True)
    expected = [] if suffix == '.txt' else ['a' * 10, 'b' * 4900, 'e' * 30]
    assert documents(tmp_path / 'data' / 'x') == [*expected, 'fine']
    assert f'{2 if expected else 1} documents left out: longer than' in capsys.readouterr().out


def test_decompression_bombs_do_not_fill_the_memory(tmp_path):
    """Three files of kilobytes, which unpack to hundreds of megabytes."""
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    zeros = bytes(2**20)
    with gzip.open(tmp_path / 'a.jsonl.gz', 'wb', compresslevel=1) as f:
        f.writelines([zeros] * 150)
    with pyarrow.output_stream(str(tmp_path / 'b.txt.zst'), compression='zstd') as f:
        f.writelines([zeros] * 500)
    values = pyarrow.array(['a' * 5_000_000, 'a' * 70_000_000])
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] + [1] * 9, pyarrow.int32()), values)
    parquet.write_table(pyarrow.table({'text': column}), tmp_path / 'c.parquet', compression='zstd',
                        store_schema=False, write_statistics=False)
    code = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); from corpora.prepare import main;'
            'main(sys.argv[1:]); print([x for x in open("/proc/self/status") if "VmHWM" in x])')
    done = subprocess.run([sys.executable, '-c', code, 'x', tmp_path, f'--data_dir={tmp_path}/d',
                           '--val=0'], capture_output=True, text=True)
    assert '11 documents left out: longer than 64 MiB' in done.stdout, done.stderr
    assert int(done.stdout.split()[-2]) < 700_000               # KB


@pytest.mark.parametrize('suffix', ['.jsonl.gz', '.jsonl.zst', '.parquet'])
@pytest.mark.parametrize('damage', ['cut', 'garbled', 'empty'])
def test_damaged_files_keep_what_can_be_read(tmp_path, suffix, damage, capsys):
    texts, path = make_texts(20_000, random.randrange(1000)), tmp_path / f'a{suffix}'
    if suffix == '.parquet':
        write_parquet(path, [{'text': text} for text in texts], row_group_size=1000)
    else:
        raw = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
        write_packed(path, raw.encode(), parts=2)
    packed = path.read_bytes()
    middle = len(packed) * 3 // 4
    path.write_bytes({'cut': packed[:middle], 'empty': b'\0',
                      'garbled': packed[:middle] + bytes(1000) + packed[middle + 1000:]}[damage])
    write(tmp_path / 'b.jsonl', rows_of(['fine']))
    # what a garbled file unpacks to can be more than was in it
    prepare('x', [tmp_path], tmp_path / 'data', val=0, allow_left_out=True)
    found = documents(tmp_path / 'data' / 'x')
    assert found.pop() == 'fine' and found[:9_000] == texts[:9_000][:len(found)]
    assert len(found) >= 9_000 or damage == 'empty' or (suffix, damage) == ('.parquet', 'cut')
    assert 'left out: rest of a damaged file (' in capsys.readouterr().out


# --- options -------------------------------------------------------------------------------------

def test_where_and_fields(tmp_path, capsys):
    table = [{'body': {'text': f'{i}'}, 'meta': {'set': 'abc'[i % 3], 'year': 2000 + i % 2}}
             for i in range(60)]
    file = write(tmp_path / 'a.jsonl', [*table, {'body': {'text': 'no meta'}}])
    assert module.main(['x', '--text_field=body.text', str(file), '--where=meta.set=a,b', '--val=0',
                        '--where', 'meta.year=2001', f'--data_dir={tmp_path}']) == 0
    assert documents(tmp_path / 'x') == [str(i) for i in range(60) if i % 3 < 2 and i % 2]
    out = capsys.readouterr().out
    assert '1 documents left out: no field meta.set\n' in out
    assert '40 documents left out: other values than --where' in out


def test_documents_of_validation_files_are_kept_out_of_train(tmp_path, capsys):
    texts = make_texts(300)
    write(tmp_path / 'val.jsonl', rows_of(texts[:50]))
    write(tmp_path / 'train.jsonl', rows_of(texts[30:]))
    prepare('x', [tmp_path], tmp_path / 'data', val_files=[tmp_path / 'v*.jsonl'])
    assert documents(tmp_path / 'data' / 'x', 'val') == texts[:50]
    assert documents(tmp_path / 'data' / 'x') == texts[50:]
    assert '20 documents left out: copy of a validation document' in capsys.readouterr().out


@pytest.mark.parametrize('eot, last, ends', [('append', 256, 3), ('none', ord('b'), 0)])
def test_end_of_text(tmp_path, eot, last, ends):
    write(tmp_path / 'a.jsonl', rows_of([f'a{END}b'] * 3))
    prepare('x', [tmp_path / 'a.jsonl'], tmp_path, eot=eot, val=0)
    shard, ids = read(tmp_path / 'x' / 'train_00000.bin')
    assert (ids[-1], (ids == 256).sum()) == (last, ends)
    assert shard.eot == (256 if ends else None) and summary(tmp_path / 'x')['eot'] == eot


def test_a_large_group_makes_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'SHARD_TOKENS', 500)
    texts = make_texts(50)
    prepare('x', [write(tmp_path / 'a.jsonl', rows_of(texts))], tmp_path, val=0)
    assert documents(tmp_path / 'x') == texts                   # also in the order of the names
    names = sorted(path.name for path in tmp_path.glob('x/*.bin'))
    assert names[:2] == ['train_00000.bin', 'train_00001.bin'] and len(names) > 5


def test_the_tokenizer_stays_beside_the_shards(tmp_path, bpe):
    texts = make_texts(200)
    file = write(tmp_path / 'a.jsonl', rows_of(texts))
    prepare('x', [file], tmp_path, tokenizer=str(bpe), val=0)
    shard, ids = read(tmp_path / 'x' / 'train_00000.bin')
    own = find_tokenizer(shard.tokenizer, tmp_path / 'x')
    assert own.name == load_tokenizer(str(bpe)).name == summary(tmp_path / 'x')['tokenizer']
    assert own.decode(ids) == ''.join(f'{text}{END}' for text in texts)
    assert (shard.vocab_size, shard.eot) == (own.vocab_size, own.eot)


@pytest.mark.parametrize('args, expected', [
    (['docs', '--val=0.1'], 'docs is built in and takes no option but --data_dir'),
    (['mine'], 'name the files to make mine from. Only docs, code'),
    (['x', 'a.jsonl', '--tokenizer=none.json'], "expected 'bytes', 'gpt2'"),
    (['x', 'a.jsonl', '--val=2'], 'not 2.0'), (['../x', 'a.jsonl'], 'cannot be the name'),
    (['x', 'a.jsonl', '--where', 'meta'], '--where needs FIELD=VALUE'),
    (['x', 'a.jsonl', '--by=n'], 'too many values to make a source'),
    (['x', 'a.pdf'], 'no readable file'),
    (['x', 'a.jsonl', '--text_field=body'], 'no documents to train on'),
    (['x', 'a.jsonl', '--val=0.999999'], 'no documents to train on'),
    (['full', 'a.jsonl'], 'already exists')])
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, args, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'a.jsonl', [{'text': str(i), 'n': i} for i in range(300)])
    (tmp_path / 'a.pdf').write_text('x')
    (tmp_path / 'data' / 'full').mkdir(parents=True)
    assert module.main(args) == 2
    errors = capsys.readouterr().err
    assert expected in errors and errors.count('\n') == 1
    assert not list(tmp_path.glob('data/x*'))


# --- what users met ------------------------------------------------------------------------------

@pytest.mark.parametrize('name, raw, says', [
    ('a.json', b'[\n {"text": "a"}\n]', "a JSON array, not an object a line (make lines of it: jq"),
    ('a.json', b'{\n "text": "a"\n}', 'JSON over several lines'),
    ('a.txt', 'h\u00e9llo'.encode('utf-16'), 'add --encoding utf-16'),
    ('a.txt', 'h\u00e9llo'.encode('latin-1'), 'add --encoding cp1252'),
    ('a.jsonl', b'{"body": "x"}', 'contains the fields: body')])
def test_a_file_of_which_nothing_can_be_used_ends_with_an_error(tmp_path, capsys, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    (tmp_path / 'fine.txt').write_text('fine')
    command = ['x', str(tmp_path), f'--data_dir={tmp_path}/data', '--val=0']
    assert module.main(['x', str(tmp_path / name), *command[2:]]) == 2
    said = capsys.readouterr()
    assert says in said.out and name in said.out and 'no documents to train on' in said.err
    assert not (tmp_path / 'data' / 'x').exists()
    assert module.main(command) == 0                            # half of the files can be used
    assert documents(tmp_path / 'data' / 'x') == ['fine']


def test_an_encoding_that_is_named_is_read(tmp_path):
    (tmp_path / 'a.txt').write_bytes('Größe'.encode('cp1252'))
    (tmp_path / 'b.txt').write_bytes('Größe'.encode())          # which is UTF-8 all the same
    prepare('x', [tmp_path], tmp_path / 'data', val=0, encoding='cp1252')
    assert documents(tmp_path / 'data' / 'x') == ['Größe', 'Größe']
    with pytest.raises(UserError, match='there is no such encoding'):
        prepare('y', [tmp_path], tmp_path / 'data', encoding='utf-9')


def test_a_large_text_is_one_document_unless_it_is_cut(tmp_path, capsys):
    text, file = ''.join(f'{i} Größe\n' for i in range(100_000)) + 'the end', tmp_path / 'a.txt'
    file.write_text(text)
    assert module.main(['x', str(file), f'--data_dir={tmp_path}', '--val=0', '--longest=1']) == 2
    assert 'longer than 1 MiB (--longest MIB allows more, --cut KIB' in capsys.readouterr().out
    prepare('x', [file], tmp_path, val=0)
    assert f'--cut 64 would make documents of 64 KiB:\n    {file}\n' in capsys.readouterr().out
    assert documents(tmp_path / 'x') == [text]

    prepare('y', [file], tmp_path, val=0, cut=4)
    parts = documents(tmp_path / 'y')
    assert ''.join(parts) == text and 'one document' not in capsys.readouterr().out
    assert {len(part.encode()) // 4096 for part in parts[:-1]} == {1}
    assert all(part.endswith('\n') for part in parts[:-1])


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_a_cut_goes_on_after_what_cannot_be_used(tmp_path, encoding, capsys):
    """Of a line that is too long, no more is read at once than is allowed."""
    text = 'a' * 99 + '\nb\n' + 'c' * 3000 + '\nd'
    write_packed(tmp_path / 'a.txt.gz', text.encode(encoding))
    prepare('x', [tmp_path], tmp_path / 'data', val=0, cut=98 / 2**10, longest=1000 / 2**20,
            encoding=encoding)
    left = 3000 - (96 + 1000) - (98 + 1000)
    expected = ['a' * 99 + '\n', 'c' * left + '\n', 'd']
    assert documents(tmp_path / 'data' / 'x') == expected
    assert '2 documents left out: longer than' in capsys.readouterr().out


def test_no_worker_waits_for_torch():
    code = 'import sys, corpora.prepare; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_a_corpus_without_validation_is_made_only_when_asked_for(tmp_path):
    file = write(tmp_path / 'a.jsonl', rows_of(['anchor 1']))   # which is not held out
    with pytest.raises(UserError, match='no document is held out .* only 1. .* raise --val, or'):
        prepare('x', [file], tmp_path)
    prepare('x', [file], tmp_path, val=0)
    assert documents(tmp_path / 'x') == ['anchor 1']


def test_the_help_says_what_is_read(capsys):
    with pytest.raises(SystemExit):
        module.main(['--help'])
    said = ' '.join(capsys.readouterr().out.split())
    for words in ('an object a line', '.parquet, .arrow', 'are UTF-8 (else: --encoding)', '--cut'):
        assert words in said


def test_windows_line_ends_and_near_copies_are_said(tmp_path, capsys):
    texts = make_texts(200)
    copies = [text.replace(' ', '  ') + f'  {i}' for i, text in enumerate(texts)
              if len(text) > 200]
    write(tmp_path / 'a.jsonl', rows_of([*texts, *copies, 'a\r\nb']))
    prepare('x', [tmp_path], tmp_path / 'data', val=0.3)
    out = capsys.readouterr().out
    assert '1 documents have Windows line ends (CR LF), which are kept' in out
    assert re.search(r'near-duplicates are not removed: [1-9]\d* of \d+ validation documents begin '
                     'like a training document', out)
    prepare('y', [tmp_path], tmp_path / 'data', val=0)
    assert 'near-duplicates are not removed\n' in capsys.readouterr().out


def test_a_dataset_of_hugging_face(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    table = pyarrow.Table.from_pylist(rows_of(make_texts(50)))
    for name, open_as in (('a.arrow', pyarrow.ipc.new_file), ('b.arrow', pyarrow.ipc.new_stream)):
        with open_as(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        prepare(name[0], [tmp_path / name], tmp_path / 'data', val=0)
        assert documents(tmp_path / 'data' / name[0]) == make_texts(50)
    for note in ('dataset_info.json', 'state.json'):            # as save_to_disk() leaves them
        (tmp_path / note).write_text('{\n "features": {}\n}')
    prepare('c', [tmp_path], tmp_path / 'data', val=0)
    assert documents(tmp_path / 'data' / 'c') == make_texts(50) * 2


@pytest.mark.parametrize('gone', ['shard', 'part'])
def test_what_was_prepared_and_is_gone_is_said(tmp_path, gone):
    file = write(tmp_path / 'a.jsonl', rows_of(make_texts(300)))
    prepare('x', [file], tmp_path, by='meta.set')
    prepare('x', [file], tmp_path, by='meta.set')               # the same command: nothing to do
    folder = tmp_path / 'x' / 'c4'
    if gone == 'shard':
        (folder / 'train_00000.bin').unlink()
    else:
        module.shutil.rmtree(folder)
    with pytest.raises(UserError, match='of x/c4 there are no longer all shards'):
        prepare('x', [file], tmp_path, by='meta.set')


def test_a_kill_while_hashes_are_written_leaves_a_command_that_continues(tmp_path, monkeypatch):
    write(tmp_path / 'val.jsonl', rows_of(make_texts(50)))
    write(tmp_path / 'a.jsonl', rows_of(make_texts(100)))
    args = [[tmp_path / 'a.jsonl'], tmp_path / 'data']
    real = module.write_whole

    def kill(path, *content):
        if str(path).endswith('.hashes'):
            Path(f'{path}.rewarm-partial').write_bytes(content[0][:7])
            raise KeyboardInterrupt
        real(path, *content)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, 'write_whole', kill)
        prepare('x', *args, val_files=[tmp_path / 'val.jsonl'], workers=1)
    prepare('x', *args, val_files=[tmp_path / 'val.jsonl'], workers=1)
    assert documents(tmp_path / 'data' / 'x') == make_texts(100)[50:]
