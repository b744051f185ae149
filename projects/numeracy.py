"""Arithmetic-based pre-training: teach an old model to read numbers, before it has to add them.

Petrak, Moosavi & Gurevych 2022, "Arithmetic-Based Pretraining: Improving Numeracy of Pretrained
Language Models", arXiv:2205.06733.

The old model is trained a little longer, on two losses in the place of its own (section 3):
L = contrast L_C + inferable L_INP, both with the factor 1/2. L_C pulls two spellings of a number
together, here 47 and forty-seven, and pushes other numbers of the batch away. L_INP is the
inferable number prediction task: the loss on numbers that the context contains.

    python -m projects.numeracy config/pretrain_docs.py --train_data="{'answers': 1}" \\
        --init_from=out/pretrain_docs --max_steps=150 --out_dir=out/numeracy
    python -m projects.numeracy config/pretrain_docs.py --train_data="{'sums': 1}" \\
        --init_from=out/numeracy --contrast=0 --inferable=0 --max_steps=300 --out_dir=out/sums

The second command fine-tunes on sums of numbers below 100. It logs the share of unseen sums that
greedy decoding gets right, as projects/finetune_checkpoints.py does; `answers` comes from there.

The paper's encoder and decoder see a context with subwords for digits, and a target with masked
numbers. Here one decoder reads bytes. So the second spelling is in words, numbers are encoded
alone, and those numbers of an answer count that its question contains.

results/projects/numeracy/run.sh takes about 8 minutes on 2 cores after the old model. Expect (one
seed, 400 unseen sums after 200 steps): 12% of the sums are wholly right, and 54% of their bytes,
against 7% and 43% without the stage between, and 5% and 49% after as many steps of language
modelling. L_C alone gives 10% and 53%, L_INP alone 6% and 47%. The order is the paper's, but one
seed decides nothing: 400 sums alone give 10% a standard error of 1.5%. The stage costs the old data
much: the loss on docs rises from 1.47 to 4.91.

Next: three seeds; the rate of the stage, and replay of docs in it; numbers within their context;
numbers that can be computed from the context, as in the paper.
"""
import random
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import train
from configurator import require
from corpora import embedded
from model import cross_entropy
from projects import finetune_checkpoints
from projects.finetune_checkpoints import EOT, NEWLINE, FineTune, is_answer


@dataclass
class Knobs(finetune_checkpoints.Knobs):
    # --- arithmetic-based pre-training; fine-tuning when both are 0 ----------------------------
    contrast: float = 0.5               # weight of the loss between two spellings of a number
    inferable: float = 0.5              # weight of the loss on numbers that the context contains
    sharpness: float = 20.0             # what multiplies the cosines


def sums():
    r"""'47+38=\n85' and all other sums of two numbers below 100. The last line is the answer.

    In a random order: else an answer would be that of the document before it, plus one.
    """
    found = [f'{a}+{b}=\n{a + b}' for a in range(100) for b in range(100)]
    random.Random(0).shuffle(found)
    return found


def sums_of(file, source):
    return sums()


# made when it is first needed, as all of embedded.py; the two files are not looked at
embedded.EMBEDDED['sums'] = sums_of, ('pydoc_data',)

TENS = 'zero ten twenty thirty forty fifty sixty seventy eighty ninety'.split()
SMALL = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen '
         'fifteen sixteen seventeen eighteen nineteen').split()


def in_words(n):
    """47 -> 'forty-seven', for numbers below 1000."""
    if n >= 100:
        rest = f' and {in_words(n % 100)}' if n % 100 else ''
        return f'{SMALL[n // 100]} hundred{rest}'
    if n < 20:
        return SMALL[n]
    return TENS[n // 10] + (f'-{SMALL[n % 10]}' if n % 10 else '')


def numbers_in(row):
    """[(start, end, digits), ...] of the numbers among token ids [T]."""
    text = bytes(NEWLINE if token == EOT else token for token in row)
    return [(*match.span(), match[0]) for match in re.finditer(rb'\d+', text)]


def inferable_numbers(y):
    """Whether each target (B, T) is in a number of an answer that its document had before."""
    wanted, answers = torch.zeros_like(y, dtype=torch.bool), is_answer(y)
    for i, row in enumerate(y.tolist()):
        document_starts = [t + 1 for t, token in enumerate(row) if token == EOT]
        for start, end, digits in numbers_in(row):
            begin = max([t for t in document_starts if t <= start], default=0)
            known = [number for _, _, number in numbers_in(row[begin:start])]
            wanted[i, start:end] = bool(answers[i, start]) and digits in known
    return wanted


class Numeracy(FineTune):
    Config = Knobs

    def __init__(self, cfg):
        super().__init__(cfg)
        require(cfg.contrast == cfg.inferable == 0 or 'sums' not in cfg.train_data, 'numeracy: '
                'sums are for fine-tuning. Add --contrast=0 --inferable=0.')

    def objective(self, model, x, y, sources):
        if not (self.cfg.contrast or self.cfg.inferable):
            return super().objective(model, x, y, sources)
        logits, _ = model(x)                                                    # (B, T, V)
        wanted = inferable_numbers(y)
        losses = cross_entropy(logits, y, 'none') * wanted                      # (B, T)
        inferable = losses.sum() / wanted.sum().clamp(min=1)
        contrast = self.contrast(model, x)
        loss = self.cfg.contrast * contrast + self.cfg.inferable * inferable
        return loss, {'contrast': contrast, 'inferable': inferable}

    def contrast(self, model, x):
        """Every number below 1000 in x must find its other spelling among those of the others."""
        found = {int(digits) for row in x.tolist() for _, _, digits in numbers_in(row)
                 if len(digits) <= 3}
        if len(found) < 2:
            return model.embed_out.weight.sum() * 0
        digits = self.embed(model, [str(n) for n in sorted(found)])             # (N, C)
        words = self.embed(model, [in_words(n) for n in sorted(found)])
        cosines = F.normalize(digits, dim=1) @ F.normalize(words, dim=1).T      # (N, N)
        return F.cross_entropy(self.cfg.sharpness * cosines, torch.arange(len(found)).to(x.device))

    def embed(self, model, texts):
        """(N, C): for each text, the mean over its bytes of what the last LayerNorm returns."""
        rows = [torch.tensor([EOT, *text.encode()]) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, -1).to(model.cos.device)      # (N, T)
        hidden = []
        hook = model.gpt_neox.final_layer_norm.register_forward_hook(
            lambda *call: hidden.append(call[-1].float()))
        model(ids.clamp(min=0))
        hook.remove()
        is_text = ((ids >= 0) & (ids != EOT)).unsqueeze(2)                      # (N, T, 1)
        return (hidden[0] * is_text).sum(1) / is_text.sum(1)


if __name__ == '__main__':
    train.launch(Numeracy)
