"""Every claim of the papers in one table: what they found, and what came out here.

    python -m results.overview results/README.md

replaces what is between the two marks in the file. The rows are the lines of results/*/claims*.txt
that have four fields (see results/claims.py), with the verdicts of the tables beside them.
"""
import re
import sys
from pathlib import Path

from configurator import UserError, require
from support.files import write_whole
from results.claims import fields, read_claims

RESULTS = Path(__file__).parent
BEGIN, END = '<!-- claims -->', '<!-- end of claims -->'
HEAD = ['| claim | the papers | here: difference (95% interval) | verdict | could it show here? |',
        '|---|---|---|---|---|']


def rows(claims_file):
    """The rows of the overview that a claims file makes."""
    claims = [fields(line) for line in read_claims(claims_file)]
    claims = [claim for claim in claims if len(claim) == 4]
    if not claims:
        return []
    # {sentence: (verdict, its numbers)} of `- **Holds.** Sentence. [docs: a 1.0 < b 1.1 (by ...)]`
    table = claims_file.with_name(claims_file.name.replace('claims', 'table')).with_suffix('.md')
    verdicts = {}
    for line in table.read_text().splitlines():
        match = re.fullmatch(r'- \*\*(.*)\.\*\* (.*) \[(.*)\]', line)
        if match:
            verdicts[match[2]] = match[1], match[3]

    found = []
    for _, sentence, paper, scale in claims:
        require(sentence in verdicts, f'{table} has no verdict on {sentence!r}. Run the run.sh '
                'beside it.')
        verdict, numbers = verdicts[sentence]
        link = f'[{sentence}]({table.relative_to(RESULTS)})'
        found.append(f'| {link} | {paper} | {differences(numbers)} | {verdict} | {scale} |')
    return found


def differences(numbers):
    """'code: 0.070 (0.062 to 0.078), ...', one for each comparison of a verdict."""
    by = re.findall(r'\(by (-?[\d.]+)(?:, 95% interval (-?[\d.]+ to -?[\d.]+))?', numbers)
    texts = [f'{mean} ({interval})' if interval else mean for mean, interval in by]
    return f'{numbers.partition(":")[0]}: {", ".join(texts)}'


def overview():
    lines = list(HEAD)
    for claims_file in sorted(RESULTS.glob('*/claims*.txt')):
        lines += rows(claims_file)
    return '\n'.join(lines)


def main(argv):
    require(len(argv) == 1, __doc__)
    text = Path(argv[0]).read_text()
    require(text.count(BEGIN) == 1 and text.count(END) == 1, f'{argv[0]} must contain {BEGIN} and '
            f'{END} once each')
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_whole(Path(argv[0]), f'{before}{BEGIN}\n{overview()}\n{END}{after}'.encode())


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.overview: {error}')
