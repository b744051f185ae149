"""eval.py bench against lm-eval's own `hf` model, request by request, and on local tasks without a network."""
import json
import math
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import make_documents
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import eval
from model import GPTNeoX, GPTNeoXConfig

lm_eval = pytest.importorskip('lm_eval', reason='the harness that runs the benchmarks: pip install lm-eval')
from lm_eval.api.instance import Instance                       # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')
BLOCK = 48


@pytest.fixture(scope='module', autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_EVALUATE_OFFLINE', 'TRANSFORMERS_OFFLINE'):
            patch.setenv(name, '1')
        yield


@pytest.fixture(scope='module')
def both(bpe, tmp_path_factory, one_thread):
    """(our adapter, lm-eval's hf model) of the same random weights, large enough that choices differ."""
    pytest.importorskip('accelerate', reason="lm-eval's hf model imports it")
    from lm_eval.models.huggingface import HFLM
    seed = random.randrange(10 ** 6)
    print('seed', seed)
    torch.manual_seed(seed)
    tokenizer = data.get_tokenizer(str(bpe))
    model = GPTNeoX(GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=384,
                                  max_position_embeddings=BLOCK))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
        model.embed_out.weight[1] = 0                           # <|padding|>, which hf leaves out of a text
    folder = tmp_path_factory.mktemp('exported') / 'hf'
    run = save_run(folder.parent, model, tokenizer)
    assert not eval.main(['export', str(run), str(folder), '--tokenizer', str(bpe)])
    theirs = HFLM(pretrained=str(folder), device='cpu', dtype='float32', batch_size=3, max_length=BLOCK)
    return eval.harness_model(model, tokenizer, 3, nullcontext()), theirs


def save_run(folder, model, tokenizer):
    """A checkpoint as train.py would leave it."""
    config = {'data_dir': 'data', 'paths': {}, 'val_data': [], 'eval_windows': 0}
    torch.save({'step': 7, 'config': config, 'model': vars(model.config), 'weights': model.state_dict(),
                'tokenizer': tokenizer.name}, path := folder / 'run.pt')
    return path


def ask(lm, kind, requests):
    return getattr(lm, kind)([Instance(kind, {}, args, i) for i, args in enumerate(requests)])


WORDS = make_documents('abcdefghij', 1)[0].split() + ['Zürich', 'e\u0301', '  ', '\n\n', '日本', '7', '.']
texts = st.one_of(*(st.lists(st.sampled_from(WORDS), min_size=n, max_size=70).map(' '.join) for n in (1, BLOCK)))


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for (a, greedy), (b, theirs_greedy) in zip(ours, theirs):
        assert a == pytest.approx(b, abs=1e-4) and greedy == theirs_greedy


contexts = st.one_of(st.just(''), texts, texts.map(lambda text: text + ' '))
continuations = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(lambda words: ' ' + ' '.join(words))


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(contexts, continuations), min_size=1, max_size=8))
def test_log_likelihoods_are_those_of_hf(both, pairs):
    ours, theirs = both
    pairs = [(context, text) for context, text in pairs if context == '' or context.strip()]    # hf takes no '  '
    assert_alike(ask(ours, 'loglikelihood', pairs), ask(theirs, 'loglikelihood', pairs))


def test_a_context_of_spaces(both):
    ours, _ = both
    assert ask(ours, 'loglikelihood', [('  ', ' a')]) == ask(ours, 'loglikelihood', [('', '   a')])


def test_the_likeliest_continuation_is_known_as_such(both):
    """Answers that begin as the model itself would; those of one token, as the choices A to D, share one input."""
    ours, theirs = both
    own = [ask(ours, 'generate_until', [(word, {'max_gen_toks': n}) for word in WORDS[:12]]) for n in (1, 2)]
    pairs = [(word, text) for word, a, b in zip(WORDS, *own) for text in (a, b, a + ' b', a + '7', 'a', ' b') if text]
    found = ask(ours, 'loglikelihood', pairs)
    assert_alike(found, ask(theirs, 'loglikelihood', pairs))
    assert {greedy for _, greedy in found} == {True, False}


@settings(max_examples=15, deadline=None)
@given(documents=st.lists(st.one_of(st.just(''), texts), min_size=1, max_size=6))
def test_rolling_log_likelihoods_are_those_of_hf(both, documents):
    ours, theirs = both
    requests = [(document,) for document in documents]
    found = ask(ours, 'loglikelihood_rolling', requests)
    assert found == pytest.approx(ask(theirs, 'loglikelihood_rolling', requests), abs=1e-4, rel=1e-6)
    assert all((logp == 0) == (document == '') for logp, document in zip(found, documents))


@settings(max_examples=15, deadline=None)
@given(contexts=st.lists(texts, min_size=1, max_size=6), n=st.integers(1, 20),
       until=st.lists(st.sampled_from([' ', 'a', 'b', 'cd', '\n', '<|endoftext|>']), max_size=2, unique=True))
def test_greedy_texts_are_those_of_hf(both, contexts, n, until):
    ours, theirs = both
    requests = [(context, {'until': until, **more}) for context in contexts
                for more in ({'max_gen_toks': n}, {'max_gen_toks': 2 * n, 'do_sample': False, 'temperature': 0.0})]
    assert ask(ours, 'generate_until', requests) == ask(theirs, 'generate_until', requests)


def test_sampling_follows_its_settings(both):
    ours, _ = both
    def drawn(**settings):
        requests = [('a b c', {'until': [], 'max_gen_toks': 4, **settings})] * 40
        return set(ask(ours, 'generate_until', requests))
    assert len(drawn(do_sample=True)) > 30 and len(drawn(temperature=1.0)) > 30
    assert len(drawn()) == 1 == len(drawn(do_sample=True, top_k=1)) == len(drawn(do_sample=True, top_p=1e-6))


def test_what_does_not_fit_in_the_block(both):
    ours, _ = both
    with pytest.raises(eval.EvalError, match=f'{BLOCK + 1} tokens.*block size is {BLOCK}'):
        ask(ours, 'loglikelihood', [('a', '7' * (BLOCK + 1))])
    with pytest.raises(eval.EvalError, match=f'block size {BLOCK}'):
        ask(ours, 'generate_until', [('a', {'until': ['\n'], 'max_gen_toks': BLOCK})])


# -----------------------------------------------------------------------------
# Whole tasks, from files

@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks, 'quiz' (multiple choice) and 'prose' (rolling), and their documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'cache')
    Path('mine').mkdir()
    words = make_documents('abcdefghij', 3)[0].split()
    rows = [{'q': ' '.join(words[i:i + 5]), 'choices': words[i + 5:i + 9], 'answer': i % 4} for i in range(8)]
    Path('mine/quiz.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    Path('mine/prose.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in ('aé b', 'c' * 200)))
    for name, kind, rest in (
            ('quiz', 'multiple_choice', "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
             'metric_list: [{metric: acc}, {metric: acc_norm}]\n'),
            ('prose', 'loglikelihood_rolling', "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
             'metric_list: [{metric: bits_per_byte}]\n')):
        Path(f'mine/{name}.yaml').write_text(
            f'task: {name}\ndataset_path: json\noutput_type: {kind}\n{rest}metadata: {{version: 1}}\n'
            f'dataset_kwargs: {{data_files: {{validation: {tmp_path}/mine/{name}.jsonl}}}}\n'
            'validation_split: validation\n')
    return 'mine'


def bench(run, *argv):
    argv = ['--include_path', 'mine', '--device', 'cpu', '--out', 'results.json', *argv]
    assert not eval.main(['bench', str(run), *argv])
    return json.loads(Path('results.json').read_text())


def test_tasks_of_ones_own(both, bpe, tasks, tmp_path, capsys):
    """The scores that lm-eval works out of hf's answers, and the table."""
    ours, theirs = both
    model = GPTNeoX(GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=384,
                                  max_position_embeddings=BLOCK))
    model.load_state_dict({k.replace('lm_head', 'embed_out'): v for k, v in theirs.model.state_dict().items()})
    run = save_run(tmp_path, model, data.get_tokenizer(str(bpe)))
    names = ['quiz', 'prose']
    found = bench(run, '--tasks', *names, '--tokenizer', str(bpe))
    expected = lm_eval.simple_evaluate(theirs, tasks=names, task_manager=eval.find_tasks(names, 'mine'))['results']
    for task in names:
        numbers = {key: x for key, x in expected[task].items() if isinstance(x, float)}
        assert numbers and {key: found['results'][task][key] for key in numbers} == pytest.approx(numbers, abs=1e-5)
    out = capsys.readouterr().out
    assert '|quiz' in out and 'bits_per_byte' in out
    assert found['lm_eval_version'] and 'PyTorch version' in found['pretty_env_info']
    assert found['run']['step'] == 7 and found['run']['tokenizer'] == data.get_tokenizer(str(bpe)).name
    assert found['n-shot'] == {'quiz': 0, 'prose': 0}
    found = bench(run, '--tasks', 'quiz', '--tokenizer', str(bpe), '--limit', '3', '--num_fewshot', '2',
                  '--dtype', 'bf16')
    assert found['n-samples']['quiz']['effective'] == 3 and found['n-shot'] == {'quiz': 2}


def test_a_model_of_bytes_that_knows_nothing(tasks, tmp_path):
    model = GPTNeoX(GPTNeoXConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=384,
                                  max_position_embeddings=32))
    torch.nn.init.zeros_(model.embed_out.weight)
    found = bench(save_run(tmp_path, model, data.BYTES), '--tasks', 'prose')
    assert found['results']['prose']['bits_per_byte,none'] == pytest.approx(math.log2(384), rel=1e-6)


def test_the_papers_lists_are_known_to_lm_eval(monkeypatch, tmp_path, both):
    """Each task by its name, and with the papers' number of examples."""
    monkeypatch.chdir(tmp_path)
    asked = []
    model = GPTNeoX(GPTNeoXConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=384))
    run = save_run(tmp_path, model, data.BYTES)

    def evaluate(lm, tasks, num_fewshot, **kwargs):
        asked.append((num_fewshot, tasks))
        table = {task: {'acc,none': 0.5, 'alias': task} for task in tasks}
        return {'results': table, 'versions': dict.fromkeys(tasks, 1), 'n-shot': dict.fromkeys(tasks, num_fewshot),
                'higher_is_better': {task: {'acc': True} for task in tasks}, 'date': 1.0}
    monkeypatch.setattr(lm_eval, 'simple_evaluate', evaluate)
    argv = ['--tasks', 'papers', 'papers-german', '--device', 'cpu', '--out', 'results.json']
    assert not eval.main(['bench', str(run), *argv])
    assert asked[0][0] == 0 and 'hellaswag' in asked[0][1] and 'hellaswag_de' in asked[0][1]
    assert asked[1] == (5, ['mmlu', 'nq_open', 'triviaqa', 'm_mmlu_de'])
    assert json.loads(Path('results.json').read_text())['n-shot'] == {
        task: shots for shots, tasks in asked for task in tasks}


@pytest.mark.parametrize('argv, says', [
    (['--tasks', 'quizz'], ['quizz', 'near it: quiz']), (['--tasks', 'quiz', '--out', 'nowhere/x.json'], ['nowhere']),
    (['--tasks', 'quiz', '--tokenizer', 'nowhere'], ['nowhere']), (['--tasks', 'quiz'], ['tokenizer'])])
def test_bad_input(argv, says, tasks, tmp_path, capsys, monkeypatch):
    if argv == ['--tasks', 'quizz']:                            # the others take seconds to list
        monkeypatch.setattr(eval, 'PAPERS', {})
        real = lm_eval.tasks.TaskManager
        monkeypatch.setattr(lm_eval.tasks, 'TaskManager', lambda include_path, include_defaults=True: real(
            include_path=include_path, include_defaults=False))
    model = GPTNeoX(GPTNeoXConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=384))
    run = save_run(tmp_path, model, data.BYTES._replace(name=None))
    assert eval.main(['bench', str(run), '--include_path', 'mine', *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith('eval.py: ') and all(word in err for word in says)


def test_without_lm_eval(monkeypatch, capsys):
    monkeypatch.setitem(__import__('sys').modules, 'lm_eval', None)
    assert eval.main(['bench', 'run', '--tasks', 'quiz']) == 2
    assert 'pip install lm-eval' in capsys.readouterr().err
