"""Fine-tune every milestone of one pre-training run: what pre-training hides, fine-tuning shows.

Sun & Dredze 2024, "Amuro & Char: Analyzing the Relationship between Pre-Training and Fine-Tuning
of Large Language Models", arXiv:2408.06663.

Every checkpoint of one pre-training run is scored on a task as it is, and again after the same
short supervised fine-tuning. On some tasks the untouched checkpoints improve while they are
pre-trained, and fine-tuning adds little. On others they never show any skill, and yet a later
checkpoint is better after fine-tuning: it has learned something that was hidden.

    python -m projects.finetune_checkpoints config/pretrain_docs.py --train_data="{'names': 1}" \\
        --init_from=out/pretrain_docs/ckpt_00000500.pt --max_steps=100 --out_dir=out/names_500

Two tasks are made of packages that pre-training has not seen. A document ends with a line that is
the answer, and the loss counts that line alone:

    names       the beginning of a docstring; the name of its function or class
    answers     lines of a doctest; the first line of what they print

results/projects/finetune_checkpoints/run.sh takes about 6 minutes on 2 cores after the old model.
Expect (one seed): from step 70 to 1,000 of pre-training, the loss on `names` falls by 0.59 nats per
byte in untouched checkpoints, from 3.28 to 2.69, and by 0.83 after fine-tuning, from 2.78 to 1.95:
0.24 were hidden. On `answers`, whose form the old data have, it falls by 0.68 and 0.69: nothing
was. In right bytes the difference is small: 25 points as they are, 27 after fine-tuning.
Fine-tuning raises the loss on docs by 0.6 to 1.4 at every milestone. No untouched checkpoint gets
an answer wholly right; fine-tuned ones get 5 to 6% of `answers`, and no name.

Next: three seeds; random weights; other numbers of fine-tuning steps; replay of docs,
whose every byte the loss should then count.
"""
import ast
import re
from dataclasses import dataclass

import numpy as np
import torch

import data
import train
from configurator import require
from corpora import embedded
from model import cross_entropy

NEWLINE, EOT = 10, 256                                          # of the byte tokenizer
LONGEST = 200                                                   # characters of a document


@dataclass
class Knobs(train.Config):
    # --- scores ------------------------------------------------------------------------------
    test_documents: int = 400           # of the validation set, the first ones


# ------------------------------------------------------------------------------
# Tasks: functions (file, source) -> [document], as in corpora/embedded.py

def names_of(file, source):
    r"""'The beginning of a docstring\n\nits_name' of every public function and class."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
            beginning = (ast.get_docstring(node) or '').split('\n\n')[0]
            if len(beginning) > 20 and not node.name.startswith('test'):
                found.append(f'{beginning[:150]}\n\n{node.name}')
    return found


# lines of a doctest, and a first line of output that is not blank
SESSION = re.compile(r'(?:^>>> .*\n)+(?!>>> |\.\.\. )\S.*$', re.MULTILINE)


def answers_of(file, source):
    r"""'>>> a question\nits answer' of every doctest."""
    found = []
    for text in embedded.docs_of(file, source):
        unindented = re.sub('^[ \t]+', '', text, flags=re.MULTILINE)
        found += SESSION.findall(unindented)
    return [text for text in found if len(text) <= LONGEST]


embedded.EMBEDDED |= {'names': (names_of, embedded.MATHS), 'answers': (answers_of, embedded.MATHS)}


# ------------------------------------------------------------------------------

def is_answer(y):
    """Whether each target (B, T) is in the last line of its document, end-of-text included."""
    T = y.shape[1]
    positions = torch.arange(T, device=y.device)

    def next_of(token):
        """The position of the next such token, from each position on; T where there is none."""
        found = torch.where(y == token, positions, T)
        return found.flip(1).cummin(1).values.flip(1)
    return next_of(EOT) < next_of(NEWLINE)                                      # (B, T)


class FineTune(train.Method):
    Config, Parent = Knobs, train.Method

    def start(self, model, saved):
        require(len(self.cfg.train_data) == 1, 'finetune_checkpoints: train_data must name one '
                "task, such as {'names': 1}.")
        self.net, (task,) = model, self.cfg.train_data
        shards = data.find_shards(task, 'val', self.cfg.data_dir, self.cfg.paths)
        shard = data.open_shard(shards[0])
        require(shard.eot == EOT, f'{shard.path}: expected bytes with end-of-text after each '
                'document. Prepare the task with --tokenizer bytes.')
        ends = np.flatnonzero(shard.tokens == EOT)[:self.cfg.test_documents]
        self.test = np.split(shard.tokens[:ends[-1] + 1].astype(np.int64), ends[:-1] + 1)

    def objective(self, model, x, y, sources):
        logits, _ = model(x)                                                    # (B, T, V)
        wanted = is_answer(y)
        losses = cross_entropy(logits, y, 'none') * wanted                      # (B, T)
        return losses.sum() / wanted.sum().clamp(min=1), {}

    def after_evaluation(self, step, val):
        scores = [self.score(self.test[i:i + 16]) for i in range(0, len(self.test), 16)]
        loss, right, exact = [torch.cat(parts).float().mean().item() for parts in zip(*scores)]
        return {'answer loss': loss, 'right bytes': right, 'exact match': exact}, None

    @torch.no_grad()
    def score(self, documents):
        """Nats of each byte of the answers, which bytes are the likeliest, which answers greedy
        decoding gets right."""
        length = min(self.net.config.max_position_embeddings, max(map(len, documents)))
        rows = np.full((len(documents), length + 1), NEWLINE)               # padding on the right
        for row, document in zip(rows, documents):
            tail = document[-length:]
            row[:len(tail) + 1] = [EOT, *tail]
        rows = torch.from_numpy(rows).to(self.net.cos.device)
        x, y = rows[:, :-1], rows[:, 1:]
        logits, _ = self.net(x)
        wanted = is_answer(y) & (y != EOT)      # untouched checkpoints cannot know where to end
        losses, right = cross_entropy(logits, y, 'none'), logits.argmax(-1) == y
        return losses[wanted], right[wanted], (right | ~wanted).all(1)


if __name__ == '__main__':
    train.launch(FineTune)
