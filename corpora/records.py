"""From files to records: which files are read, in which pieces, and what each kind contains.

A record is a text (a str), or a row with fields (a dict) of which one will be the text. What cannot
be used is a BadDocument, and the reading goes on after it.
"""
import codecs
import glob
import gzip
import io
import itertools
import json
import math
import os
import re
import textwrap
import zlib
from collections import Counter

from configurator import require
from corpora.shards import in_groups
from corpora.tokenizer import BadDocument, import_optional

GROUP_BYTES = 4 * 2**20         # size of the files in a group, or a thousandth of all if more
KINDS = dict.fromkeys('.txt .md .rst .tex .org .py .pyx .c .h .cc .cpp .hpp .cu .cs .java .kt '
                      '.scala .js .ts .go .rs .swift .rb .php .pl .lua .r .jl .hs .ml .sh .sql'
                      .split(), 'text')
KINDS |= {'.jsonl': 'lines', '.json': 'lines', '.ndjson': 'lines', '.parquet': 'parquet',
          '.arrow': 'arrow'}
READABLE = ('Readable are .jsonl and .json with an object a line, .parquet, .arrow (a dataset of '
            'Hugging Face), and .txt, .md, .py, .c and other plain text with a document a file. '
            'Text and lines are UTF-8 (else: --encoding), and may be packed as .gz or .zst.')


# --- which files ---------------------------------------------------------------------------------

def list_files(patterns):
    """([readable file] of files, folders and globs, in order, each once; {ending: number} of those
    that are passed over)."""
    found, others = {}, set()
    for pattern in map(str, patterns):
        paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        require(paths, f'{pattern}: there is no such file or folder.')
        files = []
        for path in paths:
            files += files_in(path)
        readable = [file for file in files if kind_of(file)]
        endings = ', '.join(sorted({ending_of(file) for file in files}))
        require(readable, f'no readable file found in {pattern}'
                f'{f" (only {endings})" if endings else ""}. {READABLE}')
        found |= {os.path.realpath(file): file for file in readable}
        others |= set(files) - set(readable)

    def numbers_as_numbers(file):                               # so that 2.txt comes before 10.txt
        return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', file)]
    return sorted(found.values(), key=numbers_as_numbers), Counter(map(ending_of, others))


# what save_to_disk() of Hugging Face's datasets writes beside the .arrow files
DATASET_NOTES = {'dataset_dict.json', 'dataset_info.json', 'state.json'}


def files_in(path):
    """The files in a folder at any depth, but nothing hidden. Links to folders are not followed."""
    if not os.path.isdir(path):
        return [path]
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith('.')]
        if 'dataset_dict.json' in names or any(name.endswith('.arrow') for name in names):
            names = set(names) - DATASET_NOTES
        files += [os.path.join(folder, name) for name in names if not name.startswith('.')]
    return files


def ending_of(file):
    """'.pdf', or '.tar.gz' of compressed files."""
    name = os.path.basename(file).lower()
    plain = name.removesuffix('.gz').removesuffix('.zst')
    return os.path.splitext(plain)[1] + name[len(plain):] or 'no ending'


def kind_of(file):
    """'text', 'lines' (of JSON), 'parquet' or 'arrow', by the ending; None for others."""
    ending = ending_of(file)
    kind = KINDS.get(ending.removesuffix('.gz').removesuffix('.zst'))
    return None if kind in ('parquet', 'arrow') and ending not in KINDS else kind


def group_files(files, options):
    """Groups of neighbouring files, each read at a time: [[(file, start, end), ...], ...].

    Large files are cut into pieces where that is possible. To a piece belong the lines, or the row
    groups of Parquet, that begin between these two bytes.
    """
    sizes = [os.path.getsize(file) for file in files]
    limit = max(GROUP_BYTES, sum(sizes) // 1000)
    to_cut = {'.parquet'}
    if not is_wide(options['encoding']):
        to_cut |= {'.jsonl', '.json', '.ndjson'}
    pieces = []
    for file, size in zip(files, sizes):
        number = max(1, math.ceil(size / limit)) if ending_of(file) in to_cut else 1
        cuts = [size * i // number for i in range(number + 1)]
        pieces += [(file, start, end) for start, end in zip(cuts, cuts[1:])]
    return in_groups(pieces, [end - start for _, start, end in pieces], limit)


# --- from a piece of a file to records -----------------------------------------------------------

def records(piece, options):
    """Yield (place, record) of everything in a piece. A record may be a BadDocument."""
    file, start, end = piece
    if end == os.path.getsize(file):
        end = math.inf                                          # it may be longer when unpacked
    kind, number = kind_of(file), 0

    def place(number):
        if start and kind == 'lines':
            return f'{file}: line {number} after byte {start:,}'
        return f'{file}:{number}'
    try:
        for number, record in READERS[kind](file, start, end, options):
            yield place(number), record
    except BadDocument as problem:                              # it is about the whole file
        if start == 0:
            yield place(1), problem
    except (EOFError, OSError, ValueError, NotImplementedError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:          # the file is not to blame
            raise
        problem = str(error).partition('\n')[0]
        yield place(number + 1), BadDocument(f'rest of a damaged file ({problem})')


def read_text(file, start, end, options):
    """Yield (number, text) of the whole file, or of the documents that --cut makes of it."""
    with open_text(file, options) as f:
        if not options['cut']:
            yield 1, decode(f.read(options['longest'] + 1), options)
            return
        # A document is so many bytes, and what then is left of the line.
        for number in itertools.count(1):
            raw = f.read(options['cut'])
            raw += f.readline(options['longest'])
            if not raw:
                break
            yield number, or_problem(decode, raw, options)


def read_lines(file, start, end, options):
    """Yield (number, row) of the lines that begin between two bytes.

    Lines that are too long are read in parts, which bounds the memory.
    """
    with open_text(file, options) as f:
        number, is_start, position = 1, True, start
        if start:
            # The line that contains the byte before belongs to the piece before.
            f.seek(start - 1)
            number, is_start, position = 0, False, start - 1
        newline = '\n' if isinstance(f, io.TextIOBase) else b'\n'
        while position < end:
            line = f.readline(options['longest'] + 1)
            if not line:
                break
            if is_start and line.strip():
                yield number, or_problem(row_of_line, line, options)
            position += len(line)
            is_start = line.endswith(newline)
            number += is_start


def read_parquet(file, start, end, options):
    """Yield (number, row). A value is no longer than its row group, which bounds the memory."""
    table = import_optional('pyarrow.parquet').ParquetFile(file)
    size, all_groups = os.path.getsize(file), range(table.num_row_groups)
    sizes = [table.metadata.row_group(i).total_byte_size for i in all_groups]
    counts = [table.metadata.row_group(i).num_rows for i in all_groups]
    rows = max(1, min(256, options['longest'] // max([*sizes, 1])))

    # A row group begins about where it would if all were equally long.
    groups = [i for i in all_groups if start <= size * i // len(all_groups) < end]
    if groups:
        names = table.schema_arrow.names
        batches = table.iter_batches(rows, groups, columns=wanted_columns(names, options))
        yield from enumerate(rows_of(batches, names, options), 1 + sum(counts[:groups[0]]))


def read_arrow(file, start, end, options):
    """Yield (number, row) of a dataset of Hugging Face, or of another Arrow file."""
    ipc = import_optional('pyarrow.ipc')
    with import_optional('pyarrow').memory_map(file) as f:
        is_stream = f.read(6) != b'ARROW1'
        f.seek(0)
        table = ipc.open_stream(f) if is_stream else ipc.open_file(f)
        batches = table if is_stream else map(table.get_batch, range(table.num_record_batches))
        names = table.schema.names
        batches = (batch.select(wanted_columns(names, options)) for batch in batches)
        yield from enumerate(rows_of(batches, names, options), 1)


READERS = {'text': read_text, 'lines': read_lines, 'parquet': read_parquet, 'arrow': read_arrow}


# --- tables --------------------------------------------------------------------------------------

def wanted_columns(names, options):
    """Of the columns of a table, those that the options ask for."""
    fields = [options['text_field'], options['by'] or '', *(field for field, _ in options['where'])]
    wanted = {field.split('.')[0] for field in fields}
    return [name for name in names if name in wanted]


def rows_of(batches, names, options):
    """Yield each row of batches of a table, as a dict of all columns: None for what is not read."""
    for batch in batches:
        for i in range(len(batch)):
            try:
                (row,) = batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                yield BadDocument('not UTF-8')
            else:
                yield dict.fromkeys(names) | row


# --- text and lines ------------------------------------------------------------------------------

def is_wide(encoding):
    """Whether it writes letters of English in two bytes or four."""
    return encoding.startswith(('utf-16', 'utf-32'))


def wide_encoding(head):
    """The encoding of a file in UTF-16 or UTF-32, by its first bytes; '' for other files."""
    marks = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
             codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return encoding
    # Without such a mark, every second byte of English is zero.
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(head) >= 8 and odd > len(head) / 4 and even < odd / 10:
        return 'utf-16-le'
    if len(head) >= 8 and even > len(head) / 4 and odd < even / 10:
        return 'utf-16-be'
    return ''


# how a JSON file begins that has not an object a line
ARRAY = re.compile(rb'(\xef\xbb\xbf)?\s*\[')
INDENTED = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*\n')


def open_text(file, options):
    """The file unpacked: its bytes, or its text if the options say that it is UTF-16 or UTF-32.

    BadDocument when it is such a file and they do not say so, or JSON without an object a line.
    """
    f = open_bytes(file)
    head = f.peek(4096)[:4096]
    wide = wide_encoding(head)
    if wide and options['encoding'] == wide:
        return io.TextIOWrapper(f, wide, newline='\n')
    if wide:
        raise BadDocument(f'{wide}, not UTF-8 (add --encoding {wide})')
    if kind_of(file) == 'lines' and ARRAY.match(head):
        raise BadDocument("a JSON array, not an object a line (make lines of it: jq -c '.[]' FILE "
                          '> FILE.jsonl)')
    if kind_of(file) == 'lines' and INDENTED.match(head):
        raise BadDocument('JSON over several lines, not an object a line (make lines of it: '
                          'jq -c . FILE > FILE.jsonl)')
    return f


def open_bytes(file):
    if file.lower().endswith('.gz'):
        return gzip.open(file, 'rb')
    if file.lower().endswith('.zst'):
        # pyarrow reports a truncated file, which the package zstandard does not.
        return io.BufferedReader(import_optional('pyarrow').input_stream(file, compression='zstd'))
    return open(file, 'rb')


def decode(raw, options):
    """The text of bytes: they are UTF-8, or else what --encoding says."""
    if len(raw) > options['longest']:
        raise too_long(options)
    if isinstance(raw, str):
        return raw.removeprefix('\ufeff')
    for encoding in ('utf-8', options['encoding']):
        try:
            return raw.decode(encoding).removeprefix('\ufeff')
        except UnicodeDecodeError:
            pass
    if options['encoding'] != 'utf-8':
        raise BadDocument(f'neither UTF-8 nor {options["encoding"]}')
    raise BadDocument('not UTF-8, perhaps Latin-1 (then add --encoding cp1252)')


def row_of_line(line, options):
    text = decode(line, options)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise BadDocument('not JSON') from None
    if not isinstance(row, dict):
        raise BadDocument('not a JSON object')
    return row


def or_problem(function, *args):
    """What a function returns, or the BadDocument that it raises."""
    try:
        return function(*args)
    except BadDocument as problem:
        return problem


def too_long(options):
    most = options['longest'] / 2**20
    return BadDocument(f'longer than {most:g} MiB (--longest MIB allows more, --cut KIB cuts plain '
                       'text)')


def field_of(row, path, hint=''):
    """row['meta']['set'] for the path 'meta.set'. Metadata may be JSON in a string."""
    found = row
    for key in path.split('.'):
        try:
            found = json.loads(found) if isinstance(found, str) else found
            found = found[key]
        except (ValueError, LookupError, TypeError, RecursionError):
            names = ', '.join(found) if isinstance(found, dict) else 'none'
            detail = textwrap.shorten(f'contains the fields: {names}', 200)
            raise BadDocument(f'no field {path}{hint}', detail) from None
    return found
