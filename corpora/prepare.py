"""Text files to token shards.

    python -m corpora.prepare docs                      # a built-in corpus (see embedded.py)
    python -m corpora.prepare mine notes.txt articles/  # your text, to data/mine
    python -m corpora.prepare slimpajama raw/slim --tokenizer weights/pythia-410m \\
        --by meta.redpajama_set_name                    # to data/slimpajama/c4, .../arxiv, ...

Neighbouring files, or pieces of a large one, form groups. Each group is a job of its own, and what
a finished job has made is kept: an interrupted command continues when it is run again, and the
shards are the same for any number of workers. Everything happens in the hidden folder
data/.NAME.partial and is renamed at the end: training never sees half a corpus.
From Python: prepare(name, files), and write_corpus(texts, name) for texts in memory.
"""
import argparse
import codecs
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError, require
from corpora import embedded
from corpora.records import (READABLE, field_of, group_files, kind_of, list_files, records,
                             too_long)
from corpora.shards import (ShardWriter, flat, hash_of, join_pieces, split_of, worker_pool,
                            write_summary)
from corpora.tokenizer import BadDocument, load_tokenizer
from support.files import write_whole

# Documents that are left out because the command says so, or because nothing is lost.
NOT_CHOSEN, COPY, EMPTY = 'other values than --where', 'copy of a validation document', 'empty'


def prepare(name, inputs, data_dir='data', *, tokenizer='bytes', eot='append', val=None,
            val_files=(), text_field='text', where=(), by=None, encoding='utf-8', cut=0, longest=64,
            workers=None, allow_left_out=False):
    """Turn files, folders and globs into data_dir/name, or with `by` into data_dir/name/VALUE.

    `python -m corpora.prepare --help` explains the arguments.
    """
    if val is None:
        val = 0 if val_files else 0.05
    require(all(re.fullmatch(r'\w[\w.-]*', part) for part in name.split('/')), f'{name!r} cannot '
            'be the name of a corpus. Use letters, digits, dots, - and _, and / before a part.')
    require(0 <= val < 1, f'--val is a share of the documents, from 0 to below 1, not {val}.')
    require(0 <= cut <= 2**20, f'--cut is a number of KiB up to {2**20}, not {cut}.')
    require(0 < longest <= 1024, f'--longest is a number of MiB up to 1024, not {longest}.')
    conditions = [re.fullmatch('([^=]+)=(.+)', words) for words in where]
    require(all(conditions), '--where needs FIELD=VALUE, for example meta.pile_set_name=Github.')
    val_files, _ = list_files(val_files)
    files, passed_over = list_files(inputs)
    files = [file for file in files if file not in val_files]

    # The settings and the files decide what is in the shards.
    options = {'name': name, 'tokenizer': tokenizer, 'eot': eot, 'val': val, 'by': by,
               'text_field': text_field, 'where': [list(match.groups()) for match in conditions],
               'encoding': encoding_name(encoding), 'cut': int(cut * 2**10),
               'longest': int(longest * 2**20)}
    settings = {**options, 'tokenizer': load_tokenizer(tokenizer).name,
                'files': describe(files), 'val_files': describe(val_files)}
    partial = Path(data_dir, f'.{flat(name)}.partial')
    if not start_or_continue(partial, data_dir, settings):
        print(f'{name} has been prepared before, with the same settings and files')
        return

    # Validation files come first, because their documents are kept out of train.
    groups, val_groups = group_files(files, options), group_files(val_files, options)
    val_numbers = range(len(groups), len(groups) + len(val_groups))
    jobs = [(i, group, partial, options, val_numbers) for i, group in enumerate(groups)]
    val_jobs = [(i, group, partial, {**options, 'val': 1}, ())
                for i, group in zip(val_numbers, val_groups)]
    workers = max(1, min(workers or os.cpu_count(), max(len(jobs), len(val_jobs))))
    size, results = sum(map(os.path.getsize, files + val_files)), []
    with (worker_pool(workers) as run,
          tqdm(total=size, unit='B', unit_scale=True, disable=None) as bar):
        for stage in (val_jobs, jobs):
            for job, result in zip(stage, run(make_pieces, stage)):
                results.append(result)
                bar.update(sum(end - start for _, start, end in job[1]))

    report(results, passed_over)
    report_large_texts(files, options)
    counts = add_up([result['counts'] for result in results])
    problem = what_is_wrong(results, counts, val, allow_left_out)
    if problem:
        write_whole(partial / 'refused', b'')
        raise UserError(f'{name}: {problem}')
    report_near_copies(partial, range(len(results)))
    publish(partial, data_dir, settings, results, counts, load_tokenizer(tokenizer))


def encoding_name(encoding):
    """The usual name of an encoding. UserError when there is none of that name."""
    try:
        'a'.encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise UserError(f'--encoding {encoding}: there is no such encoding. Common ones are '
                        'utf-8, utf-16, cp1252 (Windows), latin-1, shift_jis, gb18030.') from None


def describe(files):
    """[[name, size, time of the last change]]: when these are equal, the files are the same."""
    return [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]


def start_or_continue(partial, data_dir, settings):
    """Create the folder of a new command, or check that an interrupted one was the same command.

    False when the same command has finished. (It may have been interrupted while it cleaned up.)
    """
    path, name = partial / 'settings.json', settings['name']
    if path.exists():
        before = read_object(path)
        changed = [key for key in settings if before.get(key) != settings[key]]
        if not changed:
            return True
        # Work whose result was refused is not worth keeping.
        require((partial / 'refused').exists(), f'{partial} is the unfinished work of a command '
                f'with other {", ".join(changed)}. Run that command again to finish it, or delete '
                'the folder.')
    shutil.rmtree(partial, ignore_errors=True)

    folder = Path(data_dir, name)
    if was_made(folder, data_dir, settings):
        return False
    parts = ', '.join(sorted(path.parent.name for path in folder.glob('*/summary.json')))
    require(settings['by'] or not parts, f'{folder} already contains the parts {parts}. Choose '
            'another name, or train on all parts as one source: '
            f"--paths=\"{{'{name}/train': '{folder}/*/train*.bin'}}\"")
    require(settings['by'] or not folder.exists(),
            f'{folder} already exists. Delete it, or choose another name.')
    partial.mkdir(parents=True)
    write_whole(path, json.dumps(settings).encode())
    return True


def was_made(folder, data_dir, settings):
    """Whether the same command has finished. UserError when some of what it made is gone."""
    def made_by_it(path):
        summary = read_object(path)
        return summary if all(summary.get(key) == settings[key] for key in settings) else {}
    found = [made_by_it(path) for path in (folder / 'summary.json', *folder.glob('*/summary.json'))]
    sources = [source for summary in found for source in summary.get('sources', [])]
    missing = []
    for source in dict.fromkeys(sources):
        splits = made_by_it(Path(data_dir, source, 'summary.json')).get('splits', {})
        numbers = {split: len(list(Path(data_dir, source).glob(f'{split}_*.bin')))
                   for split in splits}
        if not splits or any(numbers[split] != splits[split]['shards'] for split in splits):
            missing.append(source)
    require(not missing, f'this command has made {", ".join(dict.fromkeys(sources))} before, but '
            f'of {", ".join(missing)} there are no longer all shards. Delete what is left in '
            f'{folder} and run it again.')
    return bool(sources)


def read_object(path):
    """The object in a JSON file; {} when it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


# --- from a group of pieces of files to tokens ---------------------------------------------------

HASHES = np.dtype([('document', '<u8'), ('opening', '<u8'), ('is_val', '?')])


def make_pieces(job):
    """In a worker: write the tokens of a group. Returns what they contain and what was left out.

    job: number of the group, its pieces of files, folder to write to, options, and the numbers of
    the groups whose documents are kept out of train. A group of validation files has val = 1.
    """
    number, pieces, partial, options, val_numbers = job
    done = partial / f'{number:05d}.json'
    result = read_object(done)                                  # from an earlier run
    if result:
        return result

    tokenizer = load_tokenizer(options['tokenizer'])
    held_out = {key for i in val_numbers for key in read_hashes(partial, i)['document'].tolist()}
    writers, hashes, left_out, files, windows = {}, [], {}, {}, 0
    for piece in pieces:
        used = files.setdefault(piece[0], {'usable': 0, 'unusable': 0})
        for place, record in records(piece, options):
            try:
                text, raw, source = parse(record, options)
                key = hash_of(raw)
                split = split_of(key, options['val'])
                if split == 'train' and key in held_out:
                    raise BadDocument(COPY)
                stream = f'{source}/{split}'
                if stream not in writers:
                    require(len(writers) < 200, f'--by {options["by"]}: there are too many values '
                                                'to make a source of each.')
                    (partial / flat(source)).mkdir(exist_ok=True)
                    stem = partial / flat(source) / f'piece_{split}_{number:05d}'
                    writers[stream] = ShardWriter(stem, tokenizer, options['eot'])
                writers[stream].add(text, len(raw))
                hashes.append((key, hash_of(opening_of(text)), split == 'val'))
                windows += b'\r\n' in raw
                used['usable'] += 1
            except BadDocument as problem:
                used['usable' if str(problem) in (NOT_CHOSEN, COPY, EMPTY) else 'unusable'] += 1
                count, places = left_out.get(str(problem), (0, []))
                places = [*places, f'{place} {problem.detail}'.rstrip()]
                left_out[str(problem)] = (count + 1, places[:3])

    for writer in writers.values():
        writer.write()
    write_whole(partial / f'{number:05d}.hashes', np.array(hashes, HASHES).tobytes())
    result = {'counts': {stream: writer.counts for stream, writer in writers.items()},
              'pieces': {stream: writer.written for stream, writer in writers.items()},
              'left_out': left_out, 'files': files, 'windows_line_ends': windows}
    write_whole(done, json.dumps(result).encode())
    return result


def read_hashes(partial, number):
    return np.fromfile(partial / f'{number:05d}.hashes', HASHES)


def opening_of(text):
    """The first 200 characters, in small letters and with single spaces, as bytes."""
    return ' '.join(text[:1000].lower().split())[:200].encode()


def parse(record, options):
    """A record -> (text, its UTF-8, name of its source). BadDocument when it cannot be used."""
    if isinstance(record, BadDocument):
        raise record
    text, row = (record, {}) if isinstance(record, str) else (None, record)
    for field, values in options['where']:
        if str(field_of(row, field)) not in values.split(','):
            raise BadDocument(NOT_CHOSEN)
    source = options['name']
    if options['by']:
        # RedPajamaArXiv becomes arxiv, and C++ becomes c++.
        value = str(field_of(row, options['by'])).lower()
        value = re.sub(r'[^\w+#]', '', value).removeprefix('redpajama')
        source = f'{source}/{value or "none"}'

    if text is None:
        text = field_of(row, options['text_field'], ' (--text_field FIELD names the right one)')
    if not isinstance(text, str):
        raise BadDocument(f'{options["text_field"]} is not a string')
    try:
        raw = text.encode('utf-8')
    except UnicodeEncodeError:
        raise BadDocument('half of a surrogate pair') from None
    if len(raw) > options['longest']:
        raise too_long(options)
    if b'\0' in raw:
        raise BadDocument('NUL byte')
    if not raw.strip():
        raise BadDocument(EMPTY)
    return text, raw, source


# --- what came out -------------------------------------------------------------------------------

def add_up(counts):
    """[{stream: {what: number}}] -> {stream: {what: number}}. A stream is like 'mine/train'."""
    total = {}
    for streams in counts:
        for stream, numbers in streams.items():
            total.setdefault(stream, Counter()).update(numbers)
    return total


def report(results, passed_over):
    """Print what was left out, and where, and what is kept as it is."""
    if passed_over:
        kinds = ', '.join(f'{number:,} {ending}' for ending, number in passed_over.most_common(9))
        print(f'{passed_over.total():,} files of other kinds were passed over: {kinds}')
    left_out, places = Counter(), {}
    for result in results:
        for problem, (number, some_places) in result['left_out'].items():
            left_out[problem] += number
            places.setdefault(problem, []).extend(some_places)
    for problem, number in left_out.items():
        print(f'{number:,} documents left out: {problem}', *places[problem][:3], sep='\n    ')
    windows = sum(result['windows_line_ends'] for result in results)
    if windows:
        print(f'{windows:,} documents have Windows line ends (CR LF), which are kept; dos2unix '
              'FILE takes them out')


LARGE_TEXT = 2**20              # bytes


def report_large_texts(files, options):
    """Print that a large file of plain text is a single document."""
    large = [file for file in files
             if kind_of(file) == 'text' and os.path.getsize(file) > LARGE_TEXT]
    if large and not options['cut']:
        print('a file of plain text is one document, which is trained on or held out as a whole; '
              f'of these, which are longer than {LARGE_TEXT // 2**20} MiB, --cut 64 would make '
              'documents of 64 KiB:', *large[:3], sep='\n    ')


def what_is_wrong(results, counts, val, allow_left_out):
    """Why the result is not worth publishing; '' when it is."""
    files = add_up([result['files'] for result in results])
    usable = sum(used['usable'] for used in files.values())
    unusable = sum(used['unusable'] for used in files.values())
    lost = sum(used['unusable'] > 0 == used['usable'] for used in files.values())
    kept = sum(numbers['documents'] for numbers in counts.values())

    if not any(stream.endswith('/train') for stream in counts):
        problem = 'there are no documents to train on: '
        if usable + unusable == 0:
            return f'{problem}the files are empty.'
        if kept < usable + unusable:
            return f'{problem}{usable + unusable - kept:,} were left out, as said above.'
        return f'{problem}all {kept:,} are held out for validation. Give more, or lower --val.'

    mend = ('as said above. Mend this, or run the same command with --allow_left_out to do without '
            'them.')
    if not allow_left_out and unusable > usable:
        return f'{unusable:,} of {usable + unusable:,} documents cannot be used, {mend}'
    if not allow_left_out and lost > len(files) / 2:
        return f'of {lost:,} of the {len(files):,} files nothing can be used, {mend}'

    if val and not any(stream.endswith('/val') for stream in counts):
        return (f'no document is held out for validation: there are only {kept:,}. Give more '
                '(--cut KIB makes several of a plain text), raise --val, or do without: --val 0.')
    return ''


def report_near_copies(partial, numbers):
    """Print that near-duplicates stay, and how many there seem to be in the validation data."""
    openings = [table['opening'][table['is_val']] for table in
                (read_hashes(partial, number) for number in numbers)]
    openings, counts = np.unique(np.concatenate(openings), return_counts=True)
    if not len(openings):
        print('near-duplicates are not removed')
        return
    # One group after the other, because the hashes of a large corpus do not fit into memory.
    is_near = np.zeros(len(openings), bool)
    for number in numbers:
        table = read_hashes(partial, number)
        train = table['opening'][~table['is_val']]
        places = np.searchsorted(openings, train).clip(max=len(openings) - 1)
        is_near[places[openings[places] == train]] = True
    print(f'near-duplicates are not removed: {counts[is_near].sum():,} of {counts.sum():,} '
          'validation documents begin like a training document (the first 200 characters, but for '
          'case and white space)')


def publish(partial, data_dir, settings, results, counts, tokenizer):
    """Join the tokens of the groups to shards, and move the finished sources to data_dir.

    If this is interrupted, the next run continues.
    """
    (partial / 'refused').unlink(missing_ok=True)
    sources = sorted({stream.rpartition('/')[0] for stream in counts})
    for source in sources:
        folder, target = partial / flat(source), Path(data_dir, source)
        if not folder.exists():                                 # moved before an interruption
            continue
        require(not target.exists(), f'{target} already exists. Move it away and run the same '
                                     'command again: the new one is ready.')
        splits = {}
        for split in ('train', 'val'):
            stream = f'{source}/{split}'
            pieces = [piece for result in results for piece in result['pieces'].get(stream, [])]
            number = join_pieces(folder, split, pieces, tokenizer, settings['eot'])
            if stream in counts:
                splits[split] = {**counts[stream], 'shards': number}
        for file in folder.iterdir():
            if file.suffix != '.bin' or file.name.startswith('piece_'):     # of a killed worker
                file.unlink()
        for name, path in tokenizer.files.items():
            shutil.copyfile(path, folder / name)
        write_summary(folder, {**settings, 'sources': sources}, splits)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    for stream, n in sorted(counts.items()):
        print(f'{stream}: {n["documents"]:,} documents, {n["bytes"]:,} bytes, {n["tokens"]:,} '
              f'tokens ({n["bytes"] / max(1, n["tokens"]):.2f} bytes each)')
    (partial / 'settings.json').unlink()                        # nothing is left to continue
    shutil.rmtree(partial)


# --- command line --------------------------------------------------------------------------------

def main(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add('name', help='of the corpus, which may be a path such as slimpajama/c4; without files: '
        f'{", ".join(embedded.EMBEDDED)}')
    add('files', nargs='*', help=f'files, folders (at any depth) and globs. {READABLE}')
    add('--data_dir', default='data')
    add('--tokenizer', default='bytes', help="'bytes', 'gpt2', a tokenizer.json or its folder")
    add('--eot', default='append', choices=('append', 'none'), help='end each document with '
        'end-of-text; none: to continue a model that was trained without it, as Pythia was')
    add('--val', type=float, help='share of the documents to hold out for validation, chosen by a '
        'hash of the text; 0.05, or 0 with --val_files')
    add('--val_files', nargs='+', default=(), help='official validation files; documents equal to '
        'one of theirs are left out of train')
    add('--text_field', default='text', help='field or column; dots lead inside: meta.text')
    add('--where', action='append', default=[], metavar='FIELD=VALUE,...', help='only documents '
        'with one of these values, as in meta.pile_set_name=Github; several: all must hold')
    add('--by', metavar='FIELD', help='a source for each value: NAME/c4, NAME/arxiv, ...')
    add('--encoding', default='utf-8', help='of text and lines that are not UTF-8, such as cp1252')
    add('--cut', type=float, default=0, metavar='KIB', help='make documents of this size, up to '
        'the end of a line, of each file of plain text; 0: a file is a document')
    add('--longest', type=float, default=64, metavar='MIB', help='longer documents and lines are '
        'left out; each worker needs several times this memory')
    add('--allow_left_out', action='store_true', help='go on when most documents, or all documents '
        'of most files, cannot be used')
    add('--workers', type=int, help='processes; default: one for each core')
    options = vars(parser.parse_intermixed_args(argv))
    name, files, data_dir = options.pop('name'), options.pop('files'), options.pop('data_dir')
    sys.stdout.reconfigure(errors='replace')            # not every terminal knows every file name
    try:
        if files:
            prepare(name, files, data_dir, **options)
            return 0
        require(name in embedded.EMBEDDED, f'name the files to make {name} from. Only '
                f'{", ".join(embedded.EMBEDDED)} need none.')
        require(all(options[key] == parser.get_default(key) for key in options),
                f'{name} is built in and takes no option but --data_dir.')
        print(embedded.build(name, data_dir))
        return 0
    except UserError as error:
        print(f'prepare: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        print(f'prepare: {error}. What is finished stays in {data_dir}. Solve this, and run the '
              'same command again to continue.', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('prepare: stopped. Run the same command again to continue.', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
