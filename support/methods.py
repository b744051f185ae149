"""The name of a Method in files, and the class of that name.

Nobody needs this to understand a run. Files name a class, as in 'projects.swiglu:SwiGLU', and the
class is imported only if it is one of projects/: a file from elsewhere cannot name code to run.
"""
import importlib
import re
import sys
from pathlib import Path

from configurator import require

ROOT = Path(__file__).resolve().parents[1]


def name_of(Method):
    """'module:class'. A module that was started as a program goes by its own name."""
    module = Method.__module__
    if module == '__main__':
        main = sys.modules['__main__']
        spec = getattr(main, '__spec__', None)          # python -m projects.x
        module = spec.name if spec else Path(getattr(main, '__file__', module)).stem
    return f'{module}:{Method.__qualname__}'


def plain(Method):
    """train.Method, from which all others inherit. It stands above `object` alone."""
    return Method.__mro__[-2]


def replaces(Method, seam):
    """Whether a Method has a function of its own in the place of that of train.Method."""
    return getattr(Method, seam) is not getattr(plain(Method), seam)


def built_by(Method):
    """The name of the Method that builds the model, or '' where it is a GPTNeoX."""
    return name_of(Method) if replaces(Method, 'model') else ''


def find(name, given=''):
    """The Method of a name that stands in a file. given: a name from the command line instead."""
    wanted = given or name
    is_ours = re.fullmatch(r'projects(\.[A-Za-z]\w*)+:[A-Za-z]\w*', wanted)
    require(given or is_ours, f'the model was built by {name}, which is not in projects/. If you '
            f'trust it, add --method={name}')
    module, _, attribute = wanted.partition(':')
    file = ROOT.joinpath(*module.split('.')).with_suffix('.py')
    require(given or file.exists(), f'the model was built by {name}, but there is no {file}.')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        require(False, f'there is no {wanted} ({error}). It is written module:Class.')
