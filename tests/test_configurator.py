"""The configurator: what it takes, what it refuses, and that nothing in a config ever runs."""
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import configurator
from configurator import ConfigError, load

SCRIPT = '''
raise SystemExit('the script must be read, not run')
@dataclass
class Config:
    """The knobs."""
    # --- model -------------------------------------------------
    hidden_size: int = 192            # width C
    out_dir: str = 'out'              # a # in a comment
    # --- data --------------------------------------------------
    train_data: dict = field(default_factory=dict)   # {source: weight}
    paths: list = field(default_factory=list)
    val_data: dict = field(default_factory=lambda: {'docs': 1})
    # --- schedule ----------------------------------------------
    learning_rate: float = 3e-4
    warmup: float = 0
    max_steps: int = 5 * 1000         # optimizer steps
    compile: bool = False
'''
DEFAULTS = dict(hidden_size=192, out_dir='out', train_data={}, paths=[], val_data={'docs': 1},
    learning_rate=3e-4,
                warmup=0.0, max_steps=5000, compile=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'train.py').write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text, *argv, name='config/x.py'):
    Path(name).write_text(text)
    return load('train.py', [name, *argv])


def problems(*argv):
    with pytest.raises(ConfigError) as error:
        load('train.py', list(argv))
    return str(error.value).split('\n')


def file_problems(text, *argv):
    Path('config/x.py').write_text(text)
    return problems('config/x.py', *argv)


def test_knobs_come_from_the_source(folder):
    block = configurator.knobs('train.py')
    assert {name: knob.default for name, knob in block.items()} == DEFAULTS
    assert block['hidden_size'] == ('hidden_size', 'int', 192, 'width C', 'model')
    assert block['out_dir'].comment == 'a # in a comment'
    assert block['max_steps'].group == 'schedule' and type(block['warmup'].default) is float
    assert load('train.py', []) == (DEFAULTS, dict.fromkeys(DEFAULTS, 'default'))


def test_help_shows_groups_defaults_and_comments(folder):
    text = configurator.help_text('train.py')
    for piece in ('# --- model', 'hidden_size: int = 192            # width C', 'compile: bool = False',
        'The knobs.'):
        assert piece in text
    assert 'SystemExit' not in text


@pytest.mark.parametrize('text, name, value', [
    ('max_steps = 3', 'max_steps', 3), ('max_steps = 1e3', 'max_steps', 1000),
    ('learning_rate = 1', 'learning_rate', 1.0),
    ('max_steps = 5 * 1024 + 2**3 - 7 // 2 - 9 % 5', 'max_steps', 5121),
    ('learning_rate = 1 / 4', 'learning_rate', 0.25),
    ('hidden_size = -(-3)', 'hidden_size', 3), ('warmup = +2', 'warmup', 2.0),
    ('compile = True', 'compile', True),
    ('compile = true', 'compile', True), ("paths = ('a', ['b', ('c',)], 1)", 'paths', ['a', ['b', ['c']], 1]),
    ("train_data = {'a': 1/2, 'b': {'c': [None, -1.5]}}", 'train_data', {'a': 0.5, 'b': {'c': [None, -1.5]}}),
    ("_n = 10\n_m = _n * 2\nmax_steps = _m + _n", 'max_steps', 30),
    ("hidden_size = 8\nmax_steps = hidden_size * 3", 'max_steps', 24),
    ("'''doc'''\n# note\nout_dir = 'a' 'b'", 'out_dir', 'ab'),
    ("_p = 'a'\npaths = [_p, _p]", 'paths', ['a', 'a']),
])
def test_files_take_literals_arithmetic_and_names(folder, text, name, value):
    values, origin = read(text)
    assert values[name] == value and type(values[name]) is type(value)
    assert origin[name] == f'config/x.py:{text.count(chr(10)) + 1}'
    assert set(values) == set(DEFAULTS)                                # no `_n` gets through


@pytest.mark.parametrize('argv, name, value', [
    (['--max_steps=7'], 'max_steps', 7), (['--max_steps', '7'], 'max_steps', 7),
    (['--max_steps=1e3'], 'max_steps', 1000),
    (['--max_steps', '-7'], 'max_steps', -7), (['--warmup=3'], 'warmup', 3.0),
    (['--compile'], 'compile', True),
    (['--compile', 'false'], 'compile', False), (['--compile=true'], 'compile', True),
    (['--compile=False'], 'compile', False),
    (['--compile', '--warmup=3'], 'compile', True), (['--out_dir=a=b'], 'out_dir', 'a=b'),
    (['--out_dir', 'a b'], 'out_dir', 'a b'),
    (['--out_dir="q"'], 'out_dir', 'q'), (['--out_dir='], 'out_dir', ''), (['--out_dir=3'], 'out_dir', '3'),
    (['--out_dir=C:\\new'], 'out_dir', 'C:\\new'),
    (["--train_data={'a': 0.5, 'b=c': 1}"], 'train_data', {'a': 0.5, 'b=c': 1}),
    (['--paths=["x", "y"]'], 'paths', ['x', 'y']), (['--paths', '[]'], 'paths', []),
    (['--max_steps=1', '--max_steps=2'], 'max_steps', 2),
])
def test_command_line(folder, argv, name, value):
    values, origin = load('train.py', argv)
    assert values[name] == value and type(values[name]) is type(value) and origin[name] == f'--{name}'


def test_a_flag_leaves_the_config_file_alone(folder):
    assert read('max_steps = 3', '--compile')[0]['compile'] is True
    values, _ = load('train.py', ['--compile', 'config/x.py'])
    assert values['compile'] is True and values['max_steps'] == 3


def test_later_wins(folder):
    Path('config/base.py').write_text("_n = 4\nhidden_size = 1\nmax_steps = _n\nwarmup = 5")
    Path('config/second.py').write_text("warmup = 9")
    text = "base = 'config/base.py'\nhidden_size = max_steps * _n\nout_dir = 'file'"
    values, origin = read(text, 'config/second.py', '--out_dir=line')
    assert (values['hidden_size'], values['max_steps'], values['warmup'], values['out_dir']) == (16, 4, 9.0,
        'line')
    assert [origin[k] for k in ('hidden_size', 'max_steps', 'warmup', 'out_dir', 'paths')] == [
        'config/x.py:2', 'config/base.py:3', 'config/second.py:1', '--out_dir', 'default']
    # an option wins over a file named after it, and a child over a base named below
    assert load('train.py', ['--warmup=1', 'config/second.py'])[0]['warmup'] == 1.0
    assert read("warmup = 2\nbase = 'config/base.py'")[0]['warmup'] == 2.0


def test_base_is_found_beside_the_file_and_from_any_folder(folder, monkeypatch):
    Path('config/base.py').write_text('max_steps = 11')
    assert read("base = 'base.py'")[0]['max_steps'] == 11
    (folder / 'elsewhere').mkdir()
    monkeypatch.chdir(folder / 'elsewhere')
    assert load('../train.py', ['config/x.py'])[0]['max_steps'] == 11  # beside the script


def test_base_circle_and_missing_base(folder):
    Path('config/a.py').write_text("base = 'b.py'")
    Path('config/b.py').write_text("base = 'a.py'")
    found = problems('config/a.py')
    assert len(found) == 1 and 'a.py -> b.py -> a.py' in found[0] and 'config/b.py:1' in found[0]
    [missing] = file_problems("base = 'aa.py'")
    assert missing.startswith('config/x.py:1: ') and str(Path('config/a.py')) in missing.split('near it')[1]
    [wrong] = file_problems("base = ['a.py']")
    assert 'base takes str' in wrong


@pytest.mark.parametrize('line', [
    "import os", "from os import system", "open('ran', 'w')", "warmup = __import__('os').system('touch ran')",
    "warmup = (1).real", "out_dir = f'{open(\"ran\", \"w\")}'", "paths = [x for x in (1, 2)]",
    "warmup = lambda: 1",
    "warmup += 1", "warmup: float = 1", "warmup = max_steps = 1", "warmup, max_steps = 1, 2",
    "paths = [*(1, 2)]",
    "train_data = {**{'a': 1}}", "paths = {1, 2}", "warmup = 1 if True else 2", "warmup = 3 and 4",
    "warmup = 1 < 2",
    "warmup = (_x := 3)", "out_dir = paths[0]", "out_dir = b'x'", "warmup = 1j", "out_dir = ...",
    "del warmup", "if 1: warmup = 2",
    "def f(): pass", "class A: pass", "exec('1')", "paths[0] = 1", "warmup = ~1", "warmup = 1 << 2",
    "warmup = not 1", "pass",
    "out_dir = 'a' * 3", "out_dir = 'a' + 'b'", "out_dir = '%s' % 3", "warmup = True + 1", "warmup = -True",
    "warmup = undefined",
    "warmup = 1 / 0", "train_data = {'a': 1, 'a': 2}", "train_data = {[1]: 2}", "warmup = (-1) ** 0.5",
    "warmup = 1e999",
    "max_steps = 10 ** 10 ** 10", "max_steps = 9 ** 9 ** 9 % 2", "max_steps = 2 ** 1024 ** 9",
    "learning_rate = 1e308 * 10",
    "max_steps = 0x" + 'f' * 9000, "max_steps = " + '9' * 5000, "warmup = (", "warmup = '\\x00",
    "warmup = " + '-' * 3000 + '1',
    "warmup = " + '1+' * 9000 + '1', "paths = " + '[' * 150 + ']' * 150 + ' + 1',
    "out_dir = '" + 'x' * 40000 + "'", "\x00",
    "# " + 'x' * 70000,
])
def test_anything_else_is_refused_with_its_place_and_not_run(folder, line):
    found = file_problems('\n' + line)
    assert len(found) == 1 and re.match(r'config/x\.py:[12]: ', found[0]), found
    assert len(found[0]) < 300 and not Path('ran').exists()


def test_doubling_lists_cannot_fill_memory(folder):
    text = "_a = ['x', 'x']\n" + ''.join(f"_{c} = [_{p}, _{p}]\n" for p,
        c in zip('abcdefghijklmnopqrst', 'bcdefghijklmnopqrstu'))
    assert 'longer than' in file_problems(text)[0]


@pytest.mark.parametrize('line, message', [
    ("batch = '12'", 'unknown key'), ("hidden_size = '12'", "hidden_size takes int, found '12', str"),
    ("hidden_size = 1.5", 'found 1.5, float'), ("hidden_size = True", 'found True, bool'),
    ("warmup = true", 'found True, bool'),
    ("compile = 1", 'compile takes bool (true or false)'), ("compile = 'true'", 'found'),
    ("out_dir = 3", 'out_dir takes str'),
    ("out_dir = None", 'NoneType'), ("train_data = ['a']", 'takes dict'), ("paths = {'a': 1}", 'takes list'),
    ("hidden_size = 1e31", 'larger than'),
])
def test_wrong_types(folder, line, message):
    [found] = file_problems(line)
    assert found.startswith('config/x.py:1: ') and message in found


@pytest.mark.parametrize('argv, message', [
    (['--max_steps=x'], "--max_steps: 'x' is not assigned"), (['--max_steps=1.5'], 'found 1.5'),
    (['--max_steps'], '--max_steps'),
    (['--out_dir'], 'out_dir takes str'), (['--out_dir', '--compile'], 'out_dir takes str'),
    (['--max_steps='], '--max_steps'),
    (['--compile=0'], '(true or false)'), (['--compile=yes'], '--compile'),
    (['--learnng_rate=3'], "'learning_rate'"),
    (['--learning-rate', '3'], "'learning_rate'"), (['--_n=3'], 'unknown key'),
    (['--base=config/x.py'], 'unknown key'),
    (['--paths=a,b'], '--paths'), (['--paths=[hidden_size]'], 'not assigned'),
    (['--train_data={'], '--train_data'),
    (['--warmup=nan'], '--warmup'), (['--max_steps=__import__("os")'], 'refused'), (['-x'], '-x'),
    (['--'], 'unknown key'),
])
def test_command_line_problems(folder, argv, message):
    found = problems(*argv)
    assert len(found) == 1 and message in found[0], found


def test_the_nearest_key_is_named_with_the_place(folder):
    [found] = file_problems('\nlearing_rate = 1e-3')
    assert found.startswith("config/x.py:2: unknown key 'learing_rate'; did you mean 'learning_rate'?")
    [found] = file_problems('n = 3')         # a helper name needs its `_`: a typo would pass otherwise
    assert "unknown key 'n'" in found


def test_the_same_key_twice_in_one_file(folder):
    [found] = file_problems('warmup = 1\n\nwarmup = 2')
    assert found.startswith("config/x.py:3: 'warmup'") and 'line 1' in found
    assert len(file_problems('warmup = 1; warmup = 2')) == 1 and len(file_problems('_a = 1\n_a = 2')) == 1


def test_all_problems_at_once(folder):
    Path('config/base.py').write_text("max_step = 3\nimport os")
    found = file_problems("base = 'base.py'\nhidden_size = 'a'\nwarmup = f()", 'config/none.py', '--sed=3',
        '--compile=3')
    assert [line.split(': ')[0] for line in found] == [
        'config/base.py:1', 'config/base.py:2', 'config/x.py:2', 'config/x.py:3',
        found[4].split(': ')[0], '--sed', '--compile'] and 'config/none.py' in found[4]


def test_a_missing_file_says_where_and_what_is_near(folder):
    Path('config/rewarm_docs.py').write_text('')
    [found] = problems('config/rewarm_doc.py')
    assert str(folder / 'config/rewarm_doc.py') in found
    assert str(Path('config/rewarm_docs.py')) in found.split('near it')[1]
    assert len(problems('config')) == 1 and len(problems('a\x00b')) == 1 and len(problems('x' * 5000)) == 1


def test_values_are_fresh_each_time(folder):
    load('train.py', [])[0]['val_data']['docs'] = 5
    assert load('train.py', [])[0]['val_data'] == {'docs': 1}


def test_render_marks_what_changed(folder):
    lines = configurator.render(*read('max_steps = 3', '--compile')).split('\n')
    assert len(lines) == len(DEFAULTS)
    assert [line.split() for line in lines if '#' in line] == [['max_steps', '=', '3', '#', 'config/x.py:1'],
                                                              ['compile', '=', 'True', '#', '--compile']]


PIECES = st.sampled_from(['warmup', 'max_steps', 'paths', '_a', 'base', ' = ', '=', '\n', '\n_a = ', '1',
    '2.5', '1e9', "'x'",
                          "'config/x.py'", '[', ']', '(', ')', '{', '}', ':', ',', '**', '*', '/', '%', '//',
                          '-', '+', 'true',
                          'import os', 'f()', 'lambda: 0', '\t', '\\', '#', '"', '\x00', '\ufeff', '_a', 'é',
                          '\x0c', '\r'])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(PIECES, max_size=25).map(''.join) | st.text(max_size=60) | st.binary(max_size=40),
       argv=st.lists(st.text(max_size=12) | st.builds('--{}={}'.format, st.sampled_from(list(DEFAULTS)),
                                                     st.lists(PIECES, max_size=8).map(''.join)), max_size=3))
def test_nothing_but_config_error(folder, text, argv):
    Path('config/x.py').write_bytes(text if isinstance(text, bytes) else text.encode('utf-8',
        'surrogatepass'))
    try:
        values, origin = load('train.py', ['config/x.py', *argv])
    except ConfigError as error:
        assert str(error)
    else:
        assert all(type(values[name]) is type(default) for name, default in DEFAULTS.items())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=st.integers(-99, 99), b=st.integers(1, 99), op=st.sampled_from(['+', '-', '*', '/', '//', '%']),
    c=st.integers(0, 5))
def test_arithmetic_is_that_of_python(folder, a, b, op, c):
    text = f'({a} {op} {b}) ** {c} - -{b}'
    assert read(f'learning_rate = {text}')[0]['learning_rate'] == float(eval(text))
