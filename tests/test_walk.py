"""One walk through all programs, at toy size: text files and a Hugging Face directory as they are
downloaded, config/rewarm_pile_slim.py, a directory that transformers opens, and a benchmark.

Each step takes what the one before it left behind, and nothing else.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZERS, make_documents, metrics

import data
import eval
import train
from corpora.tokenizer import END, load_tokenizer

pyarrow = pytest.importorskip('pyarrow', reason='the corpora come as .jsonl.zst')
transformers = pytest.importorskip('transformers', reason='it opens the result')

pytestmark = pytest.mark.usefixtures('one_thread')
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}


def download(folder, field, domains, alphabet):
    """Two .jsonl.zst files. Each document names its domain, as in the Pile and in SlimPajama."""
    folder.mkdir(parents=True)
    texts = make_documents(alphabet, seed=1, n=300)
    lines = [json.dumps({'text': text, 'meta': {field: domains[i % len(domains)]}})
             for i, text in enumerate(texts)]
    for i in range(2):
        packed = pyarrow.compress('\n'.join(lines[i::2]).encode(), 'zstd', asbytes=True)
        (folder / f'{i:02}.jsonl.zst').write_bytes(packed)


@pytest.fixture
def hub(tmp_path, bpe, monkeypatch):
    """The working directory, with raw/ and weights/ as `hf download` leaves them."""
    monkeypatch.chdir(tmp_path)
    download(Path('raw/pile'), 'pile_set_name', ('Pile-CC', 'Github', 'ArXiv'), 'abcdefghij')
    download(Path('raw/slim'), 'redpajama_set_name', ('RedPajamaC4', 'RedPajamaBook'), 'mnopqrstuv')
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, rotary_pct=0.25, bos_token_id=0,
        eos_token_id=0)).save_pretrained('weights/toy')
    tokenizer = TOKENIZERS / '20B_tokenizer.json'
    if not tokenizer.exists():
        tokenizer = bpe / 'tokenizer.json'
    Path('weights/toy/tokenizer.json').write_bytes(tokenizer.read_bytes())
    return tokenizer


def command(*words):
    done = subprocess.run([sys.executable, '-m', *words], capture_output=True, text=True,
                          env={**ONE_THREAD, 'PYTHONPATH': str(ROOT)}, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_downloads_to_a_benchmark(hub, capsys):
    # text to shards: the Pile as one source, SlimPajama with a source for each domain
    tokens = ('--tokenizer', 'weights/toy', '--val', '0.2', '--workers', '1')
    command('corpora.prepare', 'pile', 'raw/pile', *tokens)
    by_domain = ('--by', 'meta.redpajama_set_name')
    assert 'slim/c4' in command('corpora.prepare', 'slim', 'raw/slim', *by_domain, *tokens)
    assert sorted(path.name for path in Path('data').glob('slim/*')) == ['book', 'c4']
    tokenizer = load_tokenizer('weights/toy')
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(hub))
    for name in ('pile', 'slim/c4'):
        (file,) = data.find_shards(name, 'train')
        ids = data.open_shard(file).tokens[:].tolist()
        text = tokenizer.decode(ids)
        assert ids == oracle(text)['input_ids'] and text.count(END) > 50

    # released weights, before they are trained here
    assert not eval.main(['loss', 'weights/toy', '--sets', 'pile', 'slim/c4', '--device', 'cpu'])
    assert capsys.readouterr().out.count('bits per byte') == 2

    # a stage on the new data, with replay of the old
    out = Path('out/walk')
    assert train.main([
        str(ROOT / 'config/rewarm_pile_slim.py'), '--init_from=weights/toy', f'--out_dir={out}',
        "--train_data={'slim/book': 4.2, 'slim/c4': 26.69}", '--replay=0.25', "--old_data=['pile']",
        "--val_data=['pile', 'slim/book', 'slim/c4']", '--block_size=32', '--batch_size=16',
        '--micro_batch_size=8', '--max_steps=12', '--milestones=[]', '--eval_every=6',
        '--eval_windows=20', '--device=cpu', '--dtype=fp32', '--compile=false']) == 0
    assert 'chance would be ln 50304' in capsys.readouterr().out.replace(',', '')
    first, _, last = metrics(out, 'eval')
    assert last['val']['slim/c4']['loss'] < first['val']['slim/c4']['loss']
    assert eval.Run(out).old == ['pile'] and (out / 'forgetting.png').stat().st_size > 10_000
    assert not eval.main(['loss', str(out), '--device', 'cpu'])
    said = capsys.readouterr().out
    assert all(f'{row["loss"]:.4f}' in said for row in last['val'].values())

    # out again: the same logits in transformers, with the tokenizer that came with the weights
    assert not eval.main(['export', str(out), 'exported'])
    _, ours = eval.load_run(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained('exported').eval()
    ids = torch.randint(50304, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4)
    text = 'a  b\n\n    ' + make_documents('abcdefghij', 2)[0][:200]
    ids = transformers.AutoTokenizer.from_pretrained('exported')(text)['input_ids']
    assert ids == tokenizer.encode(text).tolist()

    # lm-eval's own command on that directory gives our log-likelihoods
    pytest.importorskip('lm_eval', reason='the harness that runs benchmarks: pip install lm-eval')
    pytest.importorskip('accelerate', reason="lm-eval's command imports it")
    questions = write_task(Path('quiz'))
    command('lm_eval', '--model', 'hf', '--model_args', 'pretrained=exported,dtype=float32',
            '--tasks', 'quiz', '--include_path', 'quiz', '--device', 'cpu', '--batch_size', '4',
            '--output_path', 'scores', '--log_samples')
    (samples,) = Path('scores').rglob('samples_quiz_*.jsonl')
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(questions)
    for row in rows:
        for choice, ((found, _),) in zip(row['doc']['a'], row['resps']):
            context = tokenizer.encode(row['doc']['q']).tolist()
            whole = tokenizer.encode(f'{row["doc"]["q"]} {choice}').tolist()
            with torch.no_grad():
                logits, _ = ours(torch.tensor([whole[:-1]]))
            log_p = logits[0].log_softmax(-1)
            expected = sum(log_p[i - 1, whole[i]].item() for i in range(len(context), len(whole)))
            assert float(found) == pytest.approx(expected, abs=1e-3)


def write_task(folder):
    """A benchmark of two choices that needs no network: quiz.yaml with its questions."""
    words = make_documents('mnopqrstuv', 3)[0].split()
    questions = [{'q': ' '.join(words[i:i + 4]), 'a': words[i + 4:i + 6]} for i in range(8)]
    folder.mkdir()
    file = folder / 'quiz.jsonl'
    file.write_text(''.join(json.dumps(question) + '\n' for question in questions))
    (folder / 'quiz.yaml').write_text(
        'task: quiz\ndataset_path: json\noutput_type: multiple_choice\n'
        'validation_split: validation\n'
        f'dataset_kwargs: {{data_files: {{validation: {file.resolve()}}}}}\n'
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: 0\n"
        'metric_list: [{metric: acc}]\n')
    return questions
