"""Turns `train.py config/x.py --key=value` into one checked Config.

The knobs are the fields of a dataclass, with their types and defaults. A config file assigns some
of them. It looks like Python, but it is only read and never run: literals, arithmetic on numbers,
and names assigned above.

    base = 'config/other.py'            # start from the values of another file
    _tokens = 300 * 10**9               # names of your own begin with '_'
    max_steps = _tokens // (1104 * 2048)

Later wins: default < base < file < next file < --key=value. Tuples become lists, as in JSON.
"""
import ast
import dataclasses
import difflib
import inspect
import math
import operator
import os
from pathlib import Path
from typing import Literal, get_args, get_origin


class UserError(Exception):
    """Something the user can fix. The program prints the message without a traceback."""


def require(condition, message):
    if not condition:
        raise UserError(message)


# ------------------------------------------------------------------------------
# Values

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
              ast.Pow: operator.pow, ast.USub: operator.neg}
BOOLS = {'true': True, 'false': False, 'True': True, 'False': False}


def evaluate(tree, names):
    """The value of a syntax tree of literals, arithmetic and names. Nothing is executed."""
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name):
        require(tree.id in names, f'{tree.id!r} is not assigned above. A string needs quotes.')
        return names[tree.id]
    if isinstance(tree, (ast.List, ast.Tuple)):
        return [evaluate(item, names) for item in tree.elts]
    if isinstance(tree, ast.Dict) and None not in tree.keys:    # the key of `**other` is None
        keys = [evaluate(key, names) for key in tree.keys]
        require(len(set(keys)) == len(keys), f'a key appears twice in {ast.unparse(tree)}')
        return dict(zip(keys, [evaluate(value, names) for value in tree.values]))

    # arithmetic, on numbers alone
    if isinstance(tree, (ast.BinOp, ast.UnaryOp)) and type(tree.op) in OPERATIONS:
        operands = [tree.operand] if isinstance(tree, ast.UnaryOp) else [tree.left, tree.right]
        numbers = [evaluate(operand, names) for operand in operands]
        require(all(type(number) in (int, float) for number in numbers),
                f'arithmetic needs numbers: {ast.unparse(tree)}')
        if isinstance(tree.op, ast.Pow):
            math.pow(*numbers)              # refuses 9**9**9, which would take forever in integers
        value = OPERATIONS[type(tree.op)](*numbers)
        require(abs(value) < 1e300, f'{ast.unparse(tree)} is too large')
        return value

    raise UserError(f'{ast.unparse(tree)} is not allowed. A config is read and never run: use '
                    'literals, arithmetic, and names assigned above.')


EXAMPLES = {bool: 'true', int: '100', float: '0.05', str: "'docs'", list: "['docs', 'code']",
            dict: "{'docs': 1.0}"}


def typed(name, kind, value):
    """The value in a type such as float, list[str], dict[str, float] or Literal['a', 'b'].

    An int may stand for a float, and 1e3 for an int.
    """
    container, inside = get_origin(kind) or kind, get_args(kind)
    if container is object:
        return value
    if container is Literal:
        require(value in inside, f'{name} = {value!r}: expected one of '
                f'{", ".join(map(repr, inside))}.{did_you_mean(value, inside)}')
        return value
    if container is float and type(value) is int:
        return float(value)
    if container is int and type(value) is float and value.is_integer():
        return int(value)
    require(type(value) is container, f'{name} takes a value of type {container.__name__}, such as '
            f'{EXAMPLES[container]}, but found {value!r}.')
    if container is list and inside:
        return [typed(f'an item of {name}', inside[0], item) for item in value]
    if container is dict and inside:
        return {typed(f'a key of {name}', inside[0], key):
                typed(f'{name}[{key!r}]', inside[1], item) for key, item in value.items()}
    return value


def did_you_mean(value, names):
    """' Did you mean ...?' when a name is nearly right, else ''."""
    near = difflib.get_close_matches(str(value), names, n=1)
    return f' Did you mean {near[0]!r}?' if near else ''


# What parsing and evaluating a broken expression can raise.
PARSE_ERRORS = (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError)


def parse_option(text, kind):
    """The value of --key=text. Anything unreadable stays text, which `typed` refuses."""
    text = text.strip()
    if kind is str or get_origin(kind) is Literal:
        return text[1:-1] if text[:1] + text[-1:] in ("''", '""') else text
    try:
        return evaluate(ast.parse(text, mode='eval').body, BOOLS)
    except (UserError, *PARSE_ERRORS):
        return text


# ------------------------------------------------------------------------------
# Files

def find_file(name, folders):
    """The first file of that name in the folders."""
    paths = [Path(folder, name) for folder in folders]
    for path in paths:
        if os.path.isfile(path):            # also False for a name that is too long
            return path.resolve()
    candidates = [str(file) for path in paths for file in path.parent.glob('*.py')]
    near = difflib.get_close_matches(str(paths[0]), candidates, n=1)
    hint = f' Did you mean {os.path.relpath(near[0])}?' if near else ''
    raise UserError(f'there is no config file {name!r}.{hint}')


def read_file(path, opened=()):
    """A config file and its bases -> {name: (value, 'file:line')}. Names are not checked here."""
    shown, found = os.path.relpath(path), {}
    require(path not in opened, f'{shown}: the files name each other as base in a circle.')
    try:
        statements = ast.parse(path.read_bytes()).body
    except (OSError, *PARSE_ERRORS) as error:
        problem = str(error) or 'nested too deeply'             # a MemoryError says nothing
        raise UserError(f'{shown}:{getattr(error, "lineno", None) or 1}: {problem}')

    for statement in statements:
        where = f'{shown}:{statement.lineno}'
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue                                            # a docstring
        is_assignment = isinstance(statement, ast.Assign) and len(statement.targets) == 1
        require(is_assignment and isinstance(statement.targets[0], ast.Name),
                f'{where}: this line is not allowed. A config holds only lines of the form name = '
                'value.')
        name = statement.targets[0].id
        require(name not in found or found[name][1].rpartition(':')[0] != shown,
                f'{where}: {name} is assigned twice in this file.')
        try:
            value = evaluate(statement.value, BOOLS | {n: v for n, (v, _) in found.items()})
            require(is_small(value), 'there are more than 100,000 values.')
        except (UserError, *PARSE_ERRORS) as error:
            raise UserError(f'{where}: {error}')
        if name == 'base':
            require(isinstance(value, str), f'{where}: base takes the name of a config file.')
            base = read_file(find_file(value, [path.parent, *search_path()]), (*opened, path))
            found = base | found
        else:
            found.pop(name, None)           # so that the order is that of the assignments
            found[name] = value, where
    return found


def is_small(value, most=100_000):
    """Whether a value has at most so many items. Lists that name each other may have 2^24."""
    waiting = [value]
    while waiting and most > 0:
        item, most = waiting.pop(), most - 1
        waiting += item.values() if isinstance(item, dict) else item if type(item) is list else []
    return not waiting


def search_path():
    """Where config files are looked for: here, and beside this program."""
    return [Path.cwd(), Path(__file__).resolve().parent]


# ------------------------------------------------------------------------------
# The command line

def load(Config, argv):
    """Config files and options -> (Config, {knob: 'default', 'file:line' or '--key'}).

    What was assigned last comes last.

    argv is like ['config/x.py', '--key=value']; `--key value` works too, and `--key` alone means
    true. Unknown keys are listed together; otherwise the first problem is raised. Whether values
    make sense together is for the program to check.
    """
    knobs = {knob.name: knob for knob in dataclasses.fields(Config)}

    # collect what is assigned where: [(name, value, 'file:line' or '--key'), ...]
    assigned, words = [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            entries = read_file(find_file(word, search_path()))
            assigned += [(name, *entry) for name, entry in entries.items()]
            continue
        name, equals, text = word[2:].partition('=')
        kind = knobs[name].type if name in knobs else str
        is_alone = not words or words[0].startswith('--')
        if not equals and kind is bool and (is_alone or words[0] not in BOOLS):
            text = 'true'
        elif not equals and not is_alone:
            text = words.pop(0)
        elif not equals:
            example = EXAMPLES.get(get_origin(kind) or kind, 'NAME')
            require(name not in knobs, f'--{name} needs a value: --{name}={example}')
        assigned.append((name, parse_option(text, kind), f'--{name}'))

    # check names and types; later wins
    values, origin, unknown = {}, dict.fromkeys(knobs, 'default'), []
    for name, value, where in assigned:
        if name in knobs:
            try:
                values[name] = typed(name, knobs[name].type, value)
                del origin[name]
                origin[name] = where
            except (UserError, *PARSE_ERRORS) as error:
                raise UserError(f'{where}: {error}')
        elif where.startswith('--') or not name.startswith('_'):
            near = difflib.get_close_matches(name, knobs, n=1, cutoff=0)[0]
            unknown.append(f'{where}: unknown key {name!r}. Did you mean {near!r}?')
    require(not unknown, '\n'.join([*unknown, '--help lists all keys.']))
    return Config(**values), origin


def help_text(Config):
    """The knob block as it is written: groups, defaults and comments, those of parents first."""
    blocks = [inspect.getsource(cls).splitlines()[1:] for cls in reversed(Config.__mro__)
              if cls is not object]
    lines = [line.removeprefix('    ') for block in blocks for line in block]
    return '\n'.join(line for line in lines if not line.startswith('class '))


def describe(cfg, origin):
    """The knobs that differ from their defaults, one a line, with where each was set."""
    lines = []
    for name, value in vars(cfg).items():
        if origin[name] != 'default':
            assignment = f'{name} = {value!r}'
            lines.append(f'{assignment:<48}  # {origin[name]}')
    return '\n'.join(lines) or 'all knobs have their default values'
