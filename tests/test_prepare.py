"""data.py prepare: corpora to shards. The same for any number of workers, after a kill, and in any packing."""
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data
from data import DataError, open_shard, prepare_files

SETS = ('RedPajamaCommonCrawl', 'RedPajamaC4', 'RedPajamaStackExchange')


def make_texts(n, seed=0, words=60):
    draw = random.Random(seed)
    some = ('so', 'warm', 'Größe', '再び', 'x = 1\n', '😀')
    return [' '.join(draw.choices(some, k=draw.randint(1, words))) + f' {seed}.{i}' for i in range(n)]


def rows(texts):
    return [{'text': text, 'meta': {'redpajama_set_name': SETS[len(text) % 3]}} for text in texts]


def write(path, rows):
    lines = [json.dumps(row, ensure_ascii=i % 2 > 0) + '\n' for i, row in enumerate(rows)]
    path.write_text(''.join(lines), encoding='utf-8')
    return str(path)


def hash_of(text):
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), 'little')


def documents(folder, split='train'):
    """The documents of byte shards, in order."""
    ids = [open_shard(file).read(0, open_shard(file).count) for file in sorted(folder.glob(f'{split}_*.bin'))]
    ids = np.concatenate([*ids, np.empty(0, np.uint16)])
    return [data.BYTES.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == 256) + 1) if len(part)]


def content(folder):
    """{file: bytes} of a folder of sources."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


def cli(*args, cwd, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / 'data.py'), 'prepare', *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, **kwargs)


@pytest.fixture
def small_blocks(monkeypatch):
    """So that small files make many; only of this process, that is, for workers=1."""
    monkeypatch.setattr(data, 'BLOCK', 2000)


@pytest.fixture(scope='module')
def big(tmp_path_factory):
    """10 blocks of .jsonl, and what an unbroken run with two workers makes of it: (folder, arguments, content)."""
    folder = tmp_path_factory.mktemp('big')
    write(folder / 'a2.jsonl', rows(make_texts(2500, 1, words=1200)))
    write(folder / 'a10.jsonl', rows(make_texts(2500, 2, words=1200)))
    args = ['slim', 'a2.jsonl', 'a10.jsonl', '--by=meta.redpajama_set_name', '--shard_tokens=600000', '--val=0.01']
    run = cli(*args, '--workers=2', cwd=folder)
    assert run.returncode == 0, run.stderr
    made = content(folder / 'data')
    os.rename(folder / 'data', folder / 'whole')
    return folder, args, made


def test_shards_do_not_depend_on_the_workers(big):
    folder, args, made = big
    for workers in (1, 3):
        assert cli(*args, f'--workers={workers}', f'--data_dir=w{workers}', cwd=folder).returncode == 0
        assert content(folder / f'w{workers}') == made
    texts = rows(make_texts(2500, 1, words=1200) + make_texts(2500, 2, words=1200))
    for name in ('commoncrawl', 'c4', 'stackexchange'):         # in the order of the input, each on its hash's side
        own = [row['text'] for row in texts if row['meta']['redpajama_set_name'].lower() == f'redpajama{name}']
        held = {text for text in own if hash_of(text) < 2 ** 64 * 0.01}
        assert documents(folder / 'whole' / f'slim_{name}') == [t for t in own if t not in held]
        assert documents(folder / 'whole' / f'slim_{name}', 'val') == [t for t in own if t in held]
        told = summary(folder / 'whole' / f'slim_{name}')
        assert told['splits']['train']['documents'] + told['splits']['val']['documents'] == len(own)
        for split, n in told['splits'].items():
            shards = [open_shard(f) for f in sorted((folder / 'whole' / f'slim_{name}').glob(f'{split}_*.bin'))]
            assert n['tokens'] == sum(s.count for s in shards) and n['bytes'] == sum(s.text_bytes for s in shards)
            assert n['shards'] == len(shards) and (split == 'val' or len(shards) > 3)
            assert n['bytes_per_token'] == n['bytes'] / n['tokens'] and all(s.eot == 256 for s in shards)


@pytest.mark.parametrize('workers', [1, 2])
def test_killed_and_resumed(big, workers):
    """kill -9, at random times; with the journal kept at every block, most of them in the midst of something."""
    folder, args, made = big
    seed = random.randrange(2 ** 32)
    print(f'seed {seed}')
    draw, target = random.Random(seed), folder / f'killed{workers}'
    code = (f'import sys, time; sys.path.insert(0, {str(ROOT)!r}); import data; now = iter(range(10**9));'
            'data.time.time = lambda: 10 * next(now); data.main()')     # every block is 5 seconds later than the last
    command = [sys.executable, '-c', code, 'prepare', *args, f'--workers={workers}', f'--data_dir={target}']
    journal, kills = target / '.slim.prepare' / 'journal.json', 0
    for _ in range(3):                                          # a moment after the first journal that it writes
        run = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = journal.exists() and journal.stat().st_mtime_ns
        while run.poll() is None and (not journal.exists() or journal.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        run.kill()
        if run.wait() == 0:
            break
        kills += 1
        if len(list(target.glob('slim*'))) == 3:                # between the last rename and the end
            data.shutil.rmtree(journal.parent, ignore_errors=True)
            break
        assert not list(target.glob('slim*')) or json.loads(journal.read_text())['done']
    else:
        assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    assert kills and content(target) == made


def test_killed_at_every_write(tmp_path, small_blocks, monkeypatch):
    """An error at any write, sync or rename, as a kill would: the same call goes on, and the result is the same."""
    file = write(tmp_path / 'a.jsonl', rows(make_texts(60)))
    kwargs = dict(shard_tokens=3000, val=0.2, by='meta.redpajama_set_name', workers=1)
    prepare_files('x', [file], tmp_path / 'whole', **kwargs)
    clock, left, calls = iter(range(10 ** 9)), [0], [0]
    monkeypatch.setattr(data.time, 'time', lambda: 10 * next(clock))

    class Killed(BaseException):
        pass

    def dying(real):
        def call(*args, **kwargs):
            left[0], calls[0] = left[0] - 1, calls[0] + 1
            if left[0] == 0:
                raise Killed
            return real(*args, **kwargs)
        return call
    monkeypatch.setattr(os, 'fsync', dying(os.fsync))
    monkeypatch.setattr(os, 'replace', dying(os.replace))
    monkeypatch.setattr(Path, 'rename', dying(Path.rename))
    for at in range(1, 400, 7):
        left[0], target = at, tmp_path / f'at{at}'
        try:
            prepare_files('x', [file], target, **kwargs)
            break
        except Killed:
            for part in target.glob('.x.prepare/*/*.part'):     # what lies beyond the journal is not to be trusted
                part.write_bytes(part.read_bytes() + b'torn')
            prepare_files('x', [file], target, **kwargs)
        assert content(target) == content(tmp_path / 'whole')
    assert at > 50                                              # there were so many places to die at


def test_other_packings_hold_the_same(tmp_path):
    pyarrow, zstandard = pytest.importorskip('pyarrow'), pytest.importorskip('zstandard')
    import pyarrow.parquet
    table = rows(make_texts(3000))
    raw = Path(write(tmp_path / 'a.jsonl', table)).read_bytes()
    half = len(raw) // 2                                        # frames end within a line, and may be of any number
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(raw[:half]) + gzip.compress(raw[half:]))
    frames = [zstandard.ZstdCompressor().compress(raw[i:i + half // 3]) for i in range(0, len(raw), half // 3)]
    (tmp_path / 'a.jsonl.zst').write_bytes(b''.join(frames))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / 'a.parquet', row_group_size=700)
    as_string = [{**row, 'meta': json.dumps(row['meta']), 'other': b'\xff'} for row in table]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_string), tmp_path / 'b.parquet')
    (tmp_path / 'texts').mkdir()
    for i, row in enumerate(table[:300]):
        (tmp_path / 'texts' / f'{i}.txt').write_text(row['text'], encoding='utf-8', newline='')
    for name in ('a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet', 'b.parquet'):
        prepare_files('x', [tmp_path / name], tmp_path / f'of_{name}', by='meta.redpajama_set_name', workers=1)
        for slug in ('c4', 'commoncrawl', 'stackexchange'):
            for split in ('train', 'val'):
                shard = f'x_{slug}/{split}_00000.bin'
                assert (tmp_path / f'of_{name}' / shard).read_bytes() == (tmp_path / 'of_a.jsonl' / shard).read_bytes()
    prepare_files('t', [tmp_path / 'texts'], tmp_path, val=0)       # 2.txt before 10.txt
    assert documents(tmp_path / 't') == [row['text'] for row in table[:300]]


def test_files_folders_and_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('b/2.txt', 'b/10.txt', 'a.jsonl', 'readme.md', '[x]/1.txt', 'c.jsonl.zst.part'):
        name = f'raw/{name}'
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"text": "a"}')
    everything = (['raw/[x]/1.txt', 'raw/a.jsonl', 'raw/b/2.txt', 'raw/b/10.txt'], 2)
    assert data.list_files(['raw']) == data.list_files(['raw', 'raw/b', 'raw/a.jsonl']) == everything
    assert data.list_files(['raw/*/*.txt']) == ([f for f in everything[0] if 'txt' in f], 0)
    assert data.list_files(['raw/**/1*.txt']) == (['raw/[x]/1.txt', 'raw/b/10.txt'], 0)
    for pattern in ('raw/readme.md', 'raw/none*', 'none.txt'):
        with pytest.raises(DataError, match='not a file, folder or glob'):
            data.list_files([pattern])


BAD = [(b'{"text": "cut', 'not JSON'), (b'{"title": "x"}', 'no text'), (b'{"text": 5}', 'text is no string'),
       (b'{"text": "\\ud800"}', 'half of a surrogate pair'), (b'["x"]', 'no text'), (b'{"text": " \\n"}', 'empty'),
       (b'{"text": "\xff\xfe"}', 'not UTF-8'), (b'{"text": "a\\u0000b"}', 'NUL byte'), (b'\0\0', 'not JSON'),
       (b'[' * 100_000, 'not JSON'), (b'null', 'no text'), (b'{"text": ["a"]}', 'text is no string')]


def test_what_is_wrong_is_counted_and_shown(tmp_path, small_blocks, capsys):
    lines = [json.dumps({'text': t}).encode() for t in make_texts(200)]
    for i, (line, _) in enumerate(BAD):
        lines.insert(15 * i + 3, line)
    (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join([*lines, b'', b'']))     # as some editors do
    (tmp_path / 'latin.txt').write_bytes(b'Gr\xf6\xdfe')
    (tmp_path / 'none.txt').write_bytes(b'')
    prepare_files('x', [tmp_path], tmp_path / 'data', val=0)
    assert documents(tmp_path / 'data' / 'x') == make_texts(200)
    skipped = summary(tmp_path / 'data' / 'x')['skipped']
    assert skipped == {'not JSON': 3, 'no text': 3, 'text is no string': 2, 'half of a surrogate pair': 1, 'empty': 2,
                       'not UTF-8': 2, 'NUL byte': 1}
    out = capsys.readouterr().out
    for i, (_, kind) in enumerate(BAD):
        assert f'a.jsonl:{15 * i + 4}: {kind}' in out
    assert 'latin.txt:1: not UTF-8' in out and 'none.txt:1: empty' in out


@pytest.mark.parametrize('bad, kind', BAD)
def test_strict_stops_at_the_first(tmp_path, bad, kind):
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": "fine"}\n' + bad + b'\n{"text": 5}')
    with pytest.raises(DataError, match=rf'a.jsonl:2: {kind}'):
        prepare_files('x', [tmp_path / 'a.jsonl'], tmp_path, strict=True)
    assert not (tmp_path / 'x').exists()
    prepare_files('x', [tmp_path / 'a.jsonl'], tmp_path, val=0)
    assert documents(tmp_path / 'x') == ['fine']


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.jsonl.zst', '.txt'])
def test_documents_too_long(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(data, 'LONGEST', 5000)
    monkeypatch.setattr(data, 'BLOCK', 1000)
    zstandard = pytest.importorskip('zstandard')
    pack = {'.gz': gzip.compress, 'zst': zstandard.compress}.get(suffix[-3:], bytes)
    texts = (b'a' * 10, b'b' * 4900, b'a' * 90_000, b'b' * 5001, b'a' * 30)
    raw = b''.join(b'{"text": "%s"}\n' % text for text in texts)
    (tmp_path / f'a{suffix}').write_bytes(pack(raw))
    (tmp_path / 'z.txt').write_text('fine')
    prepare_files('x', [tmp_path], tmp_path / 'data', val=0, workers=1)
    lines = [] if suffix == '.txt' else ['a' * 10, 'b' * 4900, 'a' * 30]
    assert documents(tmp_path / 'data' / 'x') == [*lines, 'fine']
    assert list(summary(tmp_path / 'data' / 'x')['skipped'].values()) == [1 if suffix == '.txt' else 2]


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
@pytest.mark.parametrize('damage', ['cut', 'garbled', 'empty'])
def test_damaged_files_keep_what_can_be_read(tmp_path, suffix, damage, capsys):
    compress = gzip.compress if suffix == '.gz' else pytest.importorskip('zstandard').compress
    lines = [json.dumps({'text': t}).encode() for t in make_texts(20_000, random.randrange(1000))]
    packed = compress(b'\n'.join(lines[:10_000]) + b'\n') + compress(b'\n'.join(lines[10_000:]))
    middle = len(packed) * 3 // 4
    packed = {'cut': packed[:middle], 'garbled': packed[:middle] + bytes(1000) + packed[middle + 1000:],
              'empty': b'\0'}[damage]
    (tmp_path / f'a.jsonl{suffix}').write_bytes(packed)
    write(tmp_path / 'b.jsonl', rows(['fine']))
    prepare_files('x', [tmp_path], tmp_path / 'data', val=0)
    found = documents(tmp_path / 'data' / 'x')
    whole = 10_000 if (damage, suffix) == ('garbled', '.gz') else len(found) - 1    # gzip checks at the end of a frame
    assert found[:whole] == [json.loads(line)['text'] for line in lines[:whole]] and found[-1] == 'fine'
    assert len(found) > 10_000 or damage == 'empty'
    assert summary(tmp_path / 'data' / 'x')['skipped'].popitem() and f'a.jsonl{suffix}:' in capsys.readouterr().out


def test_damaged_parquet(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a'], 'n': [1]}), tmp_path / 'a.parquet')
    for field, expected in (('body', "no column 'body'; it has text, n"), ('n', 'none to train on')):
        with pytest.raises(DataError, match=expected):
            prepare_files('x', [tmp_path / 'a.parquet'], tmp_path, text_field=field)
    os.truncate(tmp_path / 'a.parquet', 100)
    with pytest.raises(DataError, match='none to train on'):
        prepare_files('y', [tmp_path / 'a.parquet'], tmp_path)


def test_where_and_fields(tmp_path):
    table = [{'body': {'text': f'{i}'}, 'meta': {'set': 'abc'[i % 3], 'year': 2000 + i % 2}} for i in range(60)]
    file = write(tmp_path / 'a.jsonl', [*table, {'body': {'text': 'no meta'}}])
    prepare_files('x', [file], tmp_path, text_field='body.text', where=['meta.set=a,b', 'meta.year=2001'], val=0)
    assert documents(tmp_path / 'x') == [str(i) for i in range(60) if i % 3 < 2 and i % 2]
    assert summary(tmp_path / 'x')['skipped'] == {'no meta.set': 1, 'left out by --where': 40}
    run = cli('y', file, '--text_field', 'body.text', '--where', 'meta.set=a,b', '--where', 'meta.year=2001', '--val', 0,
              cwd=tmp_path)
    assert run.returncode == 0 and documents(tmp_path / 'data/y') == documents(tmp_path / 'x')
    run = cli('z', file, '--where', 'meta.set', cwd=tmp_path)
    assert run.returncode == 2 and '--where meta.set: expected FIELD=VALUE' in run.stderr


def test_validation_files_and_documents_of_others(tmp_path):
    """What is held out, here or for another source, is in nobody's train split."""
    texts = make_texts(300)
    write(tmp_path / 'val.jsonl', rows(texts[:50]))
    write(tmp_path / 'train.jsonl', rows(texts[30:200]))
    write(tmp_path / 'other.jsonl', rows(texts[100:]))
    prepare_files('pile', [tmp_path], tmp_path / 'data', val_files=[tmp_path / 'v*.jsonl', ], workers=1)
    pile = tmp_path / 'data' / 'pile'
    assert documents(pile, 'val') == texts[:50]
    assert sorted(documents(pile)) == sorted(texts[100:] + texts[50:200])       # its own copies are its own affair
    assert summary(pile)['skipped'] == {'equal to a validation document': 20}
    assert np.load(pile / 'val_hashes.npy').tolist() == sorted(map(hash_of, texts[:50]))
    write(tmp_path / 'slim.jsonl', rows(texts[:250]))
    prepare_files('slim', [tmp_path / 'slim.jsonl'], tmp_path / 'data', keep_out=['pile'], val=0.3)
    slim = tmp_path / 'data' / 'slim'
    held = set(documents(slim, 'val'))
    assert 40 < len(held) < 110 and sorted(documents(slim)) == sorted(set(texts[50:250]) - held)
    assert summary(slim)['skipped'] == {'equal to a validation document': len(set(texts[:50]) - held)}
    with pytest.raises(DataError, match='--keep_out none: .*none has no val_hashes.npy'):
        prepare_files('x', [tmp_path / 'slim.jsonl'], tmp_path / 'data', keep_out=['none'])


@pytest.mark.parametrize('eot, first, last', [('append', 0x61, 256), ('prepend', 256, 0x62), ('none', 0x61, 0x62)])
def test_end_of_text(tmp_path, eot, first, last):
    write(tmp_path / 'a.jsonl', rows(['a<|endoftext|>b'] * 3))
    prepare_files('x', [tmp_path / 'a.jsonl'], tmp_path, eot=eot, val=0)
    shard = open_shard(tmp_path / 'x' / 'train_00000.bin')
    ids = shard.read(0, shard.count)
    assert (ids[0], ids[-1], (ids == 256).sum()) == (first, last, 3 * (eot != 'none'))
    assert shard.eot == (None if eot == 'none' else 256) and summary(tmp_path / 'x')['eot'] == eot


def test_max_tokens(tmp_path, small_blocks):
    texts = make_texts(400)
    file = write(tmp_path / 'a.jsonl', rows(texts))
    prepare_files('all', [file], tmp_path, workers=1)
    prepare_files('some', [file], tmp_path, max_tokens=5000, workers=1)
    train = documents(tmp_path / 'some')
    assert train == documents(tmp_path / 'all')[:len(train)]
    sizes = np.cumsum([len(t.encode()) + 1 for t in train])
    assert sizes[-2] < 5000 <= sizes[-1]


def test_the_tokenizer_stays_beside_the_shards(tmp_path):
    tokenizers = pytest.importorskip('test_tokenizers')
    tokenizers.train(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{}')
    texts = make_texts(200)
    prepare_files('x', [write(tmp_path / 'a.jsonl', rows(texts))], tmp_path / 'data', tokenizer=str(tmp_path), val=0)
    folder = tmp_path / 'data' / 'x'
    shard = open_shard(folder / 'train_00000.bin')
    own = data.find_tokenizer(data.tokenizer_name(shard), [folder])
    assert own.name == summary(folder)['tokenizer'] and own.name.startswith('bpe-')
    assert own.decode(shard.read(0, shard.count)) == ''.join(f'{text}{data.END}' for text in texts)
    assert (folder / 'tokenizer_config.json').read_text() == '{}' and shard.vocab_size == own.vocab_size
    run = subprocess.run([sys.executable, str(ROOT / 'data.py'), 'info', str(folder / 'train_00000.bin')],
                         capture_output=True, text=True, encoding='utf-8', env={**os.environ, 'PYTHONUTF8': '1'})
    assert f'tokenizer {own.name}' in run.stdout and texts[0] in run.stdout


def test_another_command_in_between(tmp_path, small_blocks):
    files = [write(tmp_path / f'{name}.jsonl', rows(make_texts(50))) for name in 'ab']
    bad = tmp_path / 'c.jsonl'
    bad.write_text('?')

    def start(**kwargs):
        with pytest.MonkeyPatch.context() as patch:
            clock = iter(range(10 ** 9))
            patch.setattr(data.time, 'time', lambda: 10 * next(clock))
            prepare_files('x', [*files, bad], tmp_path, **{'strict': True, 'workers': 1, **kwargs})
    with pytest.raises(DataError, match='not JSON'):
        start()
    for change, expected in (({'val': 0.5}, 'val = 0.05, now 0.5'), ({'eot': 'none'}, 'eot = append, now none'),
                             ({'shard_tokens': 7}, 'shard_tokens = 100000000, now 7'),
                             ({'by': 'meta'}, 'by = None, now meta')):
        with pytest.raises(DataError, match=f'unfinished prepare with {expected}.*rm -r'):
            start(**change)
    write(Path(files[1]), rows(['changed']))
    with pytest.raises(DataError, match='inputs = .*b.jsonl.* now .*b.jsonl'):
        start(strict=False)
    data.shutil.rmtree(tmp_path / '.x.prepare')
    start(strict=False)
    assert (tmp_path / 'x').exists() and not (tmp_path / '.x.prepare').exists()
    with pytest.raises(DataError, match='x exists'):
        start()


def test_two_at_once(tmp_path):
    file = write(tmp_path / 'a.jsonl', rows(make_texts(5)))
    with data._held(tmp_path / '.x.prepare'), pytest.raises(DataError, match='in use by another prepare'):
        prepare_files('x', [file], tmp_path)
    prepare_files('x', [file], tmp_path, val=0)


def test_a_full_disk(big):
    """Here: a limit on the size of a file. One message, nothing to be seen, and the same command goes on."""
    folder, args, made = big

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    run = cli(*args, '--workers=1', '--data_dir=full', cwd=folder, preexec_fn=limit)
    assert run.returncode == 2 and 'File too large' in run.stderr
    assert 'make room, and the same command goes on' in run.stderr
    assert len(run.stderr.strip().splitlines()[-1]) < 400 and os.listdir(folder / 'full') == ['.slim.prepare']
    assert cli(*args, '--workers=1', '--data_dir=full', cwd=folder).returncode == 0
    assert content(folder / 'full') == made


def test_memory_stays_flat(tmp_path):
    """The most that any of the processes held, over twice as much text: the same, but for noise."""
    if not os.path.exists('/proc/self/status'):
        pytest.skip('reads the peak from /proc')                # getrusage starts with that of the parent
    code = (f'import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import data; data.main();'
            'own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"));'
            'print(own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    line = json.dumps({'text': 'some words, over and over ' * 150}) + '\n'
    peaks = []
    for size in (8_000, 16_000):                                # 32 and 64 MB
        (tmp_path / f'{size}.jsonl').write_text(line * size)
        args = ['prepare', f'x{size}', f'{size}.jsonl', '--workers=2', '--val=0']
        run = subprocess.run([sys.executable, '-c', code, *args], cwd=tmp_path, capture_output=True, text=True)
        peaks.append(int(run.stdout.split()[-1]))
    assert peaks[1] < peaks[0] * 1.15, peaks


@pytest.mark.parametrize('args, expected', [
    (['docs', '--val=0.1'], '--val is for files'), (['x', 'a.txt', '--by=meta'], 'a.txt: a .txt has no fields'),
    (['x', 'a.jsonl', '--tokenizer=none.json'], "expected 'bytes', 'gpt2'"), (['x', 'a.jsonl', '--val=2'], 'val = 2'),
    (['x', 'a.jsonl', '--by=n'], 'more than 200 values'), (['x', 'a.jsonl', '--text_field=body'], 'none to train on'),
])
def test_what_cannot_be_asked_for(tmp_path, args, expected):
    write(tmp_path / 'a.jsonl', [{'text': str(i), 'n': i} for i in range(300)])
    (tmp_path / 'a.txt').write_text('x')
    run = cli(*args, cwd=tmp_path)
    assert run.returncode == 2 and expected in run.stderr and run.stderr.count('data.py:') == 1
    assert not list(tmp_path.glob('data/[!.]*'))
