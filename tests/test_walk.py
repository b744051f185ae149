"""One walk through every seam, at toy size: from files in the layout of the Pile and SlimPajama and a Hugging Face
directory, as they are downloaded, through config/rewarm_pile_slim.py, to a directory that transformers opens and a
benchmark. Each step takes what the one before it left behind, and nothing else.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZERS, make_documents, metrics

import data
import eval
import train

zstandard = pytest.importorskip('zstandard', reason='the corpora come as .jsonl.zst')
transformers = pytest.importorskip('transformers', reason='it makes the weights and opens the result')

PILE, SLIM = ('Pile-CC', 'Github', 'PubMed Central'), ('RedPajamaCommonCrawl', 'RedPajamaC4')


def download(folder, field, domains, alphabet):
    """Two .jsonl.zst files, each document with the name of its domain, as the corpus has it."""
    folder.mkdir(parents=True)
    texts = make_documents(alphabet, seed=1, n=300)
    lines = [json.dumps({'text': text, 'meta': {field: domains[i % len(domains)]}}) for i, text in enumerate(texts)]
    for i in range(2):
        (folder / f'{i:02}.jsonl.zst').write_bytes(zstandard.compress('\n'.join(lines[i::2]).encode()))


@pytest.fixture
def hub(tmp_path, bpe, monkeypatch):
    """The working directory, with raw/ and weights/ as `hf download` leaves them. The 20B tokenizer, where it is at hand."""
    monkeypatch.chdir(tmp_path)
    download(Path('raw/pile'), 'pile_set_name', PILE, 'abcdefghij')
    download(Path('raw/slim'), 'redpajama_set_name', SLIM, 'mnopqrstuv')
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, rotary_pct=0.25, bos_token_id=0, eos_token_id=0)).save_pretrained('weights/toy')
    tokenizer = next(f for f in (TOKENIZERS / '20B_tokenizer.json', bpe / 'tokenizer.json') if f.exists())
    Path('weights/toy/tokenizer.json').write_bytes(tokenizer.read_bytes())
    return tokenizer


def prepare(*args):
    run = subprocess.run([sys.executable, ROOT / 'data.py', 'prepare', *args, '--tokenizer', 'weights/toy'],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_from_downloads_to_a_benchmark(hub, capsys, monkeypatch):
    # Text to shards: the Pile as one source, SlimPajama domain by domain.
    prepare('pile', 'raw/pile', '--val', '0.2')
    assert 'slim_c4' in prepare('slim', 'raw/slim', '--val', '0.2', '--by', 'meta.redpajama_set_name')
    assert sorted(path.name for path in Path('data').iterdir()) == ['pile', 'slim_c4', 'slim_commoncrawl']
    tokenizer, oracle = data.get_tokenizer('weights/toy'), transformers.PreTrainedTokenizerFast(tokenizer_file=str(hub))
    for name in ('pile', 'slim_c4'):
        shard = data.open_shard(f'data/{name}/train_00000.bin')
        text = tokenizer.decode(ids := shard.read(0, shard.count))
        assert ids.tolist() == oracle(text)['input_ids'] and text.count(data.END) > 50

    # Released weights, before any training of ours.
    assert not eval.main(['loss', 'weights/toy', '--sets', 'pile', 'slim_c4', '--device', 'cpu'])
    assert capsys.readouterr().out.count('bits per byte') == 2

    # A stage on the new data, with replay of the old.
    out = Path('out/walk')
    assert train.main([
        str(ROOT / 'config/rewarm_pile_slim.py'), '--init_from=weights/toy', f'--out_dir={out}', '--block_size=32',
        "--train_data={'slim_commoncrawl': 52.09, 'slim_c4': 26.69}", '--replay=0.25', "--old_data=['pile']",
        "--val_data=['pile', 'slim_commoncrawl', 'slim_c4']", '--batch_size=16', '--micro_batch_size=8', '--max_steps=12',
        '--milestones=[]', '--eval_every=6', '--eval_windows=20', '--device=cpu', '--dtype=fp32', '--compile=false']) == 0
    said = capsys.readouterr().out
    assert 'the loaded weights, before the first step' in said
    first, _, last = metrics(out, 'eval')
    assert last['val']['slim_c4']['loss'] < first['val']['slim_c4']['loss']
    assert eval.Run(out).old == ['pile'] and (out / 'forgetting.png').stat().st_size > 10_000

    assert not eval.main(['loss', str(out), '--device', 'cpu'])
    said = capsys.readouterr().out
    assert all(f'{row["loss"]:.4f}' in said for row in last['val'].values())

    # And out again: the same logits in transformers, with the tokenizer that came with the weights.
    assert not eval.main(['export', str(out), 'exported'])
    _, ours = eval.load_run(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained('exported').eval()
    idx = torch.randint(50304, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)
    text = 'a  b\n\n    ' + make_documents('abcdefghij', 2)[0][:200]
    assert transformers.AutoTokenizer.from_pretrained('exported')(text)['input_ids'] == tokenizer.encode(text).tolist()

    # A benchmark of the run, and of what was exported: the same scores.
    pytest.importorskip('lm_eval', reason='the harness that runs the benchmarks: pip install lm-eval')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', Path('cache').resolve())
    Path('mine').mkdir()
    words = make_documents('mnopqrstuv', 3)[0].split()
    Path('mine/quiz.jsonl').write_text(''.join(json.dumps({'q': ' '.join(words[i:i + 4]), 'a': words[i + 4:i + 6]}) + '\n'
                                               for i in range(8)))
    Path('mine/quiz.yaml').write_text(
        'task: quiz\ndataset_path: json\noutput_type: multiple_choice\nvalidation_split: validation\n'
        f'dataset_kwargs: {{data_files: {{validation: {Path("mine/quiz.jsonl").resolve()}}}}}\n'
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n")
    scores = []
    for name in (str(out), 'exported'):
        assert not eval.main(['bench', name, '--tasks', 'quiz', '--include_path', 'mine', '--out', 'scores.json',
                              '--device', 'cpu'])
        scores.append(json.loads(Path('scores.json').read_text())['results']['quiz'])
    assert scores[0] == scores[1] and 0 <= scores[0]['acc,none'] <= 1
