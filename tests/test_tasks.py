"""Projects that score tasks: finetune_checkpoints.py, probe.py and numeracy.py."""
import math
import random

import numpy as np
import pytest
import torch
from conftest import ends_well, metrics, stage, TINY
from corpora.shards import write_corpus
from model import GPTNeoX, GPTNeoXConfig
from projects.finetune_checkpoints import answers_of, EOT, FineTune, is_answer, names_of, NEWLINE
from projects.numeracy import in_words, inferable_numbers, Numeracy, sums
from projects.probe import linear_cka, linear_probe, Probe
from support.sampling import generate


pytestmark = pytest.mark.usefixtures('fast', 'one_thread')

SOURCE = '''
class Cup:
    """A cup that holds tea and sometimes coffee.

    It leaks if it is old, as the following lines show to whoever wants to read them.

    >>> cup = Cup()
    >>> cup.leaks(3)
    True
    >>> for i in cup:
    ...     print(i)
    0
    >>> cup.volume()
    Matrix([[1, 2],
            [3, 4]])
    """
    def fill(self):
        """Pour in as much as\\nthere is room for."""
    def _drop(self):
        """Let it fall on the stone floor."""
    def tip(self):
        """Too short."""
'''


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return GPTNeoX(GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 vocab_size=257, max_position_embeddings=64))


def ids(text):
    return [EOT if letter == '|' else ord(letter) for letter in text]


def marked(text, mask):
    return ''.join(letter if yes else '.' for letter, yes in zip(text, mask.tolist()))


# ------------------------------------------------------------------------------
# finetune_checkpoints.py

def test_tasks_are_made_of_docstrings_and_doctests():
    assert names_of('x.py', SOURCE) == [
        'A cup that holds tea and sometimes coffee.\n\nCup',
        'Pour in as much as\nthere is room for.\n\nfill']
    assert answers_of('x.py', SOURCE) == ['>>> cup = Cup()\n>>> cup.leaks(3)\nTrue',
                                          '>>> cup.volume()\nMatrix([[1, 2],']


def test_the_answer_is_the_last_line_of_a_document():
    text = 'ab\ncd|e\nfg|no\nend'
    assert marked(text, is_answer(torch.tensor([ids(text)]))[0]) == '...cd|..fg|......'
    draw = random.Random()
    text = ''.join(draw.choices('a\n|', [6, 1, 1], k=200))
    expected = torch.zeros(200, dtype=torch.bool)
    end = 0
    for document in text.split('|')[:-1]:
        answer = document.split('\n')[-1]
        end += len(document) + 1
        expected[end - len(answer) - 1:end] = True
    assert (is_answer(torch.tensor([ids(text)]))[0] == expected).all()


def test_an_exact_match_is_what_greedy_decoding_writes():
    method, model = FineTune(FineTune.Config()), tiny_model()
    method.net, documents, expected = model, [], []
    for i in range(8):
        question = [*np.random.randint(97, 122, np.random.randint(3, 30)), NEWLINE]
        whole = generate(model, torch.tensor([[EOT, *question]]), 4, temperature=0)[0].tolist()
        answer = whole[-4:]
        if {NEWLINE, EOT} & {*answer}:
            continue
        expected.append(i % 2 == 0)
        if i % 2:
            answer[-1] = 98 if answer[-1] != 98 else 99
        documents.append(np.array([*question, *answer, EOT]))
    losses, right, exact = method.score(documents)
    assert exact.tolist() == expected
    assert len(losses) == 4 * len(documents) and right.sum() == len(losses) - expected.count(False)

    # the loss of a document alone, without padding
    row = torch.tensor([[EOT, *documents[0]]])
    log_p = model(row)[0][0].log_softmax(-1)
    ends = range(row.shape[1] - 6, row.shape[1] - 2)
    alone = [-log_p[t, row[0, t + 1]].item() for t in ends]
    assert losses[:4].tolist() == pytest.approx(alone, abs=1e-5)


def test_fine_tuning_learns_a_task_and_logs_it(config, tmp_path):
    knobs = dict(train_data={'copies': 1.0}, val_data=['copies'], data_dir='data', max_steps=40,
                 batch_size=16, learning_rate=1e-2, eval_every=40)
    name = config('a', **TINY | knobs)
    write_corpus([f'{a}{b}?\n{a}' for a in 'abcdefghijklm' for b in 'abcdefghijklm'], 'copies',
                 'data', val=0.3)
    ends_well(name, method=FineTune)
    first, last = metrics('out/a', 'eval')
    assert last['answer loss'] < 0.7 * first['answer loss']
    assert last['right bytes'] >= last['exact match'] > 0.5


# ------------------------------------------------------------------------------
# probe.py

def test_a_linear_probe_is_ridge_regression():
    rng = np.random.default_rng()
    centres = rng.normal(size=(3, 5))
    labels, test_labels = rng.integers(0, 3, 90), rng.integers(0, 3, 200)
    x, test_x = [centres[part] + rng.normal(size=(len(part), 5)) for part in (labels, test_labels)]
    mean, scale = x.mean(0), x.std(0, ddof=1)
    a, test_a = [np.c_[(part - mean) / scale, np.ones(len(part))] for part in (x, test_x)]
    stacked = np.r_[a, math.sqrt(0.01 * 90) * np.eye(6)]
    weights = np.linalg.lstsq(stacked, np.r_[np.eye(3)[labels], np.zeros((6, 3))], rcond=None)[0]
    expected = ((test_a @ weights).argmax(1) == test_labels).mean()
    found = linear_probe(*map(torch.tensor, (x, labels, test_x, test_labels)))
    assert found == pytest.approx(expected, abs=0.011) and found > 0.4


def test_cka_sees_no_rotation_and_no_scale():
    a, b = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert linear_cka(a, 3 * a @ rotation + 5) == pytest.approx(1)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    gram_a, gram_b = [centre @ part @ part.T @ centre for part in (a, b)]
    expected = (gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())
    assert linear_cka(a, b) == pytest.approx(expected.item())


def test_probes_tell_corpora_of_other_letters_apart(config):
    ends_well(config('a', probes=None), "--probes={'both': ['old', 'new']}", method=Probe)
    first, *_, last = metrics('out/a', 'eval')
    assert first['both CKA'] == pytest.approx(1) and last['both CKA'] < 0.999
    assert last['both probe'] > 0.9


# ------------------------------------------------------------------------------
# numeracy.py

def test_numbers_in_words():
    assert [in_words(n) for n in (0, 7, 13, 20, 47, 100, 305, 999)] == [
        'zero', 'seven', 'thirteen', 'twenty', 'forty-seven', 'one hundred',
        'three hundred and five', 'nine hundred and ninety-nine']
    assert len({in_words(n) for n in range(1000)}) == 1000


def test_a_number_is_inferable_when_the_question_contains_it():
    # `/` stands for the end of a line; the last document has no end, hence no answer
    text = '12 or 7?/12, 4, 7, 4, 1|4/12 4 42|12/12'
    want = '.........12.....7..4.........4.........'
    y = torch.tensor([ids(text.replace('/', '\n'))])
    assert marked(text, inferable_numbers(y)[0]) == want


def test_the_contrastive_loss_by_hand():
    method, model = Numeracy(Numeracy.Config()), tiny_model()
    x = torch.tensor([ids('9 is 41, not 305 or 9001|')])
    hidden = []
    model.gpt_neox.final_layer_norm.register_forward_hook(lambda *call: hidden.append(call[2]))
    pairs = []
    for spellings in (('9', 'nine'), ('41', 'forty-one'), ('305', 'three hundred and five')):
        for text in spellings:
            model(torch.tensor([[EOT, *text.encode()]]))                # alone, without padding
            pairs.append(hidden[-1][0, 1:].mean(0))
    digits, words = pairs[::2], pairs[1::2]
    expected = 0
    for i in range(3):
        scores = [20 * torch.cosine_similarity(digits[i], word, dim=0) for word in words]
        expected -= torch.stack(scores).log_softmax(0)[i] / 3
    assert method.contrast(model, x).item() == pytest.approx(expected.item(), rel=1e-4)
    assert method.contrast(model, x[:, :4]).item() == 0                 # one number alone


def test_sums_are_written_and_scored(config):
    knobs = dict(train_data={'sums': 1.0}, val_data=['sums'], data_dir='data', max_steps=2,
                 warmup=0)
    name = config('a', **TINY | knobs)
    ends_well(name, '--contrast=0', '--inferable=0', '--test_documents=20', method=Numeracy)
    assert len(sums()) == 10_000 and '47+38=\n85' in sums()
    assert 0 <= metrics('out/a', 'eval')[-1]['exact match'] < 0.5


def test_methods_that_cannot_run(config, fails, corpora):
    fails(config('a'), "--train_data={'old': 1, 'new': 1}", method=FineTune,
          says=['train_data must name one task'])
    fails(config('b'), "--probes={'one': ['old']}", method=Probe, says=['expected two sources'])
    fails(config('c'), "--train_data={'sums': 1}", method=Numeracy, says=['Add --contrast=0'])
